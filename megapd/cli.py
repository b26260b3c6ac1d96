"""The command line: what each verb is called, takes and runs.

Exit codes: 0 done (or stopped on request, with a checkpoint); 1 the run diverged, a followed teacher wrote no checkpoint in
time, a served teacher was lost or another one than scheduled, a trajectory is not as it was written, or the demo did not show
its effect; 2 a mistake in the settings or files, told in one line.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapd import __version__
from megapd.errors import DiskFailed, MaskedFormatter, RunFailed, UserError, mask_process, masked
from megapd.files import disk_failure

if TYPE_CHECKING:
    from megapd.config import Config

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

# What a verb runs: a name for `command`, which is given the configuration, or a function of this file.
Function = str | Callable[..., int]


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        argv = sys.argv[1:]
        mask_process()
    # The deepspeed launcher hands each rank its number on the command line as well as in LOCAL_RANK.
    argv = [a for a in argv if not a.startswith("--local_rank=")]
    # Settings are taken out first: argparse would take one with a space in it, such as --model={kind: gpt}, for the file's name.
    settings = [argument for argument in argv if _is_setting(argument)]
    parsed, unknown = _parser().parse_known_args([argument for argument in argv if not _is_setting(argument)])
    log = logging.StreamHandler()
    log.setFormatter(MaskedFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[log], level=logging.WARNING)
    try:
        return _call(settings + unknown, **vars(parsed))
    except (UserError, RunFailed) as error:
        mistake = isinstance(error, UserError)
        # One rank a machine: what is missing may be missing on one of them. A disk may fail one rank alone.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, DiskFailed):
            print(f"megapd: {'error: ' if mistake else ''}{masked(str(error))}", file=sys.stderr)
        return 2 if mistake else 1
    except Exception as error:
        if (told := disk_failure(error)) is None:
            raise
        print(f"megapd: error: {told}", file=sys.stderr)
        return 2


def _call(
    overrides: list[str], *, verb: str, function: Function, takes_overrides: bool, action: str | None = None, **options: Any
) -> int:
    """Call the verb's function: with the configuration, or for one of this file the overrides, and the options by their names."""
    if overrides and not takes_overrides:
        raise UserError(f"{overrides[0]!r}: `megapd {verb}` takes no settings")
    if not isinstance(function, str):
        return function(overrides, **options)
    configuration = [_load(overrides, options.pop("config", None))] if takes_overrides else []
    return command(function)(*configuration, **options)


def command(path: str) -> Callable[..., int]:
    """`module.function` of megapd.commands, imported only to run: torch alone takes seconds, each verb needs other things."""
    module, name = path.split(".")
    function: Callable[..., int] = getattr(import_module(f"megapd.commands.{module}"), name)
    return function


def _run(path: str, *arguments: Any, **options: Any) -> int:
    """`command`, imported when its arguments are there: a mistake in the settings is told at once."""
    return command(path)(*arguments, **options)


def _train(overrides: list[str], config: Path | None, dry_run: bool, **options: Any) -> int:
    if dry_run:
        return _run("dry_run.show_dry_run", _load(overrides, config))
    return _run("train.train_command", _load(overrides, config), **options)


def _teacher(overrides: list[str], config: Path | None) -> int:
    own = [] if config is None else [str(config)]
    return _run("teacher.serve_teacher", _load(overrides, config), ["teacher", *own, *overrides])


def _evaluate(overrides: list[str], folder: Path) -> int:
    return _run("evaluate.evaluate_run", _load(overrides, folder / "config.yaml"), folder)


def _export(overrides: list[str], folder: Path, **options: Any) -> int:
    place = [f"--runs_dir={folder.absolute().parent}", f"--name={folder.absolute().name}"]  # wherever the run lies now
    return _run("export.export_run", _load([*overrides, *place], folder / "config.yaml"), **options)


def _distil(overrides: list[str], **options: Any) -> int:
    return _run("distil.distil", overrides, **options)


def _doctor(overrides: list[str], source: Path | None) -> int:
    return _run("doctor.examine_all", overrides, source)


def _branch(overrides: list[str], **options: Any) -> int:
    return _run("branch.branch_run", overrides, **options)


def _verify(overrides: list[str], source: str, accept: bool, steps: tuple[int, ...]) -> int:
    from megapd.trajectory.hugging_face import is_hugging_face

    published = is_hugging_face(source)
    if not published and not Path(source).exists():
        return _run("trajectory.verify_checkpoints", _load(overrides), source, accept=accept)
    if accept:
        raise UserError(f"--accept: {source} is no registered trajectory, which alone has flags; give the name of one")
    if overrides:
        raise UserError(f"{overrides[0]!r}: settings are for registered trajectories; of a published one, give --steps")
    return _run("checkpoints.verify_source", source, steps)


def _analyse(overrides: list[str], **options: Any) -> int:
    return _run("analyse.analyse_checkpoints", overrides, **options)


def _suggest(overrides: list[str], **options: Any) -> int:
    return _run("checkpoints.suggest_transition", overrides, **options)


def _scheduler(overrides: list[str], words: list[str], name: str | None, output: Path | None) -> int:
    match words:
        case ["token", role]:
            return _run("scheduler.create_token", _load(overrides), role, name, output)
        case ["tokens"]:
            return _run("scheduler.list_tokens", _load(overrides))
        case ["revoke", revoked]:
            return _run("scheduler.revoke_token", _load(overrides), revoked)
        case [] | [_]:
            return _run("scheduler.serve_scheduler", _load(overrides, Path(words[0]) if words else None))
    raise UserError(f"{' '.join(words)}: give a configuration's file, or token ROLE, tokens, revoke NAME")


def _set_schedule(overrides: list[str], run: str, **options: Any) -> int:
    from megapd.config import parse_overrides

    # The schedule alone, which in a run's configuration would ask for a teacher beside it.
    own = [o for o in overrides if o.startswith(("--schedule.", "--schedule="))]
    config = _load([o for o in overrides if o not in own])
    document = parse_overrides(own).get("schedule")
    if not isinstance(document, dict):
        raise UserError("schedule: give the new one as settings, --schedule.policy=one_shot --schedule.checkpoint=1200")
    return _run("schedule.set_schedule", config, run, document, **options)


def _load(overrides: list[str], file: Path | None = None) -> Config:
    from megapd.config import load

    return load(file, overrides)


def _is_setting(argument: str) -> bool:
    match = re.match(r"--(\w+)[.=]", argument)
    if match is None:
        return False
    from megapd.config import Config

    return match[1] in Config.model_fields


# -------------------------------------------------------------------------------------------------------------- the parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megapd", description="Progressive distillation pre-training on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"megapd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True)
    sub = _verb(verbs, "train", _train, "train a teacher or a student", config=True)
    sub.add_argument("--dry-run", action="store_true", help="print what would run, and train nothing")
    text = "a setting, or a section, that may differ from what the run has on record"
    sub.add_argument("--allow-change", action="append", default=[], metavar="SETTING", help=text)
    text = "though another machine's process holds the run's folder, if it gave no sign for a minute"
    sub.add_argument("--take-over", action="store_true", help=text)
    _verb(verbs, "teacher", _teacher, "serve a teacher's signals to students in other processes", config=True)
    _verb(verbs, "record", "record.record_signals", "fill teacher.cache with the signals of a whole schedule", config=True)
    text = "build the corpus: tokenizer, packed blocks, held-out split"
    sub = _verb(verbs, "prepare", "prepare.prepare_corpus", text, config=True)
    text = "with the tokenizer and the number of ids of a teacher; without a name, of teacher.trajectory"
    sub.add_argument("--like", nargs="?", const="", metavar="TEACHER", help=text)
    corpus = _verb(verbs, "corpus", "prepare.verify_corpus", "prepared corpora", overrides=False)
    actions = corpus.add_subparsers(dest="action", required=True)
    sub = _verb(actions, "verify", "prepare.verify_corpus", "read all of it against its digests", overrides=False)
    sub.add_argument("folder", type=Path, help="corpus.output of `megapd prepare`")
    sub = _verb(verbs, "plan", "plan.show_plan", "print and plot which checkpoint teaches when", config=True)
    sub.add_argument("--output", type=Path, help="PNG of the timeline; default: plots/plan.png in the run's folder")

    text = "a student of a published teacher in one command: verify, prepare, train, export"
    sub = _verb(verbs, "distil", _distil, text)
    sub.add_argument(
        "teacher", metavar="TEACHER", help="as teacher.trajectory names it: hf:REPO@step{step}, PATH/step_{step}, a run"
    )
    _steps(sub)
    sub.add_argument("--student", required=True, metavar="SIZE", help="tiny, mini, small, base, or LAYERSxHEADSxHIDDEN")
    sub.add_argument("--data", required=True, nargs="+", metavar="SOURCE", help="files, folders, globs, or hub:DATA_SET[:CONFIG]")
    sub.add_argument("--output", required=True, type=Path, metavar="OUT", help="folder of corpus, run and exported model")
    _trajectory_verbs(verbs)
    sub = _verb(verbs, "scheduler", _scheduler, "the service that knows every checkpoint and decides which one teaches when")
    words = "CONFIG | token ROLE | tokens | revoke NAME"
    sub.add_argument("words", nargs="*", metavar=words, help="a YAML file to serve with, or")
    sub.add_argument("--as", dest="name", metavar="NAME", help="of a new token; default: its role")
    sub.add_argument("--output", type=Path, help="a new file for a new token, which you alone can read; default: it is printed")

    schedule = _verb(verbs, "schedule", "schedule.show_schedule", "the schedules of the scheduler's runs")
    actions = schedule.add_subparsers(dest="action", required=True)
    sub = _verb(actions, "show", "schedule.show_schedule", "the newest version, and where the run is")
    sub.add_argument("run", metavar="RUN")
    sub = _verb(actions, "history", "schedule.schedule_history", "all versions and decisions")
    sub.add_argument("run", metavar="RUN")
    sub = _verb(actions, "set", _set_schedule, "replace it, as --schedule.policy=...; all ranks take it up at one step")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--at", type=int, metavar="STEP", help="student step that it begins at; default: as soon as can be")
    sub.add_argument("--note", default="", help="kept with it")
    sub.add_argument("--accept", action="store_true", help="though it names flagged checkpoints")

    text = "every setting with its type, default and meaning"
    sub = _verb(verbs, "settings", "settings.show_settings", text, overrides=False)
    sub.add_argument("section", nargs="?", help="of these alone, as in: megapd settings optimizer")
    sub = _verb(verbs, "doctor", _doctor, "look at machines, disk, data, teacher and run, and train nothing; exit code 0 or 2")
    sub.add_argument("source", type=Path, nargs="?", metavar="CONFIG|RUN", help="a YAML file, or a run's folder")
    sub = _verb(verbs, "branch", _branch, "another run that goes on from a run's checkpoint; settings that differ follow")
    sub.add_argument("folder", type=Path, metavar="RUN", help="a run's folder")
    sub.add_argument("--as", dest="name", required=True, metavar="NAME", help="of the new run, which lies beside it")
    sub.add_argument("--at", type=int, metavar="STEP", help="a step that has a checkpoint; default: the newest")

    _reading_verbs(verbs)
    _experiment_verbs(verbs)
    text = "sparse parity: progressive distillation against one-shot and labels"
    sub = _verb(verbs, "demo", "demo.run_demo", text, overrides=False)
    sub.add_argument("--folder", type=Path, default=Path("runs/demo"))
    return parser


def _experiment_verbs(verbs: Verbs) -> None:
    text = "a grid of runs: methods, seeds, settings; what is there already is not made again"
    sub = _verb(verbs, "sweep", "sweep.sweep_runs", text, overrides=False)
    sub.add_argument("path", type=Path, metavar="FILE", help="YAML of a sweep")
    sub.add_argument("--jobs", type=int, help="runs at once; default: as many as cores")
    sub = _verb(verbs, "reproduce", "sweep.reproduce", "an experiment of the paper, with its numbers beside", overrides=False)
    sub.add_argument("name", metavar="NAME", help="parity, grammar")
    sub.add_argument("--scale", default="small", metavar="SCALE", help="small: minutes on two cores; tune: learning rates for it")
    sub.add_argument("--jobs", type=int, help="runs at once; default: as many as cores")
    text = "what a sweep says: methods at their best settings, and their differences by pairs of seeds"
    sub = _verb(verbs, "table", "sweep.show_table", text, overrides=False)
    sub.add_argument("path", type=Path, metavar="FILE", help="YAML of a sweep that was made")
    sub.add_argument("--output", type=Path, help="PNG of the curves; default: NAME.png in the sweep's folder")


def _reading_verbs(verbs: Verbs) -> None:
    sub = _verb(verbs, "analyse", _analyse, "curriculum metrics of a teacher's checkpoints, kept with them")
    text = "a run's folder, a trajectory's, or a published model with its task as settings"
    sub.add_argument("source", metavar="RUN|TRAJECTORY", help=text)
    _steps(sub)
    text = "as context,monomials; default: all that are for the task and cost little"
    sub.add_argument("--metrics", dest="names", type=_words, default=(), metavar="NAME,NAME", help=text)
    sub.add_argument("--samples", type=int, help="held-out samples to measure on; default: each metric's own number")
    sub.add_argument("--l1", action="store_true", help="print total variations as the full L1 norm, as the paper does")
    sub.add_argument("--output", type=Path, help="PNG; the CSV goes beside; default: plots/curriculum.png in the run's folder")
    sub = _verb(verbs, "evaluate", _evaluate, "held-out loss and accuracy of a run's checkpoints")
    sub.add_argument("folder", type=Path, help="a run's folder: runs/NAME")
    sub = _verb(verbs, "export", _export, "a run's weights, with tokenizer and card, as a folder that transformers reads")
    sub.add_argument("folder", type=Path, metavar="RUN", help="a run's folder: runs/NAME")
    sub.add_argument("output", type=Path, metavar="OUT", help="a new folder")
    sub.add_argument("--step", type=int, help="of the trajectory, or with a resumable checkpoint; default: the newest")
    sub.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights; default: as they are")
    sub.add_argument("--shard-bytes", type=int, default=5 << 30, help="largest file of weights")
    sub = _verb(verbs, "plot", "plot.plot", "loss and accuracy against steps, several runs overlaid", overrides=False)
    sub.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="runs' folders")
    sub.add_argument("--output", type=Path, help="PNG; the CSV behind it goes beside; default: plots/curves.png of the first run")


def _trajectory_verbs(verbs: Verbs) -> None:
    trajectory = _verb(verbs, "trajectory", "checkpoints.list_checkpoints", "the checkpoints of a teacher run", overrides=False)
    actions = trajectory.add_subparsers(dest="action", required=True)
    text = "steps, digests, sizes and metrics of the checkpoints"
    sub = _verb(actions, "list", "checkpoints.list_checkpoints", text, overrides=False)
    sub.add_argument("source", metavar="FOLDER|hf:REPO", help="a trajectory's folder, that of its run, or a published model")
    _steps(sub)
    sub = _verb(actions, "verify", _verify, "hash every file again; exit code 1 if something is wrong")
    text = "a trajectory's folder, that of its run, a Hugging Face model (PATH/step_{step}), or a registered one's name"
    sub.add_argument("source", metavar="FOLDER|hf:REPO|NAME", help=text)
    _steps(sub)
    sub.add_argument("--accept", action="store_true", help="let what is flagged be scheduled all the same (registered ones)")
    text = "register checkpoints with the scheduler; again: what is new"
    sub = _verb(actions, "import", "trajectory.import_checkpoints", text)
    sub.add_argument("source", metavar="FOLDER|hf:REPO", help="a trajectory's folder, that of its run, or a Hugging Face model")
    _steps(sub)
    sub.add_argument("--as", dest="name", metavar="NAME", help="also point this name to it")
    text = "measure each checkpoint's loss on held-out samples"
    sub.add_argument("--probe", dest="probe_samples", type=int, default=0, metavar="SAMPLES", help=text)
    sub.add_argument("--watch", action="store_true", help="go on, until SIGTERM, with what a teacher that trains writes")
    sub = _verb(actions, "suggest", _suggest, "what schedule.policy transition would choose, and why")
    text = "a trajectory's or run's folder, or a student's YAML file"
    sub.add_argument("source", type=Path, metavar="FOLDER|CONFIG", help=text)
    sub.add_argument("--checkpoints", type=int, help="N, the last checkpoint included; default: the configuration's, or 2")
    sub.add_argument(
        "--metric", choices=("auto", "loss", "support", "degree_1", "m_robust_3"), help="default: the configuration's, or auto"
    )
    text = "measure each checkpoint's loss on held-out samples of the configuration's task; what was measured is kept"
    sub.add_argument("--probe", dest="probe_samples", type=int, default=0, metavar="SAMPLES", help=text)
    sub.add_argument("--output", type=Path, help="PNG of the curve; default: plots/transition.png in the run's folder")


def _steps(sub: argparse.ArgumentParser) -> None:
    text = "of a published model, those that there are, as 0,512,1000; default: the folders or branches that are found"
    sub.add_argument("--steps", type=_numbers, default=(), metavar="STEP,STEP", help=text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0,512,1000") from None


def _verb(
    verbs: Verbs, name: str, function: Function, text: str, *, config: bool = False, overrides: bool = True
) -> argparse.ArgumentParser:
    # No abbreviations: --every would otherwise be taken for another option than the setting it names.
    sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.set_defaults(function=function, takes_overrides=overrides)
    if config:
        sub.add_argument("config", type=Path, nargs="?", help="YAML file; settings follow as --section.key=value")
    return sub

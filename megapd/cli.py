"""The command line: one thin function a verb.

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
from pathlib import Path
from typing import TYPE_CHECKING

from megapd import __version__
from megapd.errors import RunFailed, UserError

if TYPE_CHECKING:
    from megapd.config import Config

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: list[str] | None = None) -> int:
    # The deepspeed launcher hands each rank its number on the command line as well as in LOCAL_RANK.
    argv = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank=")]
    # Settings are taken out first: argparse would take one with a space in it, such as --model={kind: gpt}, for the file's name.
    settings = [argument for argument in argv if _is_setting(argument)]
    arguments, unknown = _parser().parse_known_args([argument for argument in argv if not _is_setting(argument)])
    overrides = settings + unknown
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank a machine: what is missing may be missing on one of them
    try:
        if overrides and not arguments.takes_overrides:
            raise UserError(f"{overrides[0]!r}: `megapd {arguments.verb}` takes no settings")
        arguments.overrides = overrides
        return int(arguments.run(arguments))
    except UserError as error:
        if speaks:
            print(f"megapd: error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        if speaks:
            print(f"megapd: {error}", file=sys.stderr)
        return 1


# What a verb needs is imported when it runs: torch alone takes seconds, and each verb needs other things.


def train(arguments: argparse.Namespace) -> int:
    config = _load(arguments, arguments.config)
    if arguments.dry_run:
        from megapd.commands.dry_run import show_dry_run

        return show_dry_run(config)
    from megapd.commands.train import train_command

    return train_command(config)


def teacher(arguments: argparse.Namespace) -> int:
    from megapd.commands.teacher import serve_teacher

    own = [] if arguments.config is None else [str(arguments.config)]
    return serve_teacher(_load(arguments, arguments.config), ["teacher", *own, *arguments.overrides])


def record(arguments: argparse.Namespace) -> int:
    from megapd.commands.record import record_signals

    return record_signals(_load(arguments, arguments.config))


def prepare(arguments: argparse.Namespace) -> int:
    from megapd.commands.prepare import prepare_corpus

    return prepare_corpus(_load(arguments, arguments.config))


def plan(arguments: argparse.Namespace) -> int:
    from megapd.commands.plan import show_plan

    return show_plan(_load(arguments, arguments.config), arguments.output)


def trajectory_list(arguments: argparse.Namespace) -> int:
    from megapd.commands.checkpoints import list_checkpoints

    return list_checkpoints(arguments.folder)


def trajectory_verify(arguments: argparse.Namespace) -> int:
    if not arguments.folder.exists():
        from megapd.commands.trajectory import verify_checkpoints

        return verify_checkpoints(_load(arguments), str(arguments.folder), accept=arguments.accept)
    if arguments.accept:
        raise UserError(f"--accept: {arguments.folder} is a folder; give the name of a registered trajectory")
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]!r}: a folder's verification takes no settings; a registered trajectory's does")
    from megapd.commands.checkpoints import verify_folder

    return verify_folder(arguments.folder)


def trajectory_suggest(arguments: argparse.Namespace) -> int:
    from megapd.commands.checkpoints import suggest_transition

    chosen = arguments.checkpoints, arguments.metric, arguments.output
    return suggest_transition(arguments.source, arguments.overrides, *chosen)


def trajectory_import(arguments: argparse.Namespace) -> int:
    from megapd.commands.trajectory import import_checkpoints

    how = {"name": arguments.alias, "probe_samples": arguments.probe, "watch": arguments.watch}
    return import_checkpoints(_load(arguments), arguments.source, **how)


def scheduler(arguments: argparse.Namespace) -> int:
    from megapd.commands import scheduler as command

    words = arguments.words
    match words:
        case ["token", role]:
            return command.create_token(_load(arguments), role, arguments.alias)
        case ["tokens"]:
            return command.list_tokens(_load(arguments))
        case ["revoke", name]:
            return command.revoke_token(_load(arguments), name)
        case [] | [_]:
            return command.serve_scheduler(_load(arguments, Path(words[0]) if words else None))
    raise UserError(f"{' '.join(words)}: give a configuration's file, or token ROLE, tokens, revoke NAME")


def schedule_show(arguments: argparse.Namespace) -> int:
    from megapd.commands.schedule import schedule_history, show_schedule

    show = schedule_history if arguments.action == "history" else show_schedule
    return show(_load(arguments), arguments.run_name)


def schedule_set(arguments: argparse.Namespace) -> int:
    from megapd.commands.schedule import set_schedule
    from megapd.config import load, parse_overrides

    # The schedule alone, which in a run's configuration would ask for a teacher beside it.
    own = [o for o in arguments.overrides if o.startswith(("--schedule.", "--schedule="))]
    config = load(None, [o for o in arguments.overrides if o not in own])
    document = parse_overrides(own).get("schedule")
    if not isinstance(document, dict):
        raise UserError("schedule: give the new one as settings, --schedule.policy=one_shot --schedule.checkpoint=1200")
    return set_schedule(config, arguments.run_name, document, at=arguments.at, note=arguments.note, accept=arguments.accept)


def evaluate(arguments: argparse.Namespace) -> int:
    from megapd.commands.evaluate import evaluate_run

    return evaluate_run(_load(arguments, arguments.folder / "config.yaml"), arguments.folder)


def plot(arguments: argparse.Namespace) -> int:
    from megapd.commands.plot import plot as draw

    return draw(arguments.folders, arguments.output)


def demo(arguments: argparse.Namespace) -> int:
    from megapd.commands.demo import run_demo

    return run_demo(arguments.folder)


def _load(arguments: argparse.Namespace, file: Path | None = None) -> Config:
    from megapd.config import load

    return load(file, arguments.overrides)


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
    sub = _verb(verbs, "train", train, "train a teacher or a student", config=True)
    sub.add_argument("--dry-run", action="store_true", help="print what would run, and train nothing")
    _verb(verbs, "teacher", teacher, "serve a teacher's signals to students in other processes", config=True)
    _verb(verbs, "record", record, "fill teacher.cache with the signals of a whole schedule", config=True)
    _verb(verbs, "prepare", prepare, "build the corpus: tokenizer, packed blocks, held-out split", config=True)
    sub = _verb(verbs, "plan", plan, "print and plot which checkpoint teaches when", config=True)
    sub.add_argument("--output", type=Path, help="PNG of the timeline; default: plots/plan.png in the run's folder")
    _add_trajectory(verbs)
    sub = _verb(verbs, "scheduler", scheduler, "the service that knows every checkpoint and decides which one teaches when")
    words = "CONFIG | token ROLE | tokens | revoke NAME"
    sub.add_argument("words", nargs="*", metavar=words, help="a YAML file to serve with, or")
    sub.add_argument("--as", dest="alias", metavar="NAME", help="of a new token; default: its role")
    _add_schedule(verbs)
    sub = _verb(verbs, "evaluate", evaluate, "held-out loss and accuracy of a run's checkpoints")
    sub.add_argument("folder", type=Path, help="a run's folder: runs/NAME")
    sub = _verb(verbs, "plot", plot, "loss and accuracy against steps, several runs overlaid", overrides=False)
    sub.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="runs' folders")
    sub.add_argument("--output", type=Path, help="PNG; the CSV behind it goes beside; default: plots/curves.png of the first run")
    sub = _verb(verbs, "demo", demo, "sparse parity: progressive distillation against one-shot and labels", overrides=False)
    sub.add_argument("--folder", type=Path, default=Path("runs/demo"))
    return parser


def _verb(
    verbs: Verbs, name: str, function: object, text: str, *, config: bool = False, overrides: bool = True
) -> argparse.ArgumentParser:
    # No abbreviations: --every would otherwise be taken for another option than the setting it names.
    sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.set_defaults(run=function, takes_overrides=overrides)
    if config:
        sub.add_argument("config", type=Path, nargs="?", help="YAML file; settings follow as --section.key=value")
    return sub


def _add_trajectory(verbs: Verbs) -> None:
    trajectory = _verb(verbs, "trajectory", trajectory_list, "the checkpoints of a teacher run", overrides=False)
    actions = trajectory.add_subparsers(dest="action", required=True)
    sub = _verb(actions, "list", trajectory_list, "steps, digests, sizes and metrics of the checkpoints", overrides=False)
    sub.add_argument("folder", type=Path, help="a trajectory's folder, or that of a run that wrote one")
    sub = _verb(actions, "verify", trajectory_verify, "hash every file again; exit code 1 if something is wrong")
    sub.add_argument(
        "folder", type=Path, metavar="FOLDER|NAME", help="a trajectory's folder, that of its run, or a registered one's name"
    )
    sub.add_argument("--accept", action="store_true", help="let what is flagged be scheduled all the same (registered ones)")
    sub = _verb(actions, "import", trajectory_import, "register checkpoints with the scheduler; again: what is new")
    sub.add_argument("source", metavar="FOLDER|hf:REPO", help="a trajectory's folder, that of its run, or a Hugging Face model")
    sub.add_argument("--as", dest="alias", metavar="NAME", help="also point this name to it")
    sub.add_argument("--probe", type=int, default=0, metavar="SAMPLES", help="measure each checkpoint's loss on held-out samples")
    sub.add_argument("--watch", action="store_true", help="go on, until SIGTERM, with what a teacher that trains writes")
    sub = _verb(actions, "suggest", trajectory_suggest, "what schedule.policy transition would choose, and why")
    sub.add_argument(
        "source", type=Path, metavar="FOLDER|CONFIG", help="a trajectory's or run's folder, or a student's YAML file"
    )
    sub.add_argument("--checkpoints", type=int, help="N, the last checkpoint included; default: the configuration's, or 2")
    sub.add_argument("--metric", choices=("auto", "loss", "degree_1", "m_robust_3"), help="default: the configuration's, or auto")
    sub.add_argument("--output", type=Path, help="PNG of the curve; default: plots/transition.png in the run's folder")


def _add_schedule(verbs: Verbs) -> None:
    schedule = _verb(verbs, "schedule", schedule_show, "the schedules of the scheduler's runs")
    actions = schedule.add_subparsers(dest="action", required=True)
    sub = _verb(actions, "show", schedule_show, "the newest version, and where the run is")
    sub.add_argument("run_name", metavar="RUN")
    sub = _verb(actions, "history", schedule_show, "all versions and decisions")
    sub.add_argument("run_name", metavar="RUN")
    sub = _verb(actions, "set", schedule_set, "replace it, as --schedule.policy=...; all ranks take it up at one step")
    sub.add_argument("run_name", metavar="RUN")
    sub.add_argument("--at", type=int, metavar="STEP", help="student step that it begins at; default: as soon as can be")
    sub.add_argument("--note", default="", help="kept with it")
    sub.add_argument("--accept", action="store_true", help="though it names flagged checkpoints")

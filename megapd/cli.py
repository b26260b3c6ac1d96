"""The command line: one thin function a verb.

Exit codes: 0 done (or stopped on request, with a checkpoint); 1 the run diverged, a followed teacher wrote no checkpoint in
time, a served teacher was lost or another one than scheduled, a trajectory is not as it was written, or the demo did not
show its effect;
2 a mistake in the settings or files, told in one line.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from megapd import __version__
from megapd.config import Config, FollowConfig, load, parse_overrides
from megapd.errors import Diverged, TeacherLost, UserError
from megapd.signals.signal import SignalMismatch
from megapd.trajectory import CheckpointTimeout


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
    except (CheckpointTimeout, Diverged, SignalMismatch, TeacherLost) as error:
        if speaks:
            print(f"megapd: {error}", file=sys.stderr)
        return 1


def train(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    if arguments.dry_run:
        from megapd.commands.dry_run import dry_run

        Console(soft_wrap=True).print(escape(dry_run(config)), highlight=False)
        return 0
    from megapd.commands.train import train_command

    return train_command(config)


def teacher(arguments: argparse.Namespace) -> int:
    from megapd.commands.teacher import serve_teacher

    own = [] if arguments.config is None else [str(arguments.config)]
    return serve_teacher(_load(arguments), ["teacher", *own, *arguments.overrides])


def record(arguments: argparse.Namespace) -> int:
    from megapd.commands.record import record_signals

    summary = record_signals(_load(arguments))
    if summary is not None:
        print(summary, flush=True)
    return 0


def prepare(arguments: argparse.Namespace) -> int:
    from megapd.corpus import prepare as prepare_corpus

    print(prepare_corpus(_load(arguments), progress=sys.stderr.isatty()))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    from megapd.analysis.plots import plot_plan
    from megapd.analysis.timeline import describe_plan
    from megapd.schedule.resolve import resolve_plan
    from megapd.teacher.locate import open_trajectory

    config = _load(arguments)
    if config.teacher is None:
        raise UserError("teacher: this configuration has no teacher, so there is no schedule to plan")
    resolved = resolve_plan(config, open_trajectory(config))
    print(describe_plan(resolved))
    if arguments.output is not None or not isinstance(config.schedule, FollowConfig):
        output = arguments.output or config.folder / "plots" / "plan.png"
        plot_plan(resolved, output)
        print(output)
    return 0


def trajectory_list(arguments: argparse.Namespace) -> int:
    from megapd.analysis.suggest import describe_trajectory, open_folder

    print(describe_trajectory(open_folder(arguments.folder)))
    return 0


def trajectory_verify(arguments: argparse.Namespace) -> int:
    from megapd.analysis.suggest import open_folder

    if not arguments.folder.exists():
        from megapd.commands.trajectory import verify_checkpoints

        return verify_checkpoints(load(None, arguments.overrides), str(arguments.folder), accept=arguments.accept)
    if arguments.accept:
        raise UserError(f"--accept: {arguments.folder} is a folder; give the name of a registered trajectory")
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]!r}: a folder's verification takes no settings; a registered trajectory's does")
    trajectory = open_folder(arguments.folder)
    problems = trajectory.verify()
    for problem in problems:
        print(problem)
    print(f"{arguments.folder}: {len(trajectory.steps)} checkpoints, {len(problems)} problems")
    return 1 if problems else 0


def trajectory_suggest(arguments: argparse.Namespace) -> int:
    from megapd.analysis.suggest import describe_found, plot_found, suggest

    suggestion = suggest(arguments.source, arguments.overrides, arguments.checkpoints, arguments.metric)
    print(describe_found(suggestion.found))
    print(plot_found(suggestion.found, arguments.output or suggestion.output))
    return 0


def trajectory_import(arguments: argparse.Namespace) -> int:
    from megapd.commands.trajectory import import_checkpoints

    config = load(None, arguments.overrides)
    return import_checkpoints(
        config, arguments.source, name=arguments.alias, probe_samples=arguments.probe, watch=arguments.watch
    )


def scheduler(arguments: argparse.Namespace) -> int:
    from megapd.commands import scheduler as command

    words = arguments.words
    match words:
        case ["token", role]:
            return command.create_token(load(None, arguments.overrides), role, arguments.alias)
        case ["tokens"]:
            return command.list_tokens(load(None, arguments.overrides))
        case ["revoke", name]:
            return command.revoke_token(load(None, arguments.overrides), name)
        case [] | [_]:
            return command.serve_scheduler(load(Path(words[0]) if words else None, arguments.overrides))
    raise UserError(f"{' '.join(words)}: give a configuration's file, or token ROLE, tokens, revoke NAME")


def schedule_show(arguments: argparse.Namespace) -> int:
    from megapd.commands.schedule import show_schedule

    return show_schedule(load(None, arguments.overrides), arguments.run_name)


def schedule_history(arguments: argparse.Namespace) -> int:
    from megapd.commands.schedule import schedule_history as history

    return history(load(None, arguments.overrides), arguments.run_name)


def schedule_set(arguments: argparse.Namespace) -> int:
    from megapd.commands.schedule import set_schedule

    # The schedule alone, which in a run's configuration would ask for a teacher beside it.
    own = [o for o in arguments.overrides if o.startswith(("--schedule.", "--schedule="))]
    config = load(None, [o for o in arguments.overrides if o not in own])
    document = parse_overrides(own).get("schedule")
    if not isinstance(document, dict):
        raise UserError("schedule: give the new one as settings, --schedule.policy=one_shot --schedule.checkpoint=1200")
    return set_schedule(config, arguments.run_name, document, at=arguments.at, note=arguments.note, accept=arguments.accept)


def evaluate(arguments: argparse.Namespace) -> int:
    from megapd.commands.evaluate import evaluate_run

    config = load(arguments.folder / "config.yaml", arguments.overrides)
    for line in evaluate_run(config, arguments.folder):
        print(line, flush=True)
    return 0


def plot(arguments: argparse.Namespace) -> int:
    from megapd.analysis.plots import plot_runs

    output = arguments.output or arguments.folders[0] / "plots" / "curves.png"
    for written in plot_runs(arguments.folders, output):
        print(written)
    return 0


def demo(arguments: argparse.Namespace) -> int:
    from megapd.commands.demo import run_demo

    return run_demo(arguments.folder)


def _is_setting(argument: str) -> bool:
    match = re.match(r"--(\w+)[.=]", argument)
    return match is not None and match[1] in Config.model_fields


def _load(arguments: argparse.Namespace) -> Config:
    return load(arguments.config, arguments.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megapd", description="Progressive distillation pre-training on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"megapd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, function: object, text: str, *, config: bool = False, overrides: bool = True) -> argparse.ArgumentParser:
        # No abbreviations: --every would otherwise be taken for another option than the setting it names.
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=function, takes_overrides=overrides)
        if config:
            sub.add_argument("config", type=Path, nargs="?", help="YAML file; settings follow as --section.key=value")
        return sub

    sub = verb("train", train, "train a teacher or a student", config=True)
    sub.add_argument("--dry-run", action="store_true", help="print what would run, and train nothing")
    verb("teacher", teacher, "serve a teacher's signals to students in other processes", config=True)
    verb("record", record, "fill teacher.cache with the signals of a whole schedule", config=True)
    verb("prepare", prepare, "build the corpus: tokenizer, packed blocks, held-out split", config=True)
    sub = verb("plan", plan, "print and plot which checkpoint teaches when", config=True)
    sub.add_argument("--output", type=Path, help="PNG of the timeline; default: plots/plan.png in the run's folder")
    trajectory = verb("trajectory", trajectory_list, "the checkpoints of a teacher run", overrides=False)
    actions = trajectory.add_subparsers(dest="action", required=True)

    def action(name: str, function: object, text: str, *, overrides: bool = False) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=function, takes_overrides=overrides)
        return sub

    sub = action("list", trajectory_list, "steps, digests, sizes and metrics of the checkpoints")
    sub.add_argument("folder", type=Path, help="a trajectory's folder, or that of a run that wrote one")
    sub = action("verify", trajectory_verify, "hash every file again; exit code 1 if something is wrong", overrides=True)
    sub.add_argument(
        "folder", type=Path, metavar="FOLDER|NAME", help="a trajectory's folder, that of its run, or a registered one's name"
    )
    sub.add_argument("--accept", action="store_true", help="let what is flagged be scheduled all the same (registered ones)")
    sub = action("import", trajectory_import, "register checkpoints with the scheduler; again: what is new", overrides=True)
    sub.add_argument("source", metavar="FOLDER|hf:REPO", help="a trajectory's folder, that of its run, or a Hugging Face model")
    sub.add_argument("--as", dest="alias", metavar="NAME", help="also point this name to it")
    sub.add_argument("--probe", type=int, default=0, metavar="SAMPLES", help="measure each checkpoint's loss on held-out samples")
    sub.add_argument("--watch", action="store_true", help="go on, until SIGTERM, with what a teacher that trains writes")
    sub = action("suggest", trajectory_suggest, "what schedule.policy transition would choose, and why", overrides=True)
    sub.add_argument(
        "source", type=Path, metavar="FOLDER|CONFIG", help="a trajectory's or run's folder, or a student's YAML file"
    )
    sub.add_argument("--checkpoints", type=int, help="N, the last checkpoint included; default: the configuration's, or 2")
    sub.add_argument("--metric", choices=("auto", "loss", "degree_1", "m_robust_3"), help="default: the configuration's, or auto")
    sub.add_argument("--output", type=Path, help="PNG of the curve; default: plots/transition.png in the run's folder")
    sub = verb("scheduler", scheduler, "the service that knows every checkpoint and decides which one teaches when")
    sub.add_argument(
        "words", nargs="*", metavar="CONFIG | token ROLE | tokens | revoke NAME", help="a YAML file to serve with, or"
    )
    sub.add_argument("--as", dest="alias", metavar="NAME", help="of a new token; default: its role")
    schedule = verb("schedule", schedule_show, "the schedules of the scheduler's runs")
    actions = schedule.add_subparsers(dest="action", required=True)
    action("show", schedule_show, "the newest version, and where the run is", overrides=True).add_argument(
        "run_name", metavar="RUN"
    )
    sub = action("history", schedule_history, "all versions and decisions", overrides=True)
    sub.add_argument("run_name", metavar="RUN")
    sub = action("set", schedule_set, "replace it, as --schedule.policy=...; all ranks take it up at one step", overrides=True)
    sub.add_argument("run_name", metavar="RUN")
    sub.add_argument("--at", type=int, metavar="STEP", help="student step that it begins at; default: as soon as can be")
    sub.add_argument("--note", default="", help="kept with it")
    sub.add_argument("--accept", action="store_true", help="though it names flagged checkpoints")
    sub = verb("evaluate", evaluate, "held-out loss and accuracy of a run's checkpoints")
    sub.add_argument("folder", type=Path, help="a run's folder: runs/NAME")
    sub = verb("plot", plot, "loss and accuracy against steps, several runs overlaid", overrides=False)
    sub.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="runs' folders")
    sub.add_argument("--output", type=Path, help="PNG; the CSV behind it goes beside; default: plots/curves.png of the first run")
    sub = verb("demo", demo, "sparse parity: progressive distillation against one-shot and labels", overrides=False)
    sub.add_argument("--folder", type=Path, default=Path("runs/demo"))
    return parser

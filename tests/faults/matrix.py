"""Every file that a run writes, damaged in every way, and what its readers make of it.

A cell is (file, damage, reader). Right is: what the reader gives is bitwise what it gives without the damage; or it tells what is
lost or has changed, and gives the rest; or it refuses in one line, exit code 2, the folder as it was. Anything else is a fault.

`python -m tests.faults.matrix FILE` writes the table of docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import megapd
from megapd.analysis.plots import read_metrics
from megapd.cli import main
from megapd.config import load
from megapd.training import Callback
from tests.training import runs

STEPS, SAVED, KILLED, OLDER = 60, 30, 40, 16
ADAPTIVE = "{policy: adaptive, teachers: [15, 30, 45, 60], window: 2, min_dwell: 8, max_dwell: 12, lead: 5}"
DAMAGES = ("absent", "empty", "truncated", "zeros", "flipped bit", "older copy", "another run's")
READERS = ("resume", "evaluate", "plot")


class Killed(Exception):
    """In place of a kill: like one, it leaves the run without its last checkpoint."""


class Ending(Callback):
    """Keeps a copy of the folder as it is at step OLDER, and ends the run at step KILLED."""

    def __init__(self, run: Path, copy: Path) -> None:
        self._run, self._copy = run, copy

    def before_step(self, run: megapd.training.Run, step: int) -> None:
        if step == OLDER:
            shutil.copytree(self._run, self._copy)
        if step == KILLED:
            raise Killed


@dataclass(frozen=True)
class Runs:
    """A run that was killed, the same earlier and another; two that ended. `home` has a folder for each."""

    home: Path

    def arguments(self, runs_dir: Path, seed: int = 1) -> list[str]:
        own = [
            f"--runs_dir={runs_dir}",
            "--name=s",
            f"--seed={seed}",
            f"--teacher.trajectory={self.home / 'teacher' / 'trajectory'}",
        ]
        every = ["--evaluation.every=2", "--checkpoint.every=15", "--trajectory.every=20", "--checkpoint.keep=2"]
        return ["train", *runs.COMMON, *own, *every, "--model.width=8", f"--schedule={ADAPTIVE}", f"--training.steps={STEPS}"]

    def files(self, state: str) -> list[str]:
        folder = self.home / state / "s"
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def make_runs(home: Path) -> Runs:
    found = Runs(home)
    runs.teacher(home, steps=STEPS, every=15)
    for name, seed in (("killed", 1), ("other", 2)):
        with contextlib.suppress(Killed):
            megapd.train(
                load(None, found.arguments(home / name, seed)[1:]), [Ending(home / name / "s", home / f"{name} older" / "s")]
            )
    for name, seed in (("whole", 1), ("other whole", 2)):
        assert main(found.arguments(home / name, seed)) == 0
    return found


# ------------------------------------------------------------------------------------------------------------- a damage


def damaged(found: Runs, state: str, file: str, damage: str, folder: Path, seed: int) -> bool:
    """Make `folder`/s a copy of the run with that file damaged; False where the damage changes nothing."""
    shutil.copytree(found.home / state / "s", folder / "s")
    path = folder / "s" / file
    content = path.read_bytes()
    new = _damage(found, state, file, damage, content, random.Random(f"{file} {damage} {seed}"))
    if new is None:
        path.unlink()
    else:
        path.write_bytes(new)
    return new != content


def _damage(found: Runs, state: str, file: str, damage: str, content: bytes, rng: random.Random) -> bytes | None:
    if damage == "absent":
        return None
    if damage == "truncated":
        return content[: rng.randrange(len(content))] if content else content
    if damage == "zeros":
        return bytes(len(content))
    if damage == "flipped bit" and content:
        bits = bytearray(content)
        bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
        return bytes(bits)
    if damage == "older copy":
        older = re.sub("step_(60|45|30)/", "step_15/" if file.startswith("checkpoints") else "step_20/", file)
        places = [found.home / "killed older" / "s" / older, found.home / state / "s" / older]
        return next((place.read_bytes() for place in places if place.exists()), b"")
    if damage == "another run's":
        place = found.home / ("other" if state == "killed" else "other whole") / "s" / file
        return place.read_bytes() if place.exists() else b""
    return b""


# ------------------------------------------------------------------------------------------------------------- a reader


def given(found: Runs, reader: str, folder: Path) -> tuple[int, str, object]:
    """Exit code, what was told (errors and warnings, a line each), and what the reader gave."""
    arguments = {
        "resume": found.arguments(folder),
        "evaluate": ["evaluate", str(folder / "s")],
        "plot": ["plot", str(folder / "s")],
    }[reader]
    told, errors = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(told)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = main(arguments)
    finally:
        logging.getLogger().removeHandler(handler)
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("megapd: error")]
    return code, "\n".join([*told.getvalue().splitlines(), *lines]), _result(reader, folder / "s") if code == 0 else None


def _result(reader: str, run: Path) -> object:
    if reader == "evaluate":
        return json.loads((run / "evaluation.json").read_text())
    if reader == "plot":  # a last line without its end is being written just now
        assert {path.suffix for path in (run / "plots").iterdir()} == {".png", ".csv"}
        return [line for line in read_metrics(run) if line["kind"] != "run"]
    changes = json.loads((run / "changes.json").read_text())["changes"]
    digests = {step: json.loads((run / f"trajectory/step_{step}/meta.json").read_text())["digest"] for step in (40, 60)}
    lines = runs.metrics(run)
    return {"later": [line for line in lines if line["step"] > SAVED], "lines": lines, "changes": changes, "weights": digests}


def judge(reader: str, outcome: tuple[int, str, object], right: object, before: dict[str, bytes], after: dict[str, bytes]) -> str:
    """ "same", "told" or "refused", else what is wrong."""
    code, told, result = outcome
    errors = [line for line in told.splitlines() if line.startswith("megapd: error")]
    if code == 2:
        if len(errors) != 1:
            return f"FAULT: {len(errors)} lines: {told[-300:]}"
        return "refused" if before == after else f"FAULT: refused, and changed {sorted(_changed(before, after))}"
    if code != 0:
        return f"FAULT: exit code {code}: {told[-300:]}"
    if result == right:
        return "same"
    if reader == "plot":
        return "told" if "metrics.jsonl" in told else f"FAULT: silently different: {str(result)[:200]}"
    if reader == "resume" and isinstance(result, dict) and isinstance(right, dict):
        kept = all(result[key] == right[key] for key in ("later", "changes", "weights"))
        return "told" if kept and "metrics.jsonl" in told else f"FAULT: silently different: {told[-300:]}"
    return f"FAULT: silently different: {str(result)[:200]}"


def _changed(before: dict[str, bytes], after: dict[str, bytes]) -> Iterator[str]:
    return (name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def cell(found: Runs, file: str, damage: str, reader: str, rights: dict[str, object], seed: int = 0) -> str:
    """What comes of one cell; "-" where the damage changes nothing."""
    state = "killed" if reader == "resume" else "whole"
    with tempfile.TemporaryDirectory(dir=found.home) as name:
        folder = Path(name)
        if file not in found.files(state) or not damaged(found, state, file, damage, folder, seed):
            return "-"
        before = content(folder)
        try:
            outcome = given(found, reader, folder)
        except BaseException as error:
            return f"FAULT: {type(error).__name__}: {error}"
        return judge(reader, outcome, rights[reader], before, content(folder))


def rights(found: Runs) -> dict[str, object]:
    """What each reader gives of an undamaged run."""
    gave = {}
    for reader in READERS:
        with tempfile.TemporaryDirectory(dir=found.home) as name:
            shutil.copytree(found.home / ("killed" if reader == "resume" else "whole") / "s", Path(name) / "s")
            code, told, gave[reader] = given(found, reader, Path(name))
            assert (code, told) == (0, ""), told
    whole = _result("resume", found.home / "whole" / "s")
    assert gave["resume"] == whole
    return gave


def pattern(file: str) -> str:
    return re.sub(r"step_\d+", "step_N", file)


def main_table(output: Path) -> int:
    with tempfile.TemporaryDirectory() as home:
        found = make_runs(Path(home))
        right = rights(found)
        table: dict[tuple[str, str], dict[str, set[str]]] = {}
        for reader in READERS:
            for file in found.files("killed" if reader == "resume" else "whole"):
                for damage in DAMAGES:
                    what = cell(found, file, damage, reader, right)
                    if what.startswith("FAULT"):
                        print(f"{reader} {file} {damage}: {what}", file=sys.stderr, flush=True)
                    table.setdefault((reader, pattern(file)), {}).setdefault(damage, set()).add(what.split(":")[0])
    lines = [f"| reader | file | {' | '.join(DAMAGES)} |", f"|{'---|' * (len(DAMAGES) + 2)}"]
    for (reader, file), row in table.items():
        came = (", ".join(sorted(row[damage] - {"-"})) or "-" for damage in DAMAGES)
        lines.append(f"| {reader} | `{file}` | {' | '.join(came)} |")
    output.write_text("\n".join(lines) + "\n")
    return int(any("FAULT" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main_table(Path(sys.argv[1])))

"""A sweep: a file that stands for a grid of runs, each a cell with an address of its content.

    name: parity
    base: {task: {kind: parity, dimension: 40, degree: 4}, evaluation: {every: 50}}      # settings of all runs
    teacher: {model: {kind: mlp, width: 2000}, trajectory: {every: 150}, training: {steps: 3000}}
    student: {model: {kind: mlp, width: 30}, training: {steps: 3000}}
    methods:                                                                            # settings of students
      progressive: {schedule: {policy: matched, refresh: 150}}
      one_shot: {schedule: {policy: one_shot}}
      labels: {}                                                                        # no schedule: no teacher
    teacher_seeds: [0, 1]
    student_seeds: [10, 11, 12]
    grid: {optimizer.lr: [0.25, 0.5, 1.0]}                                              # of students

A cell's address is the digest of its resolved settings, of its teacher's address, and of megapd's versions: what is asked for
again, in another sweep too, is there already, and what changed is not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from megapd import __version__
from megapd.config import complete
from megapd.config.base import Section
from megapd.errors import UserError
from megapd.training.folder.numerics import VERSION

Tree = dict[str, Any]
Point = tuple[tuple[str, Any], ...]  # settings of the grid and their values

_NOT_CONTENT = ("name", "runs_dir", "telemetry", "checkpoint", "scheduler")  # what changes nothing that is learnt


class Sweep(Section):
    """What a file says; see the module."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: Path | None = Field(None, description="folder of its runs; default: runs/NAME")
    base: Tree = Field({})
    teacher: Tree | None = None
    student: Tree = Field({})
    methods: dict[str, Tree] = Field(min_length=1)
    teacher_seeds: tuple[int, ...] = Field((0,), min_length=1)
    student_seeds: tuple[int, ...] = Field((1,), min_length=1)
    grid: dict[str, list[Any]] = Field({})
    metric: Literal["accuracy", "loss"] = Field("accuracy", description="held out; what methods are compared by, at the end")
    threshold: float | None = Field(None, description="of the metric: steps to reach it are told too")
    title: str = Field("", description="of its report")
    paper: str = Field("", description="what the paper has in its place, for its report")
    finding: str = Field("", description="what the table says, in words, for its report")

    @model_validator(mode="after")
    def _teachers_for_all(self) -> Sweep:
        taught = [name for name, settings in self.methods.items() if "schedule" in settings or "schedule" in self.student]
        if taught and self.teacher is None:
            raise ValueError(f"teacher: method {taught[0]} has a schedule, so it needs a teacher's settings")
        if both := set(self.teacher_seeds) & set(self.student_seeds):
            raise ValueError(f"student_seeds: {min(both)} is a teacher's too, so it would see the same samples; choose another")
        if empty := [name for name, values in self.grid.items() if not values]:
            raise ValueError(f"grid.{empty[0]}: holds no value")
        return self

    @property
    def folder(self) -> Path:
        return self.output if self.output is not None else Path("runs") / self.name

    def points(self) -> list[Point]:
        """Of the grid, in its order."""
        return [tuple(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Cell:
    """One run.

    tree      its settings, whole; teacher.trajectory is where its teacher's will lie
    address   its folder's name, 16 hexadecimal digits
    teacher   address of the teacher, for students that have one
    method, teacher_seed, student_seed, point   of a student
    """

    tree: Tree = field(repr=False, compare=False, hash=False)
    address: str
    teacher: str | None = None
    method: str = ""
    teacher_seed: int = 0
    student_seed: int = 0
    point: Point = ()

    @property
    def steps(self) -> int:
        return int(self.tree["training"]["steps"])


def load_sweep(path: Path) -> Sweep:
    """Raises UserError, one line that names the setting."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Sweep(**tree)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path}: no YAML of a sweep: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        raise UserError(f"{path}: {where + ': ' if where else ''}{found['msg'].removeprefix('Value error, ')}") from error


def teachers_of(sweep: Sweep) -> dict[int, Cell]:
    """By seed; none where the sweep has no teacher."""
    if sweep.teacher is None:
        return {}
    return {seed: _cell(sweep, [sweep.base, sweep.teacher, {"seed": seed}], "teacher") for seed in sweep.teacher_seeds}


def students_of(sweep: Sweep) -> Iterator[Cell]:
    """Method by method. Cells that no teacher teaches are the same for all of them, and have one address."""
    teachers = teachers_of(sweep)
    for method, settings in sweep.methods.items():
        for point, teacher_seed, seed in itertools.product(sweep.points(), sweep.teacher_seeds, sweep.student_seeds):
            trees = [sweep.base, sweep.student, settings, _nested(point), {"seed": seed}]
            teacher = teachers.get(teacher_seed) if "schedule" in _merged(trees) else None
            if teacher is not None:
                trees.insert(0, {"teacher": {"trajectory": str(sweep.folder / teacher.address / "trajectory")}})
            names = {"method": method, "teacher_seed": teacher_seed, "student_seed": seed, "point": point}
            yield _cell(sweep, trees, f"methods.{method}", None if teacher is None else teacher.address, **names)


def _cell(sweep: Sweep, trees: list[Tree], where: str, teacher: str | None = None, **names: Any) -> Cell:
    try:
        tree, unknown = complete(_merged(trees))
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('settings on record: ')}") from error
    if unknown:
        raise UserError(f"{where}: unknown setting {unknown[0]}; `megapd settings` lists them")
    content = {key: value for key, value in tree.items() if key not in _NOT_CONTENT}
    if teacher is not None:
        content["teacher"] = {**content["teacher"], "trajectory": teacher}
    known = json.dumps({"settings": content, "megapd": __version__, "numerics": VERSION}, sort_keys=True)
    address = hashlib.sha256(known.encode()).hexdigest()[:16]
    own = {"name": address, "runs_dir": str(sweep.folder)}
    return Cell({**tree, **own}, address, teacher, **names)


def _nested(point: Point) -> Tree:
    tree: Tree = {}
    for name, value in point:
        *sections, leaf = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = value
    return tree


def _merged(trees: list[Tree]) -> Tree:
    """The later over the earlier, section by section; a section of another kind replaces."""
    whole: Tree = {}
    for tree in trees:
        _lay(whole, tree)
    return whole


def _lay(under: Tree, over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        there = under.get(key)
        if isinstance(value, Mapping) and isinstance(there, dict) and not _other_kind(there, value):
            _lay(there, value)
        else:
            under[key] = deepcopy(value)


def _other_kind(there: Tree, value: Mapping[str, Any]) -> bool:
    return any(tag in value and tag in there and value[tag] != there[tag] for tag in ("kind", "policy"))

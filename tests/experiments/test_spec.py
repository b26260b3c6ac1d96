"""Sweeps as files: cells, their addresses, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megapd.errors import UserError
from megapd.experiments import load_sweep
from megapd.experiments.spec import students_of, teachers_of

SWEEP = {
    "name": "tiny",
    "base": {"task": {"kind": "parity", "dimension": 10, "degree": 2}, "training": {"steps": 40}},
    "teacher": {"model": {"kind": "mlp", "width": 64}, "trajectory": {"every": 10}},
    "student": {"model": {"kind": "mlp", "width": 8}},
    "methods": {"progressive": {"schedule": {"policy": "matched", "refresh": 10}}, "labels": {}},
    "teacher_seeds": [0, 1],
    "student_seeds": [10, 11, 12],
    "grid": {"optimizer.lr": [0.1, 0.2], "model.width": [8, 16]},
}


def sweep(folder, **changes):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
    return load_sweep(path)


def test_cells(tmp_path):
    made = sweep(tmp_path)
    teachers, students = teachers_of(made), list(students_of(made))
    assert len(teachers) == len({cell.address for cell in teachers.values()}) == 2
    assert len(students) == 2 * 4 * 2 * 3
    # What no teacher teaches is the same run for both.
    assert len({cell.address for cell in students}) == 4 * 2 * 3 + 4 * 3
    one = next(cell for cell in students if cell.method == "progressive" and dict(cell.point)["model.width"] == 16)
    assert one.tree["model"] == {"kind": "mlp", "width": 16, "initial": None}
    assert one.tree["optimizer"]["lr"] == 0.1
    assert one.tree["seed"] == one.student_seed == 10
    assert one.teacher == teachers[0].address
    assert one.tree["teacher"]["trajectory"] == f"runs/tiny/{one.teacher}/trajectory"
    assert one.tree["name"] == one.address
    assert one.steps == 40
    labels = next(cell for cell in students if cell.method == "labels")
    assert (labels.teacher, labels.tree["teacher"], labels.tree["schedule"]) == (None, None, None)


def addresses(made):
    return {(c.method, c.teacher_seed, c.student_seed, c.point): c.address for c in students_of(made)}


def test_an_address_is_of_the_content(tmp_path):
    own = addresses(sweep(tmp_path))
    assert addresses(sweep(tmp_path, name="other", output=str(tmp_path / "elsewhere"))) == own
    telling = {**SWEEP["base"], "telemetry": {"every": 7}}
    assert addresses(sweep(tmp_path, base=telling)) == own
    spelt = {**SWEEP["base"], "seed": 3, "optimizer": {"kind": "adamw"}}  # a default, and what the seeds replace
    assert addresses(sweep(tmp_path, base=spelt)) == own
    fewer = addresses(sweep(tmp_path, student_seeds=[12]))
    assert fewer.items() <= own.items()


@pytest.mark.parametrize(
    "changes",
    [
        {"base": {**SWEEP["base"], "training": {"steps": 41}}},
        {"student": {**SWEEP["student"], "loss": {"alpha": 0.5}}},
        {"base": {**SWEEP["base"], "task": {"kind": "parity", "dimension": 11, "degree": 2}}},
    ],
)
def test_another_content_has_another_address(tmp_path, changes):
    own, other = addresses(sweep(tmp_path)), addresses(sweep(tmp_path, **changes))
    assert not set(own.values()) & set(other.values())


def test_another_teacher_makes_other_students(tmp_path):
    own = addresses(sweep(tmp_path))
    other = addresses(sweep(tmp_path, teacher={**SWEEP["teacher"], "model": {"kind": "mlp", "width": 65}}))
    assert {key for key in own if own[key] == other[key]} == {key for key in own if key[0] == "labels"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": {}}, "methods: Dictionary should have at least 1 item"),
        ({"teacher": None}, "teacher: method progressive has a schedule"),
        ({"student_seeds": [1, 2]}, "student_seeds: 1 is a teacher's too"),
        ({"grid": {"optimizer.lr": []}}, "grid.optimizer.lr: holds no value"),
        ({"metrics": "loss"}, "metrics: Extra inputs are not permitted"),
    ],
)
def test_a_file_that_says_no_sweep(tmp_path, changes, told):
    with pytest.raises(UserError) as caught:
        sweep(tmp_path, **changes)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"grid": {"optimizer.rate": [1.0]}}, "methods.progressive: unknown setting optimizer.rate"),
        ({"grid": {"optimizer.lr": [-1.0]}}, "methods.progressive: optimizer.lr"),
        ({"methods": {"none": {"schedule": {"policy": "nothing"}}}}, "methods.none: schedule.policy: unknown schedule policy"),
    ],
)
def test_settings_that_are_none(tmp_path, changes, told):
    with pytest.raises(UserError) as caught:
        list(students_of(sweep(tmp_path, **changes)))
    assert told in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_sweep(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="no YAML of a sweep"):
        load_sweep(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", sorted(Path("configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_sweeps(path):
    made = load_sweep(path)
    cells = [*teachers_of(made).values(), *students_of(made)]
    assert len({cell.address for cell in cells}) > 3
    assert made.threshold is not None
    for cell in cells:
        build = cell.tree["schedule"]
        assert build is None or cell.teacher is not None

"""`megapd analyse`: runs, trajectories without their run, published models; the table, the picture, what is refused."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from megapd.cli import main
from tests.training import runs

GRAMMAR = "--task={kind: grammar, root: 12, sentences: 64, heldout_samples: 64}"
MODEL = "--model={kind: bert, layers: 1, heads: 2, hidden: 16}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyse")
    settings = ["--training={steps: 6, global_batch: 8}", "--trajectory.every=3", "--evaluation.samples=8"]
    quiet = "--telemetry={wandb: disabled, progress: false}"
    assert main(["train", f"--runs_dir={folder}", "--name=grammar", GRAMMAR, MODEL, *settings, quiet]) == 0
    runs.teacher(folder, 10, 5)
    return folder


def numbers(path):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {(int(row["step"]), row["name"]): float(row["value"]) for row in rows}


def test_a_run(folder, capsys):
    assert main(["analyse", str(folder / "grammar"), "--samples", "8"]) == 0
    told = capsys.readouterr().out
    assert "context: samples 8" in told
    assert "TV with its 1/2" in told
    assert "m_robust_3" in told
    assert "_sd" not in told.partition("step")[2]
    found = numbers(folder / "grammar/plots/curriculum.csv")
    assert {step for step, _ in found} == {3, 6}
    assert (folder / "grammar/plots/curriculum.png").stat().st_size > 10_000
    meta = json.loads((folder / "grammar/trajectory/step_3/measured.json").read_text())
    assert set(meta["measured"]) == {"boundaries", "context"}
    assert main(["analyse", str(folder / "grammar/trajectory"), "--samples", "8", "--metrics", "context", "--l1"]) == 0
    doubled = numbers(folder / "grammar/plots/curriculum.csv")
    assert doubled[3, "m_robust_3"] == 2 * found[3, "m_robust_3"]
    assert main(["trajectory", "verify", str(folder / "grammar")]) == 0


def test_numbers_reach_the_schedule(folder, tmp_path, capsys):
    assert main(["analyse", str(folder / "teacher"), "--samples", "200", "--output", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.csv").is_file()
    assert main(["trajectory", "suggest", str(folder / "teacher"), "--metric", "support"]) == 2
    told = capsys.readouterr().err
    assert "2 of its checkpoints carry a value of curriculum/support" in told or "curriculum/support has no peak" in told


def test_a_trajectory_without_its_run_needs_the_task(folder, tmp_path, capsys):
    shutil.copytree(folder / "grammar/trajectory", tmp_path / "trajectory")
    assert main(["analyse", str(tmp_path / "trajectory"), "--samples", "8"]) == 2
    assert "give the task as --task.kind" in capsys.readouterr().err
    more = ["--samples", "8", "--output", str(tmp_path / "there.png")]
    assert main(["analyse", str(tmp_path / "trajectory"), GRAMMAR, MODEL, *more]) == 0
    assert numbers(tmp_path / "there.csv") == pytest.approx(_run(folder))


def _run(folder):
    assert main(["analyse", str(folder / "grammar"), "--samples", "8"]) == 0
    return numbers(folder / "grammar/plots/curriculum.csv")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["grammar", "--metrics", "monomials"], "--metrics: monomials: the task lacks a hidden support"),
        (["grammar", "--metrics", "conText"], "unknown metric 'conText'; the nearest is 'context'"),
        (["grammar", "--samples", "65"], "the task holds out 64"),
        (["grammar", GRAMMAR.replace("12", "11")], "another vocabulary"),
        (["nothing"], "no folder"),
    ],
)
def test_what_is_refused(folder, capsys, arguments, told):
    assert main(["analyse", str(folder / arguments[0]), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "\n" not in error.strip().rpartition("megapd: error")[2]

"""Sweeps made: what is there is left alone, a cell is the run that `megapd train` makes, what goes wrong is told; the table."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from megapd.cli import main
from megapd.errors import RunFailed, UserError
from megapd.experiments import load_sweep
from megapd.experiments.results import choose, table
from megapd.experiments.runner import DONE, run_sweep
from megapd.experiments.spec import students_of, teachers_of
from tests.training.runs import metrics

pytestmark = pytest.mark.slow

SWEEP = {
    "name": "tiny",
    "base": {
        "task": {"kind": "parity", "dimension": 10, "degree": 2},
        "optimizer": {"kind": "adamw", "lr": 0.01},
        "training": {"steps": 20, "global_batch": 32},
        "telemetry": {"wandb": "disabled", "progress": False, "every": 10},
        "evaluation": {"every": 5, "samples": 64},
    },
    "teacher": {"model": {"kind": "mlp", "width": 64}, "trajectory": {"every": 5}},
    "student": {"model": {"kind": "mlp", "width": 8}},
    "methods": {"progressive": {"schedule": {"policy": "matched", "refresh": 5}}, "labels": {}},
    "teacher_seeds": [0, 1],
    "student_seeds": [10, 11],
    "grid": {"optimizer.lr": [0.003, 0.03]},
    "threshold": 0.6,
}


def write(folder, **changes):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "output": str(folder / "out"), **changes}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    path = write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAPD_TRAINING__STEPS", "3")  # of other runs: a sweep's cells are what its file says
        assert main(["sweep", str(path), "--jobs", "2"]) == 0
    return path


def test_every_cell_is_there_once(made):
    sweep = load_sweep(made)
    cells = [*teachers_of(sweep).values(), *students_of(sweep)]
    folders = {folder.name for folder in sweep.folder.iterdir() if folder.is_dir()}
    assert folders == {cell.address for cell in cells}
    assert len(folders) == 2 + 8 + 4
    for cell in cells:
        assert json.loads((sweep.folder / cell.address / DONE).read_text())["error"] == ""
        assert metrics(sweep.folder / cell.address)[-1]["step"] == 20


def test_what_is_there_is_not_made_again(made, capsys):
    sweep = load_sweep(made)
    before = {path: path.stat().st_mtime_ns for path in sweep.folder.rglob("metrics.jsonl")}
    run_sweep(sweep, 2)
    more = load_sweep(write(made.parent, student_seeds=[10, 11, 12]))
    run_sweep(more, 2)
    now = {path: path.stat().st_mtime_ns for path in sweep.folder.rglob("metrics.jsonl")}
    assert before.items() <= now.items()
    assert len(now) - len(before) == 2 * 2 + 2
    assert main(["table", str(write(made.parent))]) == 0


def test_a_cell_is_the_run_that_train_makes(made, tmp_path):
    """Bitwise, in a process of its own or as the third run of a worker."""
    sweep = load_sweep(write(made.parent))
    for cell in list(students_of(sweep))[::5]:
        config = tmp_path / f"{cell.address}.yaml"
        config.write_text(yaml.safe_dump({**cell.tree, "runs_dir": str(tmp_path)}))
        assert main(["train", str(config)]) == 0
        assert metrics(tmp_path / cell.address) == metrics(sweep.folder / cell.address)


def test_the_table(made, capsys):
    sweep = load_sweep(write(made.parent))
    assert main(["table", str(made)]) == 0
    told = capsys.readouterr().out
    chosen = {each.method: each for each in choose(sweep)}
    for method, each in chosen.items():
        assert len(each.results) == 4
        assert each.edge == "optimizer.lr"  # of two values both are
        assert f"note: {method}: its best optimizer.lr lies at the edge of the grid" in told
    assert "progressive - labels:" in told
    assert "95 % between" in told
    assert "at 0.6 first in" in told
    with (sweep.folder / "tiny.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {row["optimizer.lr"] for row in rows} == {"0.003", "0.03"}
    best = chosen["labels"]
    addresses = {result.cell.address: result.final for result in best.results}
    assert {row["address"]: float(row["accuracy"]) for row in rows if row["address"] in addresses} == addresses
    last = metrics(sweep.folder / best.results[0].cell.address)[-1]
    assert best.results[0].final == last["accuracy"]
    assert best.results[0].reached(0.0, rising=True) == 5
    assert best.results[0].reached(1.1, rising=True) is None
    assert (sweep.folder / "tiny.png").stat().st_size > 10_000


def test_a_run_that_diverges_is_on_record_and_no_pair(tmp_path):
    grid = {"optimizer.lr": [0.01, 1e30]}
    path = write(tmp_path, grid=grid, methods={"labels": {}, "others": {"loss": {"z_loss": 0.1}}}, teacher=None)
    sweep = load_sweep(path)
    run_sweep(sweep, 2)
    told = table(sweep)
    assert "0.01" in told
    failed = [cell for cell in students_of(sweep) if json.loads((sweep.folder / cell.address / DONE).read_text())["error"]]
    assert {cell.point[0][1] for cell in failed} <= {1e30}


def test_settings_that_a_run_refuses_end_the_sweep(tmp_path):
    base = {**SWEEP["base"], "training": {"steps": 20, "global_batch": 32, "deepspeed": str(tmp_path / "none.json")}}
    with pytest.raises(UserError, match=r"teacher \w{6}: training\.deepspeed: .*no such file"):
        run_sweep(load_sweep(write(tmp_path, base=base)), 1)
    assert not list((tmp_path / "out").rglob(DONE))
    with pytest.raises(UserError, match="has not been made; `megapd sweep` goes on"):
        table(load_sweep(write(tmp_path)))


def test_a_sweep_that_was_killed_goes_on(tmp_path):
    """Its workers with it, at any moment; what they had made is not made again."""
    base = {**SWEEP["base"], "training": {"steps": 400, "global_batch": 32}, "checkpoint": {"every": 50}}
    path = write(tmp_path, base=base, methods={"labels": {}}, teacher=None, grid={})
    sweep = load_sweep(path)

    def kill():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if list(sweep.folder.rglob("checkpoints/step_50")):
                break
            time.sleep(0.02)
        for entry in os.listdir("/proc"):
            if entry.isdigit() and _worker_of(int(entry), os.getpid()):
                os.kill(int(entry), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RunFailed, match="its process ended with exit code -9"):
        run_sweep(sweep, 1)
    killer.join()
    run_sweep(sweep, 1)
    for cell in students_of(sweep):
        lines = metrics(sweep.folder / cell.address)
        assert lines[-1]["step"] == 400
        assert json.loads((sweep.folder / cell.address / DONE).read_text())["error"] == ""


def _worker_of(pid, parent):
    try:
        with open(f"/proc/{pid}/stat") as file:
            owner = int(file.read().rpartition(")")[2].split()[1])
        with open(f"/proc/{pid}/cmdline") as file:
            return owner == parent and "megapd.experiments.worker" in file.read()
    except OSError:
        return False


def test_a_shipped_experiment_is_reproduced(tmp_path, monkeypatch, capsys):
    """What the verb does beside the sweep: find it, and report."""
    (tmp_path / "sweeps").mkdir()
    text = {**SWEEP, "output": str(tmp_path / "out"), "title": "Tiny", "paper": "nothing like it", "grid": {}}
    (tmp_path / "sweeps" / "tiny_small.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    monkeypatch.setattr("megapd.commands.sweep.resources.files", lambda package: tmp_path)
    assert main(["reproduce", "tiny"]) == 0
    told = (tmp_path / "out" / "tiny.md").read_text()
    assert told.startswith("## Tiny")
    assert "`megapd reproduce tiny --scale small` (8 runs" in told
    assert "teacher seeds 0, 1, student seeds 10, 11" in told
    assert "The paper: nothing like it" in told
    assert table(load_sweep(tmp_path / "sweeps" / "tiny_small.yaml")) in told
    capsys.readouterr()
    assert main(["reproduce", "tiny", "--scale", "paper"]) == 2
    assert "there is no tiny_paper; there are tiny_small" in capsys.readouterr().err


def test_the_command_ends_its_processes(tmp_path):
    """SIGTERM, as a scheduler sends it, also where SIGINT is ignored, as under nohup."""
    base = {**SWEEP["base"], "training": {"steps": 100_000, "global_batch": 32}}
    path = write(tmp_path, base=base, methods={"labels": {}}, teacher=None, grid={})
    command = [sys.executable, "-m", "megapd", "sweep", str(path), "--jobs", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    deadline = time.monotonic() + 90
    while len(list((tmp_path / "out").rglob("metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    workers = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _worker_of(int(entry), process.pid)]
    assert len(workers) == 2
    process.terminate()
    assert process.wait(60) != 0
    assert not [pid for pid in workers if _alive(pid)]
    assert len(list((tmp_path / "out").rglob("checkpoints/step_*"))) == 2


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

"""What long tasks and runs tell on their way."""

import importlib
import io
import json

import pytest

from megapd.cli import main
from megapd.commands.progress import Progress, duration, scaled
from megapd.teacher.server import Metrics

RUN = [
    *("--task.kind=parity", "--task.dimension=10", "--task.degree=2", "--model.kind=mlp", "--training.global_batch=16"),
    *("--telemetry.every=2", "--telemetry.wandb=disabled", "--evaluation.samples=16", "--checkpoint.every=4", "--name=r"),
]


def told(capfd):
    """Lines on stdout, without what DeepSpeed says there when it is imported."""
    return [line for line in capfd.readouterr().out.splitlines() if "real_accelerator" not in line]


def test_a_line_each_ten_seconds_with_what_is_left():
    times, stream = iter([0.0, 4.0, 12.0, 15.0, 22.0, 70.0]), io.StringIO()
    progress = Progress("prepare", 1300, "documents", done=300, stream=stream, clock=lambda: next(times))
    for done in (400, 600, 700, 800):
        progress.update(done, "5 files")
    progress.close("all there")
    assert stream.getvalue().splitlines() == [
        "prepare: 600 of 1,300 documents, 5 files, ETA 28 s",
        "prepare: 800 of 1,300 documents, 5 files, ETA 22 s",
        "prepare: all there (1 min 10 s)",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.83, "0.8 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (7500, "2 h 5 min"), (273600, "3 d 4 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(412, "412"), (999.9, "1.00k"), (12345, "12.3k"), (123e6, "123M"), (9.999e9, "10.0G")]
)
def test_three_digits(number, text):
    assert scaled(number) == text


def test_a_run_off_a_terminal_tells_its_start_its_way_and_its_end(tmp_path, capfd):
    arguments = ["train", *RUN, f"--runs_dir={tmp_path}"]
    assert main([*arguments, "--training.steps=6"]) == 0
    said = told(capfd)
    first = next(number for number, line in enumerate(said) if line.startswith("step "))
    assert 6 <= first <= 10
    assert said[0].endswith(str(tmp_path / "r"))
    steps = [line.split()[1] for line in said if line.startswith("step ") and "loss" in line and "/" in line.split()[1]]
    assert steps == ["2/6", "4/6", "6/6"]
    assert sum("samples/s  ETA" in line for line in said) == 2
    assert any(line.startswith("step 6: held-out loss") for line in said)
    assert f"step 4: saved {tmp_path / 'r' / 'checkpoints' / 'step_4'}" in said
    assert said[-4].startswith("finished: 6 of 6 steps, 6 of them now, in ")
    assert "held-out accuracy" in said[-3]
    assert said[-1] == f"checkpoint: {tmp_path / 'r' / 'checkpoints' / 'step_6'}"
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert all(line["data_wait"] > 0 and line["teacher_wait"] >= 0 for line in train)
    assert sum(line["data_wait"] + line["teacher_wait"] for line in train) <= train[-1]["seconds"]

    assert main([*arguments, "--training.steps=6"]) == 0
    said = told(capfd)
    assert said[-1] == f"{tmp_path / 'r'} is complete: 6 of 6 steps"

    assert main([*arguments, "--training.steps=8", "--telemetry.progress=false", "--telemetry.every=4"]) == 0
    said = told(capfd)
    assert f"resuming at step 6 of 8 from {tmp_path / 'r' / 'checkpoints' / 'step_6'}" in said
    assert any(line.startswith("changed since the last start: ") and "training.steps 6 -> 8" in line for line in said)
    assert not any(line.startswith("step ") for line in said)
    assert said[-4].startswith("finished: 8 of 8 steps, 2 of them now, in ")


def test_a_teacher_tells_what_it_answered(monkeypatch):
    serving = importlib.import_module("megapd.teacher.server.serve")  # the room's face has a function of that name
    monkeypatch.setattr(serving, "TELL_SECONDS", 0.01)
    metrics, heard = Metrics(), []
    end = serving._telling(metrics, heard.append)
    metrics.tokens.inc(128)
    end()
    assert heard[-1] == 128

"""Bad input: one line that names the cause, exit code 2, no traceback, nothing half-written. And the verbs on small runs."""

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from megapd import cli
from megapd.cli import main
from megapd.registry import callbacks
from megapd.training import Callback
from tests.training import runs


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    return runs.teacher(tmp_path_factory.mktemp("teacher"))


def refused(capsys, folder, arguments, *named):
    """The command exits with 2, tells one line with all of `named`, and leaves the folder as it was."""
    before = tree(folder)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("megapd: error: ")
    assert "\n" not in error
    for name in named:
        assert str(name) in error, error
    assert tree(folder) == before


def tree(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*") if p.is_file())


def leaves(parser):
    """The parsers that a command line can end in."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for group in groups for sub in group.choices.values() for leaf in leaves(sub)] or [parser]


def test_every_verb_fits_its_function():
    verbs = leaves(cli._parser())
    assert len(verbs) == 26
    for verb in verbs:
        options = {action.dest for action in verb._actions} - {"help"}
        function = verb.get_default("function")
        if isinstance(function, str):
            function = cli.command(function)
            options -= {"config"}
        given = [None] if verb.get_default("takes_overrides") else []
        inspect.signature(function).bind(*given, **dict.fromkeys(options))


@pytest.mark.parametrize("verb", [["train"], ["train", "--dry-run"], ["teacher"], ["record"], ["evaluate", "."], ["scheduler"]])
def test_a_mistake_is_told_before_what_runs_is_imported(monkeypatch, verb):
    monkeypatch.setattr(cli, "command", lambda path: pytest.fail(f"{path} was imported"))
    assert main([*verb, "--nothing=1"]) == 2


def test_no_trajectory(tmp_path, capsys):
    refused(capsys, tmp_path, runs.student(tmp_path, "s", tmp_path / "nowhere"), "teacher.trajectory", "nowhere")


@pytest.mark.slow
def test_a_missing_checkpoint(trajectory, tmp_path, capsys):
    copy = shutil.copytree(trajectory, tmp_path / "copy")
    shutil.rmtree(copy / "step_15")
    refused(capsys, tmp_path, runs.student(tmp_path, "s", copy), "15", "schedule.refresh")


def test_a_schedule_beyond_the_trajectory(trajectory, tmp_path, capsys):
    arguments = runs.student(
        tmp_path, "s", trajectory, "--schedule.policy=equal", "--schedule.checkpoints=9", "--schedule.steps=3"
    )
    arguments = [a for a in arguments if a not in ("--schedule.policy=matched", "--schedule.refresh=5")]
    refused(capsys, tmp_path, arguments, "schedule.checkpoints", "9")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_teacher(trajectory, tmp_path, capsys, damage):
    copy = shutil.copytree(trajectory, tmp_path / "copy")
    (shard,) = (copy / "step_5").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    if damage == "truncate":
        shard.write_bytes(content[:-10])
    elif damage == "flip":
        content[-1] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    refused(capsys, tmp_path, runs.student(tmp_path, "s", copy), shard)


def test_a_teacher_of_another_vocabulary(trajectory, tmp_path, capsys):
    arguments = runs.student(tmp_path, "s", trajectory, "--task.seed=1")
    refused(capsys, tmp_path, arguments, "teacher.trajectory", "tokenizer")


def test_an_unknown_key(trajectory, tmp_path, capsys):
    refused(capsys, tmp_path, runs.student(tmp_path, "s", trajectory, "--training.stpes=3"), "training.stpes: unknown")


def test_no_sources(tmp_path, capsys):
    refused(capsys, tmp_path, ["prepare", f"--corpus.output={tmp_path / 'c'}"], "corpus.sources")


def test_an_empty_corpus(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    sources = f"--corpus.sources=[{{path: {tmp_path / 'empty.txt'}}}]"
    refused(capsys, tmp_path, ["prepare", f"--corpus.output={tmp_path / 'c'}", sources], "empty")


def test_no_prepared_corpus(tmp_path, capsys):
    arguments = ["train", "--task.kind=text", "--model.kind=bert", f"--runs_dir={tmp_path}", f"--task.corpus={tmp_path / 'none'}"]
    refused(capsys, tmp_path, arguments, "megapd prepare", "none")


def test_a_batch_that_does_not_divide(trajectory, tmp_path, capsys):
    refused(capsys, tmp_path, runs.student(tmp_path, "s", trajectory, "--training.micro_batch=5"), "training.micro_batch")


def test_settings_where_none_are_taken(tmp_path, capsys):
    refused(capsys, tmp_path, ["plot", str(tmp_path), "--training.steps=3"], "plot")


def test_fp16_on_a_cpu(tmp_path, capsys):
    arguments = ["train", *runs.COMMON, f"--runs_dir={tmp_path}", "--training.precision=fp16"]
    refused(capsys, tmp_path, arguments, "training.precision")


@pytest.mark.parametrize("text", ["[1]", '{"optimizer": {}}', "{", '{"bf16": 3}'])
def test_a_bad_deepspeed_json(tmp_path, capsys, text):
    (tmp_path / "ds.json").write_text(text)
    arguments = ["train", *runs.COMMON, f"--runs_dir={tmp_path}", f"--training.deepspeed={tmp_path / 'ds.json'}"]
    refused(capsys, tmp_path, arguments, "training.deepspeed")


def test_runs_dir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    refused(capsys, tmp_path, ["train", *runs.COMMON, f"--runs_dir={tmp_path / 'file'}"], "runs_dir")


def test_the_demo_clears_its_own_folder_alone(trajectory, tmp_path, capsys):
    shutil.copytree(trajectory.parent, tmp_path / "teacher")
    refused(capsys, tmp_path, ["demo", "--folder", str(tmp_path)], "--folder")


@pytest.mark.slow
def test_no_traceback_from_a_process(tmp_path):
    command = [sys.executable, "-m", "megapd", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "none.yaml" in done.stderr


@pytest.mark.slow
def test_under_the_launcher_one_rank_tells(trajectory, tmp_path):
    done = runs.launch(runs.student(tmp_path, "s", trajectory, "--task.seed=1"), 2, check=False)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert output.count("megapd: error:") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "s").exists()


def test_a_setting_may_hold_spaces(tmp_path, capsys):
    assert main(["train", "--model={kind: mlp, width: 7}", f"--runs_dir={tmp_path}", "--dry-run"]) == 0
    assert "width: 7" in capsys.readouterr().out


def test_dry_run_trains_nothing(trajectory, tmp_path, capsys):
    assert main([*runs.student(tmp_path, "s", trajectory, "--lr.kind=cosine"), "--dry-run"]) == 0
    output = capsys.readouterr().out
    for expected in ("kind: cosine", "parameters", "tokens", "teacher", "signal dense", "total", "GiB"):
        assert expected in output
    assert not (tmp_path / "s").exists()


def test_plan_prints_and_plots(trajectory, tmp_path, capsys):
    arguments = ["plan", *runs.student(tmp_path, "s", trajectory)[1:], "--output", str(tmp_path / "plan.png")]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    for step in (5, 10, 15, 20, 25, 30):
        assert str(step) in output
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_a_run_its_plot_and_its_evaluation(trajectory, tmp_path, capsys):
    arguments = runs.student(
        tmp_path, "s", trajectory, "--evaluation.every=10", "--trajectory.steps=[10]", "--trajectory.every=15"
    )
    assert main(arguments) == 0
    run = tmp_path / "s"
    assert yaml.safe_load((run / "config.yaml").read_text())["schedule"]["refresh"] == 5
    records = runs.metrics(run)
    assert [r["step"] for r in records if r["kind"] == "eval"] == [10, 20, 30]
    assert [(r["step"], r["teacher_step"]) for r in records if r["kind"] == "rotation"] == [
        (0, 5),
        (5, 10),
        (10, 15),
        (15, 20),
        (20, 25),
        (25, 30),
    ]
    # Every step is taught by the checkpoint the schedule names.
    assert [r["teacher_step"] for r in records if r["kind"] == "train"] == [5 * (s // 5 + 1) for s in range(30)]

    assert main(["plot", str(run), str(trajectory.parent), "--output", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "curves.csv").read_text().startswith("run,")

    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert capsys.readouterr().out.count("accuracy") == 3
    evaluated = {e["step"]: e for e in json.loads((run / "evaluation.json").read_text())}
    assert sorted(evaluated) == [10, 15, 30]
    final = records[-1]
    assert final["kind"] == "eval"
    assert evaluated[30]["loss"] == pytest.approx(final["loss"], rel=1e-6)

    shutil.rmtree(run / "trajectory")
    assert main(["evaluate", str(run)]) == 0
    (only,) = json.loads((run / "evaluation.json").read_text())
    assert only["step"] == 30
    assert only["loss"] == pytest.approx(final["loss"], rel=1e-6)


def test_a_finished_run_is_left_alone(trajectory, tmp_path):
    arguments = runs.student(tmp_path, "s", trajectory)
    assert main(arguments) == 0
    before = (tmp_path / "s" / "metrics.jsonl").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "s" / "metrics.jsonl").read_bytes() == before


@callbacks.register("poison")
class Poison(Callback):
    """From some step on the data's loss is NaN."""

    def before_step(self, run, step):
        if step >= 10:
            with torch.no_grad():
                next(iter(run.engine.learner.parameters())).fill_(float("nan"))


def test_a_diverging_run_stops(tmp_path, capsys):
    """The updates are skipped and counted, and the run gives up with exit code 1."""
    arguments = ["train", *runs.COMMON, f"--runs_dir={tmp_path}", "--name=d", "--training.steps=40", "--training.max_nonfinite=5"]
    assert main([*arguments, "--training.callbacks=[poison]"]) == 1
    assert "training.max_nonfinite" in capsys.readouterr().err
    records = [r for r in runs.metrics(tmp_path / "d") if r["kind"] == "train"]
    assert [r["nonfinite"] for r in records] == [0] * 10 + [1, 2, 3, 4]
    assert records[-1]["loss"] is None


@pytest.mark.slow
def test_follow_a_teacher_that_is_still_training(tmp_path):
    """Teacher and student are started together; the student waits for each checkpoint and learns what it would afterwards."""
    slow = [f"--runs_dir={tmp_path}", "--name=teacher", "--training.steps=30", "--trajectory.every=5", "--model.width=32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    live = subprocess.Popen([sys.executable, "-m", "megapd", "train", *runs.COMMON, *slow], env=environment)
    follow = ["--schedule.policy=follow", "--schedule.refresh=5", "--schedule.last=30", "--schedule.timeout_seconds=60"]
    arguments = runs.student(tmp_path, "live", tmp_path / "teacher" / "trajectory", *follow)
    arguments.remove("--schedule.policy=matched")
    try:
        assert main(arguments) == 0
    finally:
        assert live.wait(timeout=60) == 0
    assert main(runs.student(tmp_path, "after", tmp_path / "teacher" / "trajectory")) == 0
    assert runs.metrics(tmp_path / "live") == runs.metrics(tmp_path / "after")


def test_a_followed_teacher_that_never_writes(tmp_path, capsys):
    follow = ["--schedule.policy=follow", "--schedule.refresh=5", "--schedule.last=30", "--schedule.timeout_seconds=0.3"]
    arguments = runs.student(tmp_path, "s", tmp_path / "teacher" / "trajectory", *follow)
    arguments.remove("--schedule.policy=matched")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "no checkpoint of step 5" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_wandb_is_offline_when_not_logged_in(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["train", *runs.COMMON, f"--runs_dir={tmp_path}", "--name=w", "--training.steps=3", "--telemetry.wandb=auto"]
    assert main(arguments) == 0
    assert list((tmp_path / "w" / "wandb").glob("offline-run-*/*.wandb"))

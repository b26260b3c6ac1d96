"""Exact resume: killed, stopped, damaged."""

import json
import random
import shutil
import signal
import threading

import pytest
import yaml

from megapd.cli import main
from megapd.config import load
from megapd.files import sealed, unsealed
from megapd.training import Callback, train
from tests.training import runs

pytestmark = pytest.mark.slow

STEPS = 300


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    return runs.teacher(tmp_path_factory.mktemp("teacher"), steps=STEPS, every=50)


@pytest.fixture(scope="module")
def long_student(trajectory, tmp_path_factory):
    """Arguments of a two-rank student of 300 steps and six teachers, and the metrics of its undisturbed run."""
    folder = tmp_path_factory.mktemp("students")

    def arguments(name):
        extra = ["--training.steps=300", "--schedule.refresh=50", "--checkpoint.every=20", "--evaluation.every=40"]
        return runs.student(folder, name, trajectory, *extra)

    runs.run(arguments("undisturbed"))
    return folder, arguments, runs.metrics(folder / "undisturbed")


def kill_and_resume(long_student, times, seed):
    folder, arguments, undisturbed = long_student
    name, draw = f"killed-{seed}", random.Random(seed)
    # Anywhere in its part of the run: on a checkpoint, before the first one, around a rotation.
    for part in range(times):
        span = (STEPS - 40) // times
        step = draw.randint(5 + part * span, 5 + (part + 1) * span - 1)
        runs.start_and_kill(arguments(name), 2, folder / name, step, launcher=part > 0)
    runs.run(arguments(name))
    resumed = runs.metrics(folder / name)
    assert [r["step"] for r in resumed if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert sum(r["kind"] == "rotation" for r in resumed) == 6
    assert resumed == undisturbed


def test_killed_ranks_resume_bitwise(long_student):
    kill_and_resume(long_student, times=1, seed=1)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2, 6))
def test_killed_three_times_resume_bitwise(long_student, seed):
    kill_and_resume(long_student, times=3, seed=seed)


def test_stop_signal_on_one_rank_stops_all_and_resumes(long_student):
    folder, arguments, undisturbed = long_student
    run = folder / "stopped"
    (run).mkdir()
    stopper = threading.Thread(target=lambda: [_until(run, 30), (run / "stop").touch()])
    stopper.start()
    printed = runs.run(arguments("stopped"))
    stopper.join()
    assert "stopped by" in printed
    at = runs.last_step(run)
    assert 30 <= at < STEPS
    assert (run / "checkpoints" / f"step_{at}").is_dir()
    assert not (run / "stop").exists()
    runs.run(arguments("stopped"))
    assert runs.metrics(run) == undisturbed


def _until(run, step):
    import time

    while runs.last_step(run) < step:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_stop(trajectory, tmp_path, number):
    """In process: the signal arrives in mid-step, the run stops at the boundary, the rest equals a run without it."""
    assert main(runs.student(tmp_path, "whole", trajectory, "--schedule.refresh=50", "--training.steps=60")) == 0

    class Interruption(Callback):
        def before_step(self, run, step):
            if step == 24:
                signal.raise_signal(number)

    arguments = runs.student(tmp_path, "stopped", trajectory, "--schedule.refresh=50", "--training.steps=60")
    result = train(load(None, arguments[1:]), [Interruption()])
    assert (result.finished, result.step) == (False, 25)
    assert runs.last_step(tmp_path / "stopped") == 25
    assert signal.getsignal(number) == signal.SIG_DFL
    assert main(arguments) == 0
    assert runs.metrics(tmp_path / "stopped") == runs.metrics(tmp_path / "whole")


def checkpoints(run):
    return {path.name for path in (run / "checkpoints").iterdir()}


def damage_truncate(folder):
    victim = max(folder.rglob("rank_*.safetensors"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])


def damage_flip(folder):
    victim = max(folder.rglob("rank_*.safetensors"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


def damage_remove(folder):
    max(folder.rglob("rank_*.safetensors"), key=lambda p: p.stat().st_size).unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"files": ')


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove, damage_manifest])
def test_a_damaged_checkpoint_falls_back(trajectory, tmp_path, damage, caplog):
    arguments = runs.student(tmp_path, "s", trajectory, "--schedule.refresh=50", "--checkpoint.every=10", "--checkpoint.keep=2")
    assert main(arguments) == 0
    run = tmp_path / "s"
    whole = runs.metrics(run)
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_20", "step_30"]
    damage(run / "checkpoints" / "step_30")
    assert main(arguments) == 0
    assert "step_30" in caplog.text
    assert "falling back" in caplog.text
    assert runs.metrics(run) == whole
    assert checkpoints(run) == {"step_20", "step_30", "damaged_step_30"}
    caplog.clear()
    assert main(arguments) == 0  # the run is whole again
    assert "falling back" not in caplog.text


@pytest.mark.parametrize("garbage", [b"\0" * 40 + b"\n", b'{"kind": "tra', b"[1]\n", b"\xff\xfe\n"])
def test_a_garbled_end_of_the_metrics_is_dropped(trajectory, tmp_path, garbage):
    arguments = runs.student(tmp_path, "s", trajectory, "--schedule.refresh=50")
    assert main(arguments) == 0
    whole = runs.metrics(tmp_path / "s")
    with (tmp_path / "s" / "metrics.jsonl").open("ab") as file:
        file.write(garbage)
    assert main(arguments) == 0
    assert runs.metrics(tmp_path / "s") == whole


def test_all_damaged_is_refused(trajectory, tmp_path, capsys):
    arguments = runs.student(tmp_path, "s", trajectory, "--schedule.refresh=50")
    assert main(arguments) == 0
    damage_remove(tmp_path / "s" / "checkpoints" / "step_30")
    before = runs.metrics(tmp_path / "s")
    assert main(arguments) == 2
    assert "damaged" in capsys.readouterr().err
    assert runs.metrics(tmp_path / "s") == before


def test_a_write_that_dies_leaves_the_last_checkpoint(trajectory, tmp_path, monkeypatch):
    """The rename never happens: the next start must not see the half-written folder, and must clean it away."""
    arguments = runs.student(tmp_path, "s", trajectory, "--schedule.refresh=50", "--checkpoint.every=10")

    def die(tree):
        if tree.get("step") == 20:
            raise KeyboardInterrupt
        return sealed(tree)

    monkeypatch.setattr("megapd.training.state.store.sealed", die)
    with pytest.raises(KeyboardInterrupt):
        train(load(None, arguments[1:]))
    monkeypatch.undo()
    assert checkpoints(tmp_path / "s") == {"step_10"}
    assert main(arguments) == 0
    assert checkpoints(tmp_path / "s") == {"step_20", "step_30"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--optimizer.lr=0.02", "optimizer.lr"),
        ("--training.steps=20", "training.steps"),
        ("--model.width=16", "model.width"),
        ("--seed=1", "seed"),
        ("--schedule.refresh=10", "schedule.refresh"),
        ("--checkpoint.resume=false", "checkpoint.resume"),
        ("--training.zero_stage=2", "training.zero_stage"),
    ],
)
def test_a_changed_setting_is_refused_on_resume(trajectory, tmp_path, capsys, change, named):
    arguments = runs.student(tmp_path, "s", trajectory, "--schedule.refresh=50")
    assert main(arguments) == 0
    assert main([*arguments, change]) == 2
    assert named in capsys.readouterr().err


def test_a_run_that_began_with_settings_of_before_is_resumed(trajectory, tmp_path):
    """By the same arguments, and by its own config.yaml."""
    arguments = runs.student(tmp_path, "s", trajectory, "--schedule.refresh=50", "--checkpoint.every=10")
    assert main([*arguments, "--training.steps=10"]) == 0
    saved = tmp_path / "s" / "config.yaml"
    for again in (["train", str(saved), "--training.prefetch=1", "--training.steps=20"], arguments):
        tree = yaml.safe_load(saved.read_text())
        tree["teacher"]["data_port"] = True
        tree["teacher"]["server"]["data_port"] = 0
        saved.write_text(yaml.safe_dump(tree))
        assert main(again) == 0
    assert runs.last_step(tmp_path / "s") == 30


def test_another_number_of_ranks_goes_on(long_student, tmp_path):
    """Two ranks made 280 steps; one makes the rest, of the same batches and teachers, and learns the same."""
    folder, arguments, undisturbed = long_student
    run = tmp_path / "undisturbed"
    shutil.copytree(folder / "undisturbed", run)
    shutil.rmtree(run / "checkpoints" / "step_300")
    assert main([*arguments("undisturbed"), f"--runs_dir={tmp_path}"]) == 0
    assert [segment["ranks"] for segment in json.loads((run / "run.json").read_text())["segments"]] == [2, 1]
    resumed = runs.metrics(run)
    assert [(line["kind"], line["step"]) for line in resumed] == [(line["kind"], line["step"]) for line in undisturbed]
    for line, wanted in zip(resumed, undisturbed, strict=True):
        assert line == (pytest.approx(wanted, abs=1e-5) if line["step"] > 280 and line["kind"] != "rotation" else wanted)


def test_one_rank_evaluates_what_two_wrote(long_student, tmp_path):
    """And changes nothing but evaluation.json, though the newest checkpoint is damaged."""
    folder, _, undisturbed = long_student
    run = tmp_path / "undisturbed"
    shutil.copytree(folder / "undisturbed", run)
    damage_flip(run / "checkpoints" / "step_300")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["evaluate", str(run)]) == 0
    (found,) = json.loads((run / "evaluation.json").read_text())
    (wanted,) = [line for line in undisturbed if line["kind"] == "eval" and line["step"] == found["step"]]
    assert found["step"] == 280
    assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "evaluation.json"}
    assert after == before


def test_the_recorded_schedule_is_kept(trajectory, tmp_path, capsys):
    """A checkpoint that changed under a run, digest and all, must not teach the rest of it."""
    copy = tmp_path / "trajectory"
    shutil.copytree(trajectory, copy)
    arguments = runs.student(tmp_path, "s", copy, "--schedule.refresh=50", "--training.steps=40")
    assert main(arguments) == 0
    path = tmp_path / "s" / "schedule.json"
    record = unsealed(path.read_text())
    assert record["rotations"] == [[0, 50]]
    assert main([*arguments, "--training.steps=60"]) == 0
    record = unsealed(path.read_text())
    assert record["rotations"] == [[0, 50], [50, 100]]
    path.write_text(sealed({**record, "digests": {"50": record["digests"]["50"], "100": "0" * 64}}))
    arguments.append("--training.steps=70")
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "0" * 64 in message
    assert "digest" in message

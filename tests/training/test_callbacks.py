"""What is hooked to a run: when it is called, what it may know, change and keep, and how it fails."""

import json
import typing
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import megapd
from megapd.cli import main
from megapd.errors import UserError
from megapd.registry import callbacks
from tests.training import runs
from tests.training.noise import Noise


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    return runs.teacher(tmp_path_factory.mktemp("teacher"), steps=10, every=5)


def settings(folder, *overrides, name="run"):
    return megapd.load(None, [*runs.COMMON, f"--runs_dir={folder}", f"--name={name}", "--training.steps=10", *overrides])


class Witness(megapd.Callback):
    """Notes every call."""

    def __init__(self, *, due=(), name="witness"):
        self.calls, self.metrics, self._due, self.name = [], {}, due, name

    def start(self, run):
        self.calls.append(("start", run.step))

    def before_step(self, run, step):
        self.calls.append(("before", step))

    def due(self, step):
        return step in self._due

    def after_step(self, run, result):
        self.calls.append(("after", result.step))
        self.metrics[result.step] = result.metrics

    def rotated(self, run, step, checkpoint):
        self.calls.append(("rotated", step, checkpoint.step))

    def evaluated(self, run, step, values):
        self.calls.append(("evaluated", step, sorted(values)))

    def saved(self, run, step, folder):
        assert (folder / "manifest.json").exists()
        self.calls.append(("saved", step, folder.name))

    def end(self, run, *, finished):
        self.calls.append(("end", finished))

    def close(self):
        self.calls.append(("close",))


def test_it_is_called_in_order(trajectory, tmp_path):
    student = [f"--teacher.trajectory={trajectory}", "--schedule.policy=matched", "--schedule.refresh=2", "--training.steps=4"]
    student += ["--schedule.speed=2.5", "--checkpoint.every=2", "--evaluation.every=2"]
    witness, late = Witness(), Witness(name="late")
    result = megapd.train(settings(tmp_path, *student), [witness, late])
    evaluated = ["accuracy", "loss", "samples"]
    assert witness.calls == [
        ("start", 0),
        *[("before", 0), ("rotated", 0, 5), ("after", 1)],
        *[("before", 1), ("after", 2), ("evaluated", 2, evaluated), ("saved", 2, "step_2")],
        *[("before", 2), ("rotated", 2, 10), ("after", 3)],
        *[("before", 3), ("after", 4), ("evaluated", 4, evaluated)],
        *[("end", True), ("saved", 4, "step_4"), ("close",)],
    ]
    assert late.calls == witness.calls
    assert (result.finished, result.step, result.folder) == (True, 4, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics["train/loss"] == lines[-2]["loss"]
    assert result.metrics["eval/accuracy"] == lines[-1]["accuracy"]
    again = Witness()  # of the run that is complete
    assert megapd.train(settings(tmp_path, *student), [again]) == result
    assert again.calls == [("start", 4), ("end", True), ("close",)]


def test_metrics_are_there_where_one_asks(tmp_path):
    witness, other = Witness(due=(3, 5)), Witness(name="other")
    megapd.train(settings(tmp_path, "--telemetry.every=4"), [witness, other])
    assert {step for step, metrics in witness.metrics.items() if metrics is not None} == {3, 4, 5, 8, 10}
    assert witness.metrics == other.metrics
    lines = {r["step"]: r for r in runs.metrics(tmp_path / "run") if r["kind"] == "train"}
    assert list(lines) == [4, 8, 10]
    for step, line in lines.items():
        told = {key: value for key, value in witness.metrics[step].items() if key not in runs.TIMINGS}
        assert line == {"kind": "train", "step": step, **told}
    assert "seconds" not in witness.metrics[3]


def test_its_state_is_resumed_bitwise(tmp_path, caplog):
    megapd.train(settings(tmp_path, name="whole"), [Noise()])
    stopped = megapd.train(settings(tmp_path, name="stopped"), [Noise(stop_at=4)])
    assert (stopped.finished, stopped.step) == (False, 4)
    assert "stopped by a callback at step 4 of 10" in caplog.text
    with pytest.raises(UserError, match=r"training\.callbacks: the run's checkpoint carries the state of Noise; name it again"):
        megapd.train(settings(tmp_path, name="stopped"))
    assert megapd.train(settings(tmp_path, name="stopped"), [Witness(), Noise()]).finished
    whole = runs.metrics(tmp_path / "whole")
    assert runs.metrics(tmp_path / "stopped") == whole
    noise = [record["noise"] for record in whole if record["kind"] == "train"]
    assert len(set(noise)) > 1


@callbacks.register("failing")
class Failing(Witness):
    def after_step(self, run, result):
        super().after_step(run, result)
        if result.step == 3:
            raise ZeroDivisionError("on purpose")


def test_what_it_raises_ends_the_run(tmp_path):
    failing, witness = Failing(name="failing"), Witness()
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        megapd.train(settings(tmp_path), [witness, failing])
    assert failing.calls[-2:] == [("after", 3), ("close",)]
    assert witness.calls[-2:] == [("after", 3), ("close",)]
    assert runs.last_step(tmp_path / "run") == 2  # the step's line of metrics comes after the callbacks that may add to it
    with pytest.raises(ZeroDivisionError):
        main(["train", *runs.COMMON, f"--runs_dir={tmp_path}", "--name=named", "--training.callbacks=[failing]"])
    assert megapd.train(settings(tmp_path)).finished  # whatever the callbacks of its first start


@pytest.mark.parametrize(
    ("overrides", "added", "message"),
    [
        (["--training.callbacks=[nobody]"], 0, r"training\.callbacks: unknown callback 'nobody'"),
        (["--telemetry.trackers=[nobody]"], 0, r"telemetry\.trackers: unknown tracker 'nobody'"),
        (["--training.callbacks=[failing, failing]"], 0, "two are called 'witness'"),
        (["--training.callbacks=[failing]"], 1, "two are called 'witness'"),
    ],
)
def test_bad_names_are_refused_before_anything_is_written(tmp_path, overrides, added, message):
    with pytest.raises(UserError, match=message):
        megapd.train(settings(tmp_path, *overrides), [Failing() for _ in range(added)])
    assert not (tmp_path / "run").exists()


def test_metrics_go_to_the_trackers_that_are_named_and_to_their_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    megapd.train(settings(tmp_path, "--telemetry.trackers=[]", "--telemetry.wandb=offline"))
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "wandb").exists()


def test_the_rate_leaves_out_what_else_starts(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megapd.training.telemetry.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(megapd.Callback):
        def start(self, run):
            now[0] += 1000.0

        def before_step(self, run, step):
            now[0] += 1.0

    megapd.train(settings(tmp_path, "--training.steps=3"), [Slow()])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates, seconds = zip(*[(line["tok_per_sec"], line["seconds"]) for line in lines if line["kind"] == "train"], strict=True)
    assert len(set(rates)) == 1
    assert seconds == (1001.0, 1002.0, 1003.0)


def test_checkpoints_without_their_settings_are_not_begun_over(tmp_path):
    megapd.train(settings(tmp_path, "--training.steps=2"))
    folder = tmp_path / "run"
    (folder / "config.yaml").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"config\.yaml is missing; run\.json beside it"):
        megapd.train(settings(tmp_path, "--training.steps=2"))
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_it_may_have_other_bases():
    class Generic(megapd.Callback, typing.Generic[typing.TypeVar("T")]): ...

    class Whole(Generic[int]): ...

    assert [Generic.name, Whole.name] == ["Generic", "Whole"]


def test_a_run_in_a_thread(tmp_path):
    """Python hands signals to the main thread alone; elsewhere a run is stopped by its file or a callback."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(megapd.train, settings(tmp_path, "--training.steps=3")).result()
    assert (result.finished, result.step) == (True, 3)

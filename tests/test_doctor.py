"""megapd doctor: each fault is found before it costs a run, and nothing of the run changes."""

import shutil
import socket
from collections import namedtuple

import pytest

from megapd.cli import main
from megapd.errors import UserError
from megapd.processes import checks
from megapd.training.folder.lock import RunLock
from tests.corpus import corpora
from tests.training import runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a teacher, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("runs")
    trajectory = runs.teacher(folder, steps=20, every=10)
    arguments = runs.student(folder, "s", trajectory, "--training.steps=20", "--schedule.refresh=10", "--checkpoint.every=10")
    assert main(arguments) == 0
    return folder, arguments


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "runs")
    return tmp_path / "runs" / "s"


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def examined(capsys, *arguments):
    """Exit code, and what was found of each check."""
    capsys.readouterr()
    code = main(["doctor", *arguments])
    told = capsys.readouterr().out
    *table, last = told.splitlines()
    found = {name: (state, text.strip()) for name, state, text in (line.split(maxsplit=2) for line in table)}
    return code, found, last


def test_a_sound_run(run, capsys):
    before = content(run.parent)
    code, found, last = examined(capsys, str(run))
    assert code == 0
    assert {state for name, (state, _) in found.items() if name != "threads"} == {"ok"}
    assert {"ranks", "runs_dir", "task", "room", "schedule", "teacher", "trajectory", "run", "checkpoints", "metrics"} <= set(
        found
    )
    assert found["run"][1].endswith("1 starts, newest checkpoint at step 20")
    assert last.startswith(f"{len(found)} checks, 0 faults")
    assert content(run.parent) == before


def damage(path):
    bits = bytearray(path.read_bytes())
    bits[len(bits) // 2] ^= 1
    path.write_bytes(bits)


def test_faults_of_a_run(run, made, capsys):
    damage(next((run / "checkpoints" / "step_20").glob("*.safetensors")))
    before = content(run.parent)
    code, found, _ = examined(capsys, str(run))
    assert code == 0  # a start falls back
    assert found["checkpoints"][0] == "warning"
    assert "a start goes on from step 10" in found["checkpoints"][1]
    assert content(run.parent) == before
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines.replace('"loss": 0.', '"loss": 1.', 1))
    damage(next((run.parent / "teacher" / "trajectory" / "step_10").glob("*.safetensors")))
    trajectory = f"--teacher.trajectory={run.parent / 'teacher' / 'trajectory'}"
    held = RunLock(run)
    code, found, last = examined(capsys, str(run), trajectory)
    held.close()
    assert (code, found["metrics"][0], found["run"][0], found["trajectory"][0]) == (2, "warning", "warning", "FAULT")
    assert "a process trains it now" in found["run"][1]
    assert " 1 faults" in last
    (run / "config.yaml").unlink()
    assert main(["doctor", str(run)]) == 2
    assert "it has no config.yaml" in capsys.readouterr().err
    config, _ = made[1][1:], (run / "run.json").unlink()
    code, found, _ = examined(capsys, *[a for a in config if "runs_dir" not in a], f"--runs_dir={run.parent}")
    assert (code, found["run"][0]) == (2, "FAULT")


def test_faults_of_a_configuration(tmp_path, made, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("megapd.training.folder.room.shutil.disk_usage", lambda path: usage(1, 1, 0))
    common = [*runs.COMMON, f"--runs_dir={tmp_path}", "--name=new"]
    code, found, _ = examined(capsys, *common, "--training.precision=fp16", "--training.zero_stage=1")
    assert code == 2
    assert found["precision"][0] == found["room"][0] == "FAULT"
    assert "a checkpoint takes 7,824 bytes, " in found["room"][1]
    assert main(["train", *common]) == 2
    assert "a checkpoint takes" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    code, found, _ = examined(capsys, *common, "--evaluation.samples=9999999999")
    assert (code, found["task"][0]) == (2, "FAULT")
    teacher = [f"--teacher.trajectory={made[0] / 'teacher' / 'trajectory'}", "--schedule={policy: one_shot}"]
    code, found, _ = examined(capsys, *common, *teacher, "--task.dimension=9")
    assert (code, found["teacher"][0]) == (2, "FAULT")
    assert "vocabulary" in found["teacher"][1]


def test_addresses_that_do_not_answer(tmp_path, made, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert checks.reachable(f"grpc://127.0.0.1:{port}") == f"grpc://127.0.0.1:{port} answers"
    with pytest.raises(UserError, match="refused"):
        checks.reachable(f"http://127.0.0.1:{port}")


def test_a_damaged_corpus(tmp_path, capsys):
    config = corpora.prepared(tmp_path, "gpt")
    given = [f"--corpus.output={config.corpus.output}", "--task={kind: text, objective: clm}", "--evaluation.samples=4"]
    given += ["--model={kind: gpt, layers: 1, hidden: 16, heads: 2}", f"--runs_dir={tmp_path}", "--training.global_batch=16"]
    code, found, _ = examined(capsys, *given)
    assert (code, found["corpus"][0]) == (0, "ok")
    damage(config.corpus.output / "train.arrow")
    code, found, _ = examined(capsys, *given)
    assert (code, found["corpus"][0]) == (2, "FAULT")


def test_another_version_on_a_rank():
    class Two:
        size, rank, device = 2, 0, "cpu"

        def gather(self, value):
            _, versions = value
            return [value, ("b", {**versions, "torch": "1.0"})]

    with pytest.raises(UserError, match=r"torch is 1\.0 on rank 1 \(b\) and .* on rank 0"):
        checks.ranks(Two())

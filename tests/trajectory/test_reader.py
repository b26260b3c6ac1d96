import json
import re
import shutil
import threading
import time

import pytest
import torch

from megapd.errors import UserError
from megapd.trajectory import CheckpointTimeout, Trajectory
from megapd.trajectory.reader import nearest_steps
from tests.trajectory.checkpoints import weights, write


@pytest.fixture
def folder(tmp_path):
    for step in (0, 100, 20, 1000):
        write(tmp_path, step, shard_bytes=300)
    return tmp_path


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(bytes(data))


def test_steps_are_sorted_and_leave_out_what_is_no_checkpoint(folder):
    for name in ("step_50.tmp-4711", "step_007", "step_", "steps_3", "step_3x", "old_step_3"):
        shutil.copytree(folder / "step_20", folder / name)
    (folder / "step_60").mkdir()
    (folder / "notes.txt").write_text("")
    trajectory = Trajectory(folder)
    assert trajectory.steps == (0, 20, 100, 1000)
    assert trajectory.incomplete == (60,)


def test_refresh_sees_later_checkpoints(folder):
    trajectory = Trajectory(folder)
    write(folder, 2000)
    assert trajectory.steps == (0, 20, 100, 1000)
    assert trajectory.refresh() == trajectory.steps == (0, 20, 100, 1000, 2000)


def test_checkpoint_is_what_was_written(tmp_path):
    written = write(tmp_path, 4, config={"a": {"b": [1, None, "x"]}}, vocabulary="voc", metrics={"eval/accuracy": 0.25})
    read = Trajectory(tmp_path).checkpoint(4)
    assert read == written
    assert (read.step, read.path, read.vocabulary) == (4, tmp_path / "step_4", "voc")
    assert (read.config, read.metrics) == ({"a": {"b": [1, None, "x"]}}, {"eval/accuracy": 0.25})


def test_tensors_streams_the_same(folder):
    trajectory = Trajectory(folder)
    assert {name: tensor.tolist() for name, tensor in trajectory.tensors(100)} == {
        k: v.tolist() for k, v in trajectory.load(100).items()
    }
    assert torch.equal(trajectory.load(100)["scale"], weights(100)["scale"])


def test_missing_or_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"teacher\.trajectory: no folder .*none"):
        Trajectory(tmp_path / "none")
    with pytest.raises(UserError, match=r"teacher\.trajectory: no complete checkpoint"):
        Trajectory(tmp_path)
    (tmp_path / "step_1").mkdir()
    with pytest.raises(UserError, match=r"1 without meta\.json"):
        Trajectory(tmp_path)
    assert Trajectory(tmp_path / "none", must_exist=False).steps == ()


def test_missing_step_lists_the_nearest(folder):
    with pytest.raises(UserError, match=r"no checkpoint of step 50; the nearest are 0, 20, 100, 1000"):
        Trajectory(folder).checkpoint(50)
    with pytest.raises(UserError, match="no checkpoint of step 50"):
        Trajectory(folder).load(50)


def test_nearest_steps():
    steps = tuple(range(0, 1000, 10))
    assert nearest_steps(steps, 504) == (490, 500, 510, 520)
    assert nearest_steps(steps, 5000) == (960, 970, 980, 990)
    assert nearest_steps((), 3) == ()


@pytest.mark.parametrize("victim", ["shard", "index"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "flipped", "missing"])
def test_damaged_files_are_named(folder, victim, damage):
    trajectory = Trajectory(folder)
    checkpoint = trajectory.checkpoint(100)
    name = checkpoint.shards[-1] if victim == "shard" else "model.safetensors.index.json"
    path, expected = checkpoint.path / name, checkpoint.files[name]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
        message = f"{path}: {expected.bytes - 7} bytes, but {expected.bytes} were written"
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"!")
        message = f"{path}: {expected.bytes + 1} bytes, but {expected.bytes} were written"
    elif damage == "flipped":
        flip(path)
        message = f"{path}: its sha256 is "
    else:
        path.unlink()
        message = f"{path}: missing"
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        trajectory.load(100)
    if damage == "flipped":
        assert expected.sha256 in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [problem for problem in trajectory.verify() if str(path) in problem] == trajectory.verify() != []
    assert trajectory.load(20).keys() == weights().keys()  # the others stay readable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.pop("vocabulary"), "lacks vocabulary"),
        (lambda meta: meta.update(format="megapd-trajectory/9"), "its format is 'megapd-trajectory/9'"),
        (lambda meta: meta.update(step=7), "it is of step 7, but its folder is step_100"),
        (lambda meta: meta.update(digest="0" * 64), "digest 0000"),
        (lambda meta: meta.update(files=[]), "files is a list"),
        (lambda meta: meta["files"].pop("model-00001-of-00004.safetensors"), "is not that of the files listed"),
    ],
)
def test_damaged_meta(folder, change, message):
    path = folder / "step_100" / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=re.escape(message)):
        Trajectory(folder).checkpoint(100)
    assert len(Trajectory(folder).verify()) == 1


def test_meta_that_is_no_json_or_not_there(folder):
    path = folder / "step_100" / "meta.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="not valid JSON"):
        Trajectory(folder).load(100)
    path.unlink()
    trajectory = Trajectory(folder)
    assert trajectory.steps == (0, 20, 1000)
    assert trajectory.incomplete == (100,)
    with pytest.raises(UserError, match=r"step_100: it has no meta\.json"):
        trajectory.load(100)
    assert len(trajectory.verify()) == 1


def test_verify_finds_equal_weights(folder):
    assert Trajectory(folder).verify() == []
    write(folder, 3000, weights(20), shard_bytes=300)
    (problem,) = Trajectory(folder).verify()
    assert "steps 20, 3000 have the same weights" in problem


def test_wait_for_a_checkpoint_written_later(tmp_path):
    trajectory = Trajectory(tmp_path / "later", must_exist=False)
    began = threading.Event()

    def teacher():
        began.wait()
        time.sleep(0.15)
        write(tmp_path / "later", 10)

    thread = threading.Thread(target=teacher)
    thread.start()
    began.set()
    start = time.monotonic()
    checkpoint = trajectory.wait_for(10, timeout_seconds=30, poll_seconds=0.01)
    assert time.monotonic() - start >= 0.14
    thread.join()
    assert checkpoint == trajectory.checkpoint(10)
    assert torch.equal(trajectory.load(10)["scale"], weights(10)["scale"])


def test_wait_for_gives_up(folder):
    with pytest.raises(
        CheckpointTimeout, match=r"no checkpoint of step 2000 after 0\.05 s; the newest there is of step 1000"
    ) as caught:
        Trajectory(folder).wait_for(2000, timeout_seconds=0.05, poll_seconds=0.01)
    assert isinstance(caught.value, TimeoutError)
    assert str(folder) in str(caught.value)
    with pytest.raises(CheckpointTimeout, match="there is none yet"):
        Trajectory(folder / "none", must_exist=False).wait_for(1, timeout_seconds=0.0)
    assert Trajectory(folder).wait_for(100, timeout_seconds=0.0).step == 100  # one that is there needs no time

import hashlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megapd.trajectory import Trajectory
from megapd.trajectory import writer as writer_module
from megapd.trajectory.writer import write_checkpoint
from tests.trajectory.checkpoints import weights, write


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("shard_bytes", [4, 100, 300, 1 << 20])
def test_round_trip_in_any_number_of_shards(tmp_path, shard_bytes):
    written = weights()
    checkpoint = write(tmp_path, 7, written, shard_bytes=shard_bytes)
    assert same(Trajectory(tmp_path).load(7), written)
    sizes = {}
    for shard in checkpoint.shards:
        with safe_open(checkpoint.path / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes[shard] = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
    assert all(sum(tensors) <= shard_bytes or len(tensors) == 1 for tensors in sizes.values())
    count = len(checkpoint.shards)
    assert checkpoint.shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert {4: 5, 1 << 20: 1}.get(shard_bytes, count) == count


def test_index_is_the_hugging_face_one(tmp_path):
    written = weights()
    path = write(tmp_path, 3, written, shard_bytes=300).path
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    assert index["weight_map"].keys() == written.keys()
    for name, shard in index["weight_map"].items():
        with safe_open(path / shard, framework="pt") as file:
            assert torch.equal(file.get_tensor(name), written[name])


def test_transformers_loads_the_folder(tmp_path):
    from transformers import BertConfig, BertModel

    tiny = BertConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=8
    )
    model = BertModel(tiny)
    path = write(tmp_path, 1, dict(model.named_parameters()), shard_bytes=600).path
    tiny.save_pretrained(path)
    loaded = BertModel.from_pretrained(path)
    assert same(dict(loaded.named_parameters()), dict(model.named_parameters()))


def test_meta_names_every_file_and_the_digest_the_weights(tmp_path):
    checkpoint = write(tmp_path, 12, shard_bytes=300, config={"model": {"width": 5}}, vocabulary="abc")
    meta = json.loads((checkpoint.path / "meta.json").read_text())
    assert meta.keys() == {"format", "step", "config", "vocabulary", "metrics", "files", "digest"}
    assert (meta["format"], meta["step"], meta["config"], meta["vocabulary"]) == (
        "megapd-trajectory/1",
        12,
        {"model": {"width": 5}},
        "abc",
    )
    on_disk = {p.name: p.read_bytes() for p in checkpoint.path.iterdir() if p.name != "meta.json"}
    assert meta["files"] == {n: {"sha256": hashlib.sha256(d).hexdigest(), "bytes": len(d)} for n, d in on_disk.items()}
    shards = sorted(n for n in on_disk if n.endswith(".safetensors"))
    assert len(shards) > 1
    lines = "".join(f"{n} {hashlib.sha256(on_disk[n]).hexdigest()}\n" for n in shards)
    assert checkpoint.digest == meta["digest"] == hashlib.sha256(lines.encode()).hexdigest()
    assert write(tmp_path / "b", 99, weights(12), shard_bytes=300, config={}, metrics={}).digest == checkpoint.digest
    assert write(tmp_path / "c", 12, weights(13), shard_bytes=300).digest != checkpoint.digest


def test_numbers_that_are_not_finite_become_null(tmp_path):
    checkpoint = write(tmp_path, 1, metrics={"loss": math.nan, "list": [1.0, math.inf]}, config={"a": {"b": -math.inf}})
    assert checkpoint.metrics == {"loss": None, "list": [1.0, None]}
    assert checkpoint.config == {"a": {"b": None}}


def test_views_tied_and_reused_memory(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)

    def stream():
        yield "transposed", base.T
        yield "slice", base[1:3, ::2]
        yield "tied", base
        yield "tied_again", base
        yield "parameter", torch.nn.Parameter(base[0])
        buffer = torch.zeros(3)
        for value in (1.0, 2.0):  # as parameters gathered one after the other into the same memory
            yield f"buffer{value:g}", buffer.fill_(value)
        buffer.fill_(9.0)
        yield "empty", torch.zeros(0, 5)
        yield "ids", torch.tensor([1 << 40])
        yield "expanded", torch.ones(1, 2).expand(3, 2)

    write(tmp_path, 1, stream())
    loaded = Trajectory(tmp_path).load(1)
    assert torch.equal(loaded["transposed"], base.T)
    assert torch.equal(loaded["slice"], base[1:3, ::2])
    assert torch.equal(loaded["tied"], base)
    assert torch.equal(loaded["tied_again"], base)
    assert torch.equal(loaded["parameter"], base[0])
    assert loaded["buffer1"].tolist() == [1.0] * 3
    assert loaded["buffer2"].tolist() == [2.0] * 3
    assert loaded["empty"].shape == (0, 5)
    assert loaded["ids"].tolist() == [1 << 40]
    assert loaded["expanded"].tolist() == [[1.0, 1.0]] * 3


@pytest.mark.gpu
def test_tensors_of_a_gpu(tmp_path):
    written = {name: tensor.cuda() for name, tensor in weights().items()}
    write(tmp_path, 1, written, shard_bytes=300)
    assert same(Trajectory(tmp_path).load(1), weights())


def test_at_most_one_shard_is_held(tmp_path, monkeypatch):
    held = []
    save_file = writer_module.save_file

    def noted(tensors, *args, **kwargs):
        held.append(sum(t.nbytes for t in tensors.values()))
        save_file(tensors, *args, **kwargs)

    saved_when_asked = []

    def stream():
        for number in range(10):
            saved_when_asked.append(len(held))
            yield f"t{number}", torch.full((100,), float(number))

    monkeypatch.setattr(writer_module, "save_file", noted)
    write(tmp_path, 1, stream(), shard_bytes=800)
    assert held == [800] * 5
    assert saved_when_asked == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]  # a full shard is on disk before the stream goes on


def test_a_crash_midway_leaves_nothing(tmp_path):
    def stream():
        yield from list(weights().items())[:3]
        assert any(p.name.startswith("step_5.tmp-") for p in tmp_path.iterdir())
        assert Trajectory(tmp_path, must_exist=False).steps == ()
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write(tmp_path, 5, stream(), shard_bytes=4)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_replacing_keeps_the_old(tmp_path, monkeypatch):
    before = write(tmp_path, 5, weights(1))

    def broken(temporary, final):
        raise OSError("disk full")

    monkeypatch.setattr(writer_module, "commit_folder", broken)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, 5, weights(2))
    assert Trajectory(tmp_path).checkpoint(5).digest == before.digest
    assert Trajectory(tmp_path).verify() == []
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]


def test_the_same_weights_are_kept(tmp_path):
    before = write(tmp_path, 5, weights(1), metrics={"seconds": 1.0})
    stamp = (before.path / "meta.json").stat()
    again = write(tmp_path, 5, weights(1), metrics={"seconds": 2.0})
    assert again == before
    assert (before.path / "meta.json").stat().st_ino == stamp.st_ino
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]


@pytest.mark.parametrize("change", ["weights", "vocabulary", "layout"])
def test_others_replace_it(tmp_path, change):
    before = write(tmp_path, 5, weights(1), shard_bytes=300)
    seed = 2 if change == "weights" else 1
    vocabulary = "v2" if change == "vocabulary" else "v1"
    again = write(tmp_path, 5, weights(seed), vocabulary=vocabulary, shard_bytes=1 << 20 if change == "layout" else 300)
    assert again != before
    trajectory = Trajectory(tmp_path)
    assert trajectory.checkpoint(5) == again
    assert same(trajectory.load(5), weights(seed))
    assert trajectory.verify() == []
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]


def test_a_damaged_one_is_replaced_by_the_same_weights(tmp_path):
    before = write(tmp_path, 5, weights(1))
    shard = before.path / before.shards[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    write(tmp_path, 5, weights(1))
    assert same(Trajectory(tmp_path).load(5), weights(1))


def test_invariants(tmp_path):
    with pytest.raises(AssertionError, match="two tensors are called w"):
        write(tmp_path, 1, iter([("w", torch.ones(1)), ("w", torch.ones(1))]))
    with pytest.raises(AssertionError, match="no tensors"):
        write(tmp_path, 1, {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="JSON serializable"):
        write_checkpoint(tmp_path, 1, weights().items(), config={"a": object()}, vocabulary="v", metrics={}, shard_bytes=1 << 20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_writer_leaves_what_no_reader_takes_for_a_checkpoint(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.trajectory.checkpoints import weights, write\n"
        "def stream():\n"
        "    yield from list(weights().items())[:4]\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write(Path(sys.argv[1]), 5, stream(), shard_bytes=4)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("step_5.tmp-")
    assert len(list(left.iterdir())) == 3
    trajectory = Trajectory(tmp_path, must_exist=False)
    assert trajectory.steps == trajectory.incomplete == ()
    assert trajectory.verify() == []
    write(tmp_path, 5)  # the resumed run clears it away
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]

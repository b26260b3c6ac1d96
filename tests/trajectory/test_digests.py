"""Digests by file and by tensor: what equal ones tell, what is read again and what is not."""

import errno
import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megapd.errors import UserError
from megapd.scheduler.registry.rules import judge
from megapd.trajectory import Trajectory, digests
from megapd.trajectory.digests import FileDigests, equal_weights, known_digests, read_digests
from megapd.trajectory.hugging_face import HuggingFaceTrajectory
from megapd.trajectory.writer import write_checkpoint

NAMES = ("embed.weight", "layer.0.weight", "layer.1.weight", "norm.weight", "mask")


def tensors(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    matrices = {name: torch.randn(6, 5, generator=generator).to(dtype) for name in NAMES[:3]}
    return {**matrices, "norm.weight": torch.ones(5, dtype=dtype), "mask": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}


def save(folder, found, form="sharded"):
    """A checkpoint of transformers: a shard a tensor, one file, or one that torch.save writes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
    if form == "pickled":
        torch.save(found, folder / "pytorch_model.bin")
    elif form == "one":
        save_file(found, folder / "model.safetensors")
    else:
        for name, tensor in found.items():
            save_file({name: tensor}, folder / f"model-{name}.safetensors")
        index = {"weight_map": {name: f"model-{name}.safetensors" for name in found}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "index"))
    monkeypatch.setattr(digests, "_known", {})
    return tmp_path / "index" / "megapd" / "digests"


# ------------------------------------------------------------------------------------------------------------- what is equal


@pytest.mark.parametrize("form", ["sharded", "one", "pickled"])
def test_vectors_and_masks_may_be_equal(tmp_path, form):
    for step in (1, 2, 3):
        save(tmp_path / f"step_{step}", {name: t for name, t in tensors(step).items() if form != "sharded" or t.ndim == 2}, form)
    assert HuggingFaceTrajectory(f"{tmp_path}/step_{{step}}").verify() == []


def test_a_shard_of_another_step_is_named(tmp_path, caplog):
    for step in (1000, 2000, 3000):
        save(tmp_path / f"step_{step}", {name: t for name, t in tensors(step).items() if t.ndim == 2})
    shutil.copy(tmp_path / "step_3000" / "model-embed.weight.safetensors", tmp_path / "step_2000")
    trajectory = HuggingFaceTrajectory(f"{tmp_path}/step_{{step}}")
    (problem,) = trajectory.verify()
    digest = hashlib.sha256((tmp_path / "step_2000" / "model-embed.weight.safetensors").read_bytes()).hexdigest()
    assert "steps 2000, 3000 have the same model-embed.weight.safetensors" in problem
    assert digest[:16] in problem
    # A run that is to be taught by both is warned when it looks at the second.
    assert caplog.text.count("steps 2000, 3000 have the same") == 1
    trajectory.checkpoint(3000)
    assert caplog.text.count("steps 2000, 3000 have the same") == 1


@pytest.mark.parametrize("form", ["one", "pickled"])
def test_a_tensor_of_another_step_is_named_whatever_is_beside_it(tmp_path, form):
    for step in (1, 2, 3):
        found = tensors(step) | ({"layer.1.weight": tensors(3)["layer.1.weight"]} if step == 1 else {})
        save(tmp_path / f"step_{step}", found, form)
    (problem,) = HuggingFaceTrajectory(f"{tmp_path}/step_{{step}}").verify()
    assert "steps 1, 3 have the same 1 of 3 matrices, layer.1.weight; " in problem


def test_megapds_own_trajectories_are_looked_at_alike(tmp_path):
    for step in (1, 2, 3):
        found = tensors(step) | ({"embed.weight": tensors(3)["embed.weight"]} if step == 2 else {})
        if step == 1:
            found["norm.weight"] = torch.tensor([1.0, torch.inf, 0.0, 0.0, 0.0])
        write_checkpoint(tmp_path, step, found.items(), config={}, vocabulary="", metrics={}, shard_bytes=1 << 20)
    infinite, equal = Trajectory(tmp_path).verify()
    assert infinite.startswith(f"{tmp_path}/step_1: step 1: norm.weight in model-00001-of-00001.safetensors holds NaN or an inf")
    assert "steps 2, 3 have the same 1 of 3 matrices, embed.weight; " in equal


def test_groups_of_steps():
    def files(*names):
        return {f"{name}.safetensors": FileDigests(name * 16, {name: name}) for name in names}

    found = equal_weights(
        "t", {1: files("a", "b"), 2: files("a", "b"), 3: files("a", "c"), 4: files("d", "c"), 5: files("e", "f")}
    )
    assert [problem.partition(";")[0] for problem in found] == [
        f"t: steps 1, 2 have the same weights, a.safetensors {'a' * 16}",
        f"t: steps 1, 3 have the same a.safetensors (sha256 {'a' * 16})",
        f"t: steps 3, 4 have the same c.safetensors (sha256 {'c' * 16})",
    ]
    assert equal_weights("t", {}) == []


def test_the_registry_flags_a_file_of_another_step():
    def record(step, *shas):
        files = {f"model-{i}.safetensors": {"sha256": sha, "bytes": 1} for i, sha in enumerate(shas)}
        return {"step": step, "weights": str(step), "files": files | {"config.json": {"sha256": "c", "bytes": 1}}}

    found = judge([record(1, "a", "b"), record(2, "c", "d"), record(3, "e", "d")])
    assert found == {
        2: {"duplicate": "the same model-1.safetensors, sha256 d, as step 3"},
        3: {"duplicate": "the same model-1.safetensors, sha256 d, as step 2"},
    }


# -------------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", ["one", "pickled"])
def test_numbers_that_are_none_are_found(tmp_path, monkeypatch, dtype, value, form):
    monkeypatch.setattr(digests, "CHUNK_BYTES", 64)
    found = tensors(1, dtype)
    found["layer.0.weight"][5, 4] = value
    folder = save(tmp_path / "step_1", found, form)
    (path,) = [path for path in folder.iterdir() if path.name != "config.json"]
    assert read_digests(path, pickles=True).not_finite == ("layer.0.weight",)
    (problem,) = HuggingFaceTrajectory(str(folder)).verify()
    assert "step_1: step 1: layer.0.weight in " in problem
    assert not read_digests(save(tmp_path / "step_2", tensors(1, dtype), form) / path.name, pickles=True).not_finite


def test_the_digest_is_that_of_the_whole_file(tmp_path):
    path = save(tmp_path / "step_1", tensors(1), "one") / "model.safetensors"
    assert read_digests(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(read_digests(path).matrices) == sorted(NAMES[:3])


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + 7 * b"\0" + b"[]", b"\x03" + 7 * b"\0" + b'{"a'])
def test_a_damaged_header_is_told(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged, no safetensors file"):
        read_digests(path)


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch, index, caplog):
    path = save(tmp_path / "step_1", tensors(1), "one") / "model.safetensors"
    reads = []
    monkeypatch.setattr(digests, "read_digests", lambda path: reads.append(path.name) or read_digests(path))

    def at_a_new_start():
        digests._known.clear()
        return known_digests(path)

    first = known_digests(path)
    assert known_digests(path) == first
    assert len(reads) == 1
    assert not index.exists(), "it may be written to within this tick of the clock"
    monkeypatch.setattr(digests, "RACE_SECONDS", -10.0)
    assert at_a_new_start() == first
    assert at_a_new_start() == first
    assert len(reads) == 2
    # Other content of the same size and mtime: the ctime tells.
    stat = path.stat()
    save_file(tensors(2), path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert at_a_new_start() != first
    for entry in index.iterdir():  # a damaged index is none
        entry.write_text("{")
    assert at_a_new_start() == read_digests(path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # nor is one that cannot be written
    assert at_a_new_start() == read_digests(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    monkeypatch.setattr("megapd.files.os.replace", full)
    assert at_a_new_start() == read_digests(path)
    assert "no space left on device: the disk at" in caplog.text

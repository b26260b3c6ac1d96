"""Parts of stored tensors: read from files as from memory, and no more than needed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from megapd.errors import UserError
from megapd.slices import Flat, Ranges, take
from megapd.trajectory import Trajectory

from .checkpoints import weights, write

SHAPES = [(), (1,), (7,), (0,), (5, 3), (1, 4), (4, 1), (3, 2, 2)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Tensors of every shape, in memory and in an open file."""
    tensors = {str(shape): torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 1 for shape in SHAPES}
    path = tmp_path_factory.mktemp("slices") / "model.safetensors"
    save_file(tensors, path)
    with safe_open(path, framework="pt") as file:
        yield tensors, file


class Counting:
    """A slice of a file that counts the values read."""

    def __init__(self, source):
        self.source, self.read = source, 0

    def get_shape(self):
        return self.source.get_shape()

    def __getitem__(self, place):
        tensor = self.source[place]
        self.read += tensor.numel()
        return tensor


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole(stored, shape):
    tensors, file = stored
    whole = tensors[str(shape)]
    for source in (whole, file.get_slice(str(shape))):
        found = take(source, None)
        assert found.shape == whole.shape
        assert torch.equal(found, whole)


@pytest.mark.parametrize("shape", SHAPES)
@given(start=st.integers(0, 20), length=st.integers(0, 20))
def test_flat_parts(stored, shape, start, length):
    tensors, file = stored
    whole, part = tensors[str(shape)], Flat(start, start + length)
    wanted = whole.reshape(-1)[start : start + length]
    counting = Counting(file.get_slice(str(shape)))
    for source in (whole, counting):
        found = take(source, part)
        assert found.shape == part.shape(shape) == wanted.shape
        assert torch.equal(found, wanted)
    # Whole rows: of the first and of the last less may be needed.
    row = torch.Size(shape[1:]).numel()
    assert counting.read <= wanted.numel() + 2 * max(0, row - 1) or shape == ()


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((7,), Ranges(0, ((2, 5),))),
        ((7,), Ranges(0, ((0, 1), (3, 4), (5, 7)))),
        ((5, 3), Ranges(0, ((1, 4),))),
        ((5, 3), Ranges(0, ((0, 1), (4, 5)))),
        ((5, 3), Ranges(1, ((1, 3),))),
        ((5, 3), Ranges(1, ((0, 1), (2, 3)))),
        ((5, 3), Ranges(0, ((0, 5),))),
        ((3, 2, 2), Ranges(0, ((1, 2),))),
        ((3, 2, 2), Ranges(1, ((1, 2),))),
    ],
)
def test_ranges(stored, shape, part):
    tensors, file = stored
    whole = tensors[str(shape)]
    wanted = torch.cat([whole.narrow(part.dim, start, stop - start) for start, stop in part.ranges], part.dim)
    counting = Counting(file.get_slice(str(shape)))
    for source in (whole, counting):
        found = take(source, part)
        assert found.shape == part.shape(shape) == wanted.shape
        assert torch.equal(found, wanted)
    assert counting.read == wanted.numel()


def test_a_trajectory_is_read_by_parts(tmp_path):
    write(tmp_path, 3, shard_bytes=200)
    wanted = {
        "embed.weight": Ranges(0, ((2, 5),)),
        "block.weight": Ranges(1, ((3, 6),)),
        "block.bias": None,
        "head.weight": Flat(10, 90),
        "scale": None,
    }
    trajectory, whole = Trajectory(tmp_path), weights(3)
    assert len(trajectory.checkpoint(3).shards) > 1
    found = trajectory.read(3, wanted)
    assert found.keys() == whole.keys()
    expected = {
        "embed.weight": whole["embed.weight"][2:5],
        "block.weight": whole["block.weight"][:, 3:6],
        "block.bias": whole["block.bias"],
        "head.weight": whole["head.weight"].flatten()[10:],
        "scale": whole["scale"],
    }
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name
    for names in (wanted.keys() - {"scale"}, wanted.keys() | {"more"}):
        odd = "more" if "more" in names else "scale"
        with pytest.raises(UserError, match=rf"its tensors are not those of the model in its meta\.json, e\.g\. {odd}"):
            trajectory.read(3, dict.fromkeys(names))

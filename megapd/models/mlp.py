"""The student and teacher of sparse parity: one hidden ReLU layer over +-1 inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megapd.config import MLPConfig
from megapd.models.build import Body, Parts


class MLP(Body):
    """One hidden layer that reads a whole row of bits: linear.weight [width, dimension], linear.bias [width]."""

    def __init__(self, dimension: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dimension, width)

    def forward(self, ids: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """ids [B, L] of {0, 1}, L = dimension -> hidden [B, 1, width], one row a sample; segments and lengths must be None."""
        assert segments is None, "a row of bits has no documents"
        assert lengths is None, "a row of bits is never padded"
        # DeepSpeed casts the weights (bf16, fp16); the inputs are integers, which only this layer turns into floats.
        signs = (2 * ids - 1).to(self.linear.weight.dtype)
        return torch.relu(self.linear(signs)).unsqueeze(1)

    def initialise(self, parameter: nn.Parameter, name: str, owner: nn.Module, generator: torch.Generator) -> None:
        """Weights and biases uniform(+-1 / sqrt(fan in)), torch's usual."""
        weight = owner.weight  # linear's, or the head's
        assert isinstance(weight, Tensor)
        bound = weight.shape[1] ** -0.5
        parameter.uniform_(-bound, bound, generator=generator)


def build(section: MLPConfig, *, vocab_size: int, classes: int, length: int) -> Parts:
    """The parts of a learner of `length` bits a sample."""
    return Parts(MLP(length, section.width), bias=True)

"""What a kind of model brings: a body, and how its head is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Body(nn.Module, ABC):
    """Token ids to final hidden states; it initialises the weights of the learner that it is the body of."""

    @abstractmethod
    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """ids [B, L] int64; segments [B, L] int64, documents that attention stays inside, or None -> hidden [B, R, D].

        R rows a sample: its L tokens, or one for all.
        """

    @abstractmethod
    def initialise(self, parameter: nn.Parameter, name: str, owner: nn.Module, generator: torch.Generator) -> None:
        """Fill a parameter in place, without gradients; name: within the learner; owner: the module that has it."""


@dataclass(frozen=True)
class Parts:
    """A learner before its head.

    transform   applied to the labelled positions alone, [N, D] -> [N, D], between body and head; None: nothing
    bias        whether the head has one
    embedding   whose weight [V, D] the head shares; None: it has its own
    """

    body: Body
    transform: nn.Module | None = None
    bias: bool = False
    embedding: nn.Embedding | None = None

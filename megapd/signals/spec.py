"""Carried out of megapd/signal.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch

Kind = Literal["dense", "hidden", "topk", "sampled", "argmax"]


Encoding = Literal["fp32", "bf16", "fp16", "int8"]


DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class SignalSpec:
    """What a run asks its teacher for; the same for every batch.

    encoding     type of dense and hidden values and of topk's log probabilities; int8 for hidden alone
    k            classes of topk, draws of sampled; 0 for the other kinds
    temperature  the teacher's, of topk and sampled
    seed         of sampled: a draw is a pure function of (seed, sample, position)
    """

    kind: Kind
    encoding: Encoding = "fp32"
    k: int = 0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        sparse = self.kind in ("topk", "sampled")
        if (self.k > 0) != sparse:
            raise ValueError(f"k: {self.k} with kind {self.kind}; topk and sampled need at least 1, other kinds have none")
        if sparse and not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} with kind {self.kind}; choose argmax for 0")
        if self.encoding == "int8" and self.kind != "hidden":
            raise ValueError(f"encoding: int8 is for hidden states, not for {self.kind}; choose fp16")

    @cached_property
    def parameters(self) -> str:
        """Canonical JSON of the kind and what matters to it: signals of equal parameters can stand for each other."""
        chosen: dict[str, Any] = {"kind": self.kind}
        if self.kind in ("dense", "hidden", "topk"):
            chosen["encoding"] = self.encoding
        if self.kind in ("topk", "sampled"):
            chosen |= {"k": self.k, "temperature": self.temperature}
        if self.kind == "sampled":
            chosen["seed"] = self.seed
        return json.dumps(chosen, sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=64)
    def parse(parameters: str | bytes) -> SignalSpec:
        """The spec of what `parameters` returned; ValueError for anything else."""
        try:
            tree = json.loads(parameters)
        except RecursionError as error:
            raise ValueError("parameters: nested too deep") from error
        if not isinstance(tree, dict) or tree.keys() - {"kind", "encoding", "k", "temperature", "seed"}:
            raise ValueError("parameters: not those of a signal")
        kinds, encodings = ("dense", "hidden", "topk", "sampled", "argmax"), tuple(DTYPES)
        if tree.get("kind") not in kinds or tree.get("encoding", "fp32") not in encodings:
            raise ValueError(f"parameters: kind must be one of {', '.join(kinds)}, encoding one of {', '.join(encodings)}")
        numbers = [tree.get("k", 0), tree.get("seed", 0), tree.get("temperature", 1.0)]
        if not all(type(number) is int for number in numbers[:2]) or type(numbers[2]) not in (int, float):
            raise ValueError("parameters: k and seed are integers, temperature is a number")
        if not 0 <= numbers[0] < 1 << 20 or not 0 <= numbers[1] < 1 << 63 or not 0 < numbers[2] < float("inf"):
            raise ValueError("parameters: k, seed or temperature out of range")
        return SignalSpec(**tree)

    def bytes_per_position(self, classes: int, width: int) -> float:
        """Bytes that the signal of one labelled position takes; for hidden without the head."""
        size, ids = DTYPES[self.encoding].itemsize, _id_type(classes).itemsize
        return {
            "dense": classes * size,
            "hidden": width * size + (4 if self.encoding == "int8" else 0),
            "topk": self.k * (ids + size) + size,
            "sampled": self.k * ids,
            "argmax": ids,
        }[self.kind]


def negotiate(
    classes: int, width: int, teacher_temperature: float, divergence: str, positions_per_rotation: float = float("inf")
) -> Kind:
    """The cheapest kind that is exact for the loss: argmax where it alone counts, else logits or hidden states.

    Hidden states cost `width` values a position and the head, `classes` x `width`, once a rotation.
    """
    if teacher_temperature == 0.0 and divergence in ("forward_kl", "soft_cross_entropy"):
        return "argmax"
    return "dense" if classes <= width * (1.0 + classes / positions_per_rotation) else "hidden"


def _id_type(classes: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if classes <= 1 << 16 else np.uint32)

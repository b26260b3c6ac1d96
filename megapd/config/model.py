"""Section `model`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megapd.config.base import OpenSection
from megapd.registry import Registry, models


class ModelConfig(OpenSection):
    """A student's architecture. `builder(section, vocab_size=, classes=, length=)` gives its megapd.models.Parts.

    FLOPs are those of forward and backward a token of input, for the model FLOPs utilisation (Chowdhery et al. 2022, app. B): a
    matrix product of [1, m] by [m, n] counts 2 m n, its backward twice that. Lookups, norms, activations and what activation
    checkpointing computes again count nothing.
    """

    registry: ClassVar[Registry[type[Any]]] = models
    tag: ClassVar[str] = "kind"

    kind: str

    @property
    @abstractmethod
    def head_width(self) -> int:
        """Width of the hidden states that the head multiplies."""

    @property
    @abstractmethod
    def causal(self) -> bool | None:
        """Whether a token sees the earlier ones alone (as next-token prediction needs); None: it reads no sequences of tokens."""

    @abstractmethod
    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        """length: tokens a sample. labelled_share: labelled positions a token."""

    @abstractmethod
    def activations(self, length: int) -> int:
        """Values that a sample of `length` tokens keeps from forward to backward, roughly; without the loss."""


@models.register("mlp")
class MLPConfig(ModelConfig):
    """One hidden ReLU layer over +-1 inputs."""

    builder = "megapd.models.mlp:build"

    kind: Literal["mlp"] = "mlp"
    width: int = Field(50, ge=1)

    @property
    def head_width(self) -> int:
        return self.width

    @property
    def causal(self) -> None:
        return None

    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        """4 W + s * 6 W V with s = labelled_share, for the input needs no gradient; s = 1 / L where a sample has one label."""
        return 4.0 * self.width + labelled_share * 6.0 * self.width * classes

    def activations(self, length: int) -> int:
        return 2 * self.width


@models.register("gpt")
@models.register("bert")
class TransformerConfig(ModelConfig):
    """GPT (causal, pre-LN) or BERT (bidirectional, post-LN)."""

    builder = "megapd.models.transformer:build"

    kind: Literal["gpt", "bert"]
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    hidden: int = Field(256, ge=1)
    ffn: int | None = Field(None, ge=1, description="width of the feed-forward layer; default 4 * hidden")
    max_length: int | None = Field(None, ge=1, description="learned positions; default: the task's length")
    tied: bool = Field(True, description="the head shares the embedding's weight")
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile each block")

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        return self

    @property
    def ffn_width(self) -> int:
        return self.ffn if self.ffn is not None else 4 * self.hidden

    @property
    def head_width(self) -> int:
        return self.hidden

    @property
    def causal(self) -> bool:
        return self.kind == "gpt"

    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        """3 * (layers * (8 D^2 + 4 D F + 4 D K) + s * (2 D V + [BERT] 2 D^2)), with D hidden, F ffn, V classes, s labelled_share.

        K is the mean number of keys a query sees: length for BERT, (length + 1) / 2 for GPT, where the cited paper counts length.
        A document mask is not subtracted.
        """
        keys = (length + 1) / 2 if self.causal else length
        block = 8.0 * self.hidden**2 + 4.0 * self.hidden * self.ffn_width + 4.0 * self.hidden * keys
        head = 2.0 * self.hidden * classes + (0.0 if self.causal else 2.0 * self.hidden**2)
        return 3.0 * (self.layers * block + labelled_share * head)

    def activations(self, length: int) -> int:
        """Without dropout and with a fused attention: 30 hidden-sized values a token and layer (after arXiv 2205.05198, section
        4), of which checkpointing keeps one a layer."""
        return length * self.hidden * (30 + self.layers if self.activation_checkpointing else 30 * self.layers)

"""Learner: body, head and loss as one module; how it is built, initialised and counted."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from megapd.batch import Batch
from megapd.config import ModelConfig
from megapd.models.body import Body, Parts
from megapd.models.heads import LossHead
from megapd.registry import imported
from megapd.signals import Signal
from megapd_kernels import LossOptions


class Learner(nn.Module):
    """A model that turns a batch and a teacher's signal into a loss; teachers are learners too.

    transform: applied to the labelled positions alone, between body and head (BERT's); None: nothing.
    Submodules are called, never their methods, so that the hooks of ZeRO-3 run at every one of them.
    """

    def __init__(self, body: Body, transform: nn.Module | None, head: LossHead) -> None:
        super().__init__()
        self.body, self.transform, self.head = body, transform, head

    def forward(
        self,
        batch: Batch,
        signal: Signal | None = None,
        denominator: float | None = None,
        mode: Literal["loss", "hidden", "logits"] = "loss",
    ) -> tuple[Tensor, Tensor] | Tensor:
        """mode loss -> (loss, stats); hidden -> final hidden states [N, D]; logits -> [N, V]; N labelled positions.

        loss: scalar, the sum over the positions divided by `denominator` (None: N). stats: detached float64 [3], sums
        of divergence, cross entropy and correct predictions over the N positions. Without a signal the loss is the
        labels' cross entropy.
        """
        hidden_ND: Tensor = self._labelled(batch, self.body(batch.ids, batch.segments))
        if self.transform is not None:
            hidden_ND = self.transform(hidden_ND)
        if mode == "hidden":
            return hidden_ND
        if mode == "logits":
            logits_NV: Tensor = self.head(hidden_ND, mode="logits")
            return logits_NV
        result = self.head(hidden_ND, batch.labels, signal, denominator)
        sums = (result.divergence, result.cross_entropy, result.correct)
        return result.loss, torch.stack([s.detach().to(torch.float64) for s in sums])

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [N, D] of the labelled positions: what the head's weight multiplies."""
        hidden_ND: Tensor = self(batch, mode="hidden")
        return hidden_ND

    def logits(self, batch: Batch) -> Tensor:
        """Logits [N, V] of the labelled positions."""
        logits_NV: Tensor = self(batch, mode="logits")
        return logits_NV

    def _labelled(self, batch: Batch, hidden_BRD: Tensor) -> Tensor:
        """The rows [N, D] that predict; R rows a sample: its tokens, or one for all (mlp)."""
        rows = hidden_BRD.flatten(0, 1)
        if batch.labelled == batch.tokens == rows.shape[0]:
            return rows  # positions increase, so as many as there are tokens means all of them, in order
        tokens_a_row = batch.ids.shape[1] // hidden_BRD.shape[1]
        return rows.index_select(0, batch.positions if tokens_a_row == 1 else batch.positions // tokens_a_row)


def build_model(
    model_config: ModelConfig, *, vocab_size: int, classes: int, length: int, options: LossOptions, seed: int
) -> Learner:
    """A learner on the CPU in fp32, initialised by `init_weights(.., seed)`.

    vocab_size: token ids are below it. classes: labels are below it. length: tokens a sample.
    Raises UserError where the model cannot have that shape.
    """
    # On the meta device the constructors draw no random numbers, which init_weights would overwrite anyway.
    with torch.device("meta"):
        parts: Parts = imported(model_config.builder)(model_config, vocab_size=vocab_size, classes=classes, length=length)
    parts.body.to_empty(device="cpu")
    if parts.transform is not None:
        parts.transform.to_empty(device="cpu")
    head = LossHead(model_config.head_width, classes, bias=parts.bias, options=options, embedding=parts.embedding)
    learner = Learner(parts.body, parts.transform, head)
    init_weights(learner, seed)
    return learner


@torch.no_grad()
def init_weights(learner: Learner, seed: int) -> None:
    """Initialise every parameter in place as the body's kind does, each from a generator keyed by (seed, its name).

    So a parameter's value depends neither on the order of construction nor on which other parameters exist.
    """
    for name, parameter in learner.named_parameters():
        generator = torch.Generator().manual_seed(_key(seed, name))
        learner.body.initialise(parameter, name, learner.get_submodule(name.rpartition(".")[0]), generator)


def _key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # manual_seed takes a signed 64-bit number


class ParameterCount(NamedTuple):
    total: int
    without_embeddings: int


def parameter_count(model: nn.Module) -> ParameterCount:
    """Parameters in all, and without embedding tables (tokens, positions, types); a shared one counts once.

    An untied head is no embedding table. Whole sizes, also where ZeRO-3 has partitioned the parameters.
    """
    sizes = {id(p): _size(p) for p in model.parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return ParameterCount(sum(sizes.values()), sum(size for key, size in sizes.items() if key not in tables))


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())

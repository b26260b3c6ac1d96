"""Learner: body, head and loss as one module; how it is built, initialised and counted."""

from __future__ import annotations

import hashlib
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from megapd.batch import Batch
from megapd.config import MLPConfig, ModelConfig, TransformerConfig
from megapd.errors import UserError
from megapd.models.heads import LossHead
from megapd.models.mlp import MLP
from megapd.models.transformer import MaskedTransform, Transformer
from megapd.signals import Signal
from megapd_kernels import LossOptions

INIT_STD = 0.02  # GPT-2's and BERT's


class Learner(nn.Module):
    """A model that turns a batch and a teacher's signal into a loss; teachers are learners too.

    transform: applied to the labelled positions alone, between body and head (BERT's); None: nothing.
    Submodules are called, never their methods, so that the hooks of ZeRO-3 run at every one of them.
    """

    def __init__(self, body: MLP | Transformer, transform: MaskedTransform | None, head: LossHead) -> None:
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
        hidden_ND = self._labelled(batch, self.body(batch.ids, batch.segments))
        if self.transform is not None:
            hidden_ND = self.transform(hidden_ND)
        if mode == "hidden":
            return hidden_ND
        if mode == "logits":
            return self.head(hidden_ND, mode="logits")
        result = self.head(hidden_ND, batch.labels, signal, denominator)
        sums = (result.divergence, result.cross_entropy, result.correct)
        return result.loss, torch.stack([s.detach().to(torch.float64) for s in sums])

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [N, D] of the labelled positions: what the head's weight multiplies."""
        return self(batch, mode="hidden")

    def logits(self, batch: Batch) -> Tensor:
        """Logits [N, V] of the labelled positions."""
        return self(batch, mode="logits")

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
    Raises UserError if `length` exceeds model.max_length, or a tied head would need classes != vocab_size.
    """
    body: MLP | Transformer
    transform = embedding = None
    # On the meta device the constructors draw no random numbers, which init_weights would overwrite anyway.
    with torch.device("meta"):
        if isinstance(model_config, MLPConfig):
            body, width, bias = MLP(length, model_config.width), model_config.width, True
        else:
            _check(model_config, vocab_size, classes, length)
            body, width = Transformer(model_config, vocab_size, model_config.max_length or length), model_config.hidden
            bias = model_config.kind == "bert"
            transform = MaskedTransform(width) if bias else None
    body.to_empty(device="cpu")
    if transform is not None:
        transform.to_empty(device="cpu")
    if isinstance(body, Transformer) and isinstance(model_config, TransformerConfig) and model_config.tied:
        embedding = body.tokens
    learner = Learner(body, transform, LossHead(width, classes, bias=bias, options=options, embedding=embedding))
    init_weights(learner, seed)
    return learner


def _check(model_config: TransformerConfig, vocab_size: int, classes: int, length: int) -> None:
    if model_config.max_length is not None and length > model_config.max_length:
        raise UserError(f"model.max_length: {model_config.max_length} is below the task's {length} tokens a sample; raise it")
    if model_config.tied and classes != vocab_size:
        raise UserError(
            f"model.tied: the task has {classes} classes but {vocab_size} tokens, so head and embedding cannot share a weight; "
            "set model.tied=false"
        )


@torch.no_grad()
def init_weights(learner: Learner, seed: int) -> None:
    """Initialise every parameter in place, each from a generator keyed by (seed, its name).

    So a parameter's value depends neither on the order of construction nor on which other parameters exist.
    GPT: matrices and embeddings normal(0, 0.02), the projections into the residual stream scaled by
    1 / sqrt(2 * layers) (Radford et al. 2019, 2.3). BERT: normal(0, 0.02). Biases 0, norms 1 and 0.
    MLP: weights and biases uniform(+-1 / sqrt(fan in)), torch's usual.
    """
    for name, parameter in learner.named_parameters():
        generator = torch.Generator().manual_seed(_key(seed, name))
        owner, _, leaf = name.rpartition(".")
        if isinstance(learner.body, MLP):
            fan_in = learner.get_parameter(f"{owner}.weight").shape[1]
            parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        elif isinstance(learner.get_submodule(owner), nn.LayerNorm):
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
        elif leaf == "bias":
            parameter.zero_()
        else:
            residual = learner.body.causal and owner.endswith(("attention.out", "down"))
            parameter.normal_(
                0.0, INIT_STD / math.sqrt(2 * len(learner.body.blocks)) if residual else INIT_STD, generator=generator
            )


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


def flops_per_token(model_config: ModelConfig, *, classes: int, length: int, labelled_share: float) -> float:
    """FLOPs of forward and backward a token of input, for the model FLOPs utilisation (Chowdhery et al. 2022, app. B).

    A matrix product of [1, m] by [m, n] counts 2 m n; its backward twice that. Lookups, norms, activations and what
    activation checkpointing computes again count nothing. With D hidden, F ffn, L length, V classes, s labelled_share
    (labelled positions a token):

        transformer  3 * (layers * (8 D^2 + 4 D F + 4 D K) + s * (2 D V + [BERT] 2 D^2))
        mlp          4 W + s * 6 W V, for the input needs no gradient; s = 1 / L where a sample has one label

    K is the mean number of keys a query sees: L for BERT, (L + 1) / 2 for GPT, where the cited paper counts L. A
    document mask is not subtracted.
    """
    if isinstance(model_config, MLPConfig):
        return 4.0 * model_config.width + labelled_share * 6.0 * model_config.width * classes
    hidden, ffn, bert = model_config.hidden, model_config.ffn_width, model_config.kind == "bert"
    keys = length if bert else (length + 1) / 2
    block = 8.0 * hidden**2 + 4.0 * hidden * ffn + 4.0 * hidden * keys
    head = 2.0 * hidden * classes + (2.0 * hidden**2 if bert else 0.0)
    return 3.0 * (model_config.layers * block + labelled_share * head)

"""A model: its kind's body, the head with the loss, and the Learner that is both; how it is built, initialised and counted."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapd.batch import Batch
from megapd.config import LanguageModelConfig, ModelConfig
from megapd.errors import UserError
from megapd.registry import imported
from megapd.signals import LossTargets, Signal
from megapd_kernels import LossOptions, LossResult, linear_cross_entropy, linear_distillation_loss, softmax_kl


class Body(nn.Module, ABC):
    """Token ids to final hidden states; it initialises the weights of the learner that it is the body of.

    plan: how tensor parallelism splits that learner, see sharding.py; empty: not at all
    """

    plan: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def forward(self, ids: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """ids [B, L] int64; segments [B, L] int64, documents that attention stays inside, or None; lengths [B] int64, tokens of
        each row before padding that no other token sees, or None -> hidden [B, R, D].

        R rows a sample: its L tokens, or one for all. lengths is given by its name, and only of batches that have padding.
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


def check_sizes(section: LanguageModelConfig, vocab_size: int, classes: int, length: int) -> None:
    """For a transformer's build: UserError if `length` exceeds model.max_length, or a tied head would need classes !=
    vocab_size."""
    if section.max_length is not None and length > section.max_length:
        raise UserError(f"model.max_length: {section.max_length} is below the task's {length} tokens a sample; raise it")
    if section.tied and classes != vocab_size:
        raise UserError(
            f"model.tied: the task has {classes} classes but {vocab_size} tokens, so head and embedding cannot share a weight; "
            "set model.tied=false"
        )


class Compared(NamedTuple):
    """At how many labelled positions of a batch student and teacher are compared, and by how many likeliest classes, 0: none."""

    positions: int
    top: int = 0


# What is told of student and teacher, at temperature 1: KL(teacher || student), the teacher's cross entropy, both entropies
# [nats]; the share of the positions at which both have the same likeliest class; the share of the teacher's `top` classes that
# are among the student's.
STATISTICS = ("kl", "teacher_cross_entropy", "entropy", "teacher_entropy", "agreement", "top_agreement")


class LossHead(nn.Module):
    """Output layer, weight [V, D] and bias [V] or None, with the loss of its logits.

    The fused loss never forms the logits, so it needs the output weight itself. Under ZeRO-3 that weight exists on a rank
    only while the module that registers it runs, between the hooks of its __call__. Hence the module that owns the weight
    calls the kernel, inside the model's forward: DeepSpeed gathers the weight before, reduces its gradient after, and no
    other code touches it. A tied head registers the embedding's Parameter a second time; ZeRO counts it once.

    embedding: the token embedding whose weight is shared (V its rows); None: a weight of its own, left uninitialised.
    """

    def __init__(
        self, width: int, classes: int, *, bias: bool, options: LossOptions, embedding: nn.Embedding | None = None
    ) -> None:
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(classes, width)) if embedding is None else embedding.weight
        assert self.weight.shape == (classes, width), f"a tied head of {classes} x {width} on {tuple(self.weight.shape)}"
        self.bias = nn.Parameter(torch.empty(classes)) if bias else None

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        signal: Signal | None = None,
        denominator: float | None = None,
        mode: Literal["loss", "logits"] = "loss",
        compared: Compared | None = None,
    ) -> LossResult | tuple[LossResult, Tensor] | Tensor:
        """mode loss: hidden [N, D], labels [N] int64 -> LossResult, with `compared` a pair of it and what `_compare` tells; mode
        logits: hidden -> logits [N, V] in its dtype.

        With a signal the loss is the one `options` describe; without, the labels' cross entropy, whatever alpha says.
        denominator: what the sums are divided by; None: the N positions.
        """
        if mode == "logits":
            return F.linear(hidden, self.weight, self.bias)
        options, targets = self.options, LossTargets() if signal is None else signal.targets
        if signal is None:
            options = dataclasses.replace(options, alpha=1.0)
        elif "temperature" in signal.spec.definition.uses:  # its probabilities have the temperature already
            options = dataclasses.replace(options, teacher_temperature=1.0)
        result = linear_distillation_loss(
            hidden, self.weight, bias=self.bias, labels=labels, denominator=denominator, options=options, **targets
        )
        if compared is None:
            return result
        assert labels is not None
        return result, self._compare(hidden, labels, signal, compared)

    @torch.no_grad()
    def _compare(self, hidden: Tensor, labels: Tensor, signal: Signal | None, compared: Compared) -> Tensor:
        """[2, 6] float64: sums of STATISTICS over some positions, evenly spaced, and over how many; 0 of what the signal does
        not tell. The loss's own pass could tell most, at a cost of half of it again (benchmarks/compared.py)."""
        count = min(compared.positions, len(labels))
        rows = torch.arange(count, device=hidden.device) * len(labels) // max(count, 1)
        hidden, labels = hidden.index_select(0, rows), labels[rows]
        own, kind = self.options, None if signal is None else signal.spec.definition
        targets = LossTargets()
        if signal is not None and kind is not None and kind.lossless:
            targets = signal.map(lambda tensor: tensor[rows]).targets
        options = LossOptions(
            per_token=True,
            top_k_agreement=compared.top if targets and compared.top < self.weight.shape[0] else 0,
            common_vocabulary=own.common_vocabulary,
            logit_scale=own.logit_scale,
            soft_cap=own.soft_cap,
            teacher_logit_scale=own.teacher_logit_scale,
            teacher_soft_cap=own.teacher_soft_cap,
            product_dtype=own.product_dtype,
            chunk_bytes=own.chunk_bytes,
        )
        result = linear_distillation_loss(hidden, self.weight, bias=self.bias, labels=labels, options=options, **targets)
        tokens = result.tokens
        assert tokens is not None
        found = {"entropy": tokens.entropy}
        if targets:
            found |= {"kl": result.divergence, "teacher_entropy": tokens.teacher_entropy, "agreement": tokens.agreement}
            found["teacher_cross_entropy"] = _teacher_cross_entropy(targets, labels, options, self.weight.shape[0])
            if options.top_k_agreement:
                found["top_agreement"] = tokens.top_k_agreement
        elif signal is not None and kind is not None and (likeliest := kind.likeliest(signal.values[rows])) is not None:
            found["agreement"] = likeliest == tokens.argmax
        told = [found[name].sum().double() if name in found else hidden.new_zeros((), dtype=torch.float64) for name in STATISTICS]
        known = [float(count if name in found else 0) for name in STATISTICS]
        return torch.stack([torch.stack(told), torch.tensor(known, dtype=torch.float64, device=hidden.device)])


def _teacher_cross_entropy(targets: LossTargets, labels: Tensor, options: LossOptions, classes: int) -> Tensor:
    """The sum over the positions, at temperature 1; of a student with other classes over those that both have."""
    shaped = dataclasses.replace(
        options,
        per_token=False,
        top_k_agreement=0,
        common_vocabulary=False,
        logit_scale=options.teacher_logit_scale,
        soft_cap=options.teacher_soft_cap,
    )
    if (logits := targets.get("teacher_logits")) is not None:
        return softmax_kl(logits[:, :classes], labels=labels, options=shaped).cross_entropy
    bias = targets["teacher_bias"]
    weight, bias = targets["teacher_weight"][:classes], None if bias is None else bias[:classes]
    return linear_cross_entropy(targets["teacher_hidden"], weight, labels, bias=bias, options=shaped).cross_entropy


class Learner(nn.Module):
    """A model that turns a batch and a teacher's signal into a loss; teachers are learners too.

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
        compared: Compared | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """mode loss -> (loss, stats); hidden -> final hidden states [N, D]; logits -> [N, V]; N labelled positions.

        loss: scalar, the sum over the positions divided by `denominator` (None: N). stats: detached float64 [3], sums
        of divergence, cross entropy and correct predictions over the N positions; with `compared` [15], followed by sums of
        STATISTICS and their counts. Without a signal the loss is the labels' cross entropy.
        """
        padded = {} if batch.lengths is None else {"lengths": batch.lengths}
        hidden_ND: Tensor = self._labelled(batch, self.body(batch.ids, batch.segments, **padded))
        if self.transform is not None:
            hidden_ND = self.transform(hidden_ND)
        if mode == "hidden":
            return hidden_ND
        if mode == "logits":
            logits_NV: Tensor = self.head(hidden_ND, mode="logits")
            return logits_NV
        found = self.head(hidden_ND, batch.labels, signal, denominator, compared=compared)
        result, told = (found, None) if compared is None else found
        sums = torch.stack([s.detach().to(torch.float64) for s in (result.divergence, result.cross_entropy, result.correct)])
        return result.loss, sums if told is None else torch.cat([sums, told.flatten()])

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
    """Initialise every parameter in place as the body's kind does, each from a generator keyed by (seed, its name, its shape).

    So a parameter's value depends neither on the order of construction nor on which other parameters exist, and a narrow model
    does not begin with the first numbers of a wide one of the same seed: of an mlp, that would be a part of the wider network.
    """
    for name, parameter in learner.named_parameters():
        keyed = f"{seed}/{name}/{tuple(parameter.shape)}"
        digest = hashlib.blake2b(keyed.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little") >> 1  # manual_seed takes a signed 64-bit number
        generator = torch.Generator().manual_seed(key)
        learner.body.initialise(parameter, name, learner.get_submodule(name.rpartition(".")[0]), generator)


class ParameterCount(NamedTuple):
    total: int
    without_embeddings: int


def parameter_count(model: nn.Module) -> ParameterCount:
    """Parameters in all, and without embedding tables (tokens, positions, types); a shared one counts once.

    An untied head is no embedding table. Whole sizes, also where ZeRO-3 has partitioned the parameters.
    """
    sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return ParameterCount(sum(sizes.values()), sum(size for key, size in sizes.items() if key not in tables))

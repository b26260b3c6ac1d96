"""Tensor parallelism for inference: a built model is changed from outside, so that every rank holds a part of its matrices.

A layer's first matrix is split by output features, so that no rank needs another's, the second by input features, whose
products are summed over the ranks (Shoeybi et al. 2019, section 3): two sums a block. Embedding and head are split by rows,
that is by classes; the head's logits stay where they are, for the kernels' VocabularyShard.

No rank needs ever hold the whole model: build it on the meta device, shard it there, then `allocate` what is left:

    model = build_pretrained(config, dtype, torch.device("meta"))
    parts = shard(model, plan_for(model), rank, ranks, group)
    allocate(model, device)

and fill it by reading `parts` alone (Trajectory.read, read_pretrained). A model that is whole already is cut in place.
No gradient flows through any of this. All ranks of the group must run the same batches at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megapd.errors import UserError
from megapd.models.build import Learner
from megapd.models.layers import Embedding
from megapd.slices import Part, Ranges
from megapd_kernels import VocabularyShard

# colwise          output features are split, and the bias
# colwise_qkv      the same, of three matrices one below the other (query, key, value), each by whole heads
# rowwise          input features are split; the outputs are summed over the ranks, then comes the whole bias
# vocabulary       rows of an embedding are split; a rank gives zeros for the ids of others, and the outputs are summed
# vocabulary_head  rows of the output layer are split, and the bias: each rank gives the logits of its own classes
Style = Literal["colwise", "colwise_qkv", "rowwise", "vocabulary", "vocabulary_head"]
BY_CLASSES = ("vocabulary", "vocabulary_head")

# By dotted name, * for a number. Position and type embeddings, norms and BERT's transform are whole on every rank.
PLANS: dict[str, dict[str, Style]] = {
    # By model_type, of transformers' models without a plan of their own; names below the base model. Output layer and token
    # embedding are added.
    "bert": {
        "encoder.layer.*.attention.self.query": "colwise",
        "encoder.layer.*.attention.self.key": "colwise",
        "encoder.layer.*.attention.self.value": "colwise",
        "encoder.layer.*.attention.output.dense": "rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    },
}

# transformers' names of the styles; None: whole on every rank. Before 4.56 colwise_gather_output was called colwise_rep.
_STYLES: dict[str, Style | None] = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    "embedding_rowwise": "vocabulary",
    "replicate": None,
    "replicated_with_grad_allreduce": None,
}
_GATHERED = ("colwise_gather_output", "colwise_rep")  # of the output layer alone, where nothing needs to be gathered
_LOCAL_SIZES = ("num_attention_heads", "all_head_size")  # of transformers' BERT, whose releases before 5 read them in forward
USE_ZERO = "choose teacher.sharding zero, which works for every architecture"

Chosen = tuple[str, nn.Module, Style]  # a module that a plan names, under its name


def plan_for(model: nn.Module) -> dict[str, Style]:
    """The plan of a Learner or of a Pretrained. Raises UserError if it has none."""
    if isinstance(model, Learner):
        if not model.body.plan:
            raise UserError(f"teacher.sharding: an {type(model.body).__name__} cannot be split by tensor; choose whole or zero")
        return cast("dict[str, Style]", dict(model.body.plan))
    return plan_of(model)


def plan_of(model: Any) -> dict[str, Style]:
    """The plan of a model of transformers, bare or in a Pretrained, from what its configuration and class say.

    Output layer and token embedding are split by classes whether they name them or not, if they are plain layers. Raises
    UserError if the model has no plan, or asks for a style that is not known here.
    """
    network, prefix = (model.network, "network.") if hasattr(model, "network") else (model, "")
    kind = network.config.model_type
    names = {id(module): name for name, module in network.named_modules()}
    output, tokens = network.get_output_embeddings(), network.get_input_embeddings()
    base_plan = getattr(network.config, "base_model_tp_plan", None) or PLANS.get(kind)
    if not base_plan:
        raise UserError(f"teacher.sharding: {kind} brings no plan for tensor; {USE_ZERO}")
    base = f"{network.base_model_prefix}." if hasattr(network, network.base_model_prefix) else ""
    found = {f"{base}{key}": style for key, style in base_plan.items()} | dict(type(network)._tp_plan or {})
    parameters = {name for name, _ in network.named_parameters()}
    plan: dict[str, Style] = {}
    for key, theirs in found.items():
        matched = [name for name in [*names.values(), *parameters] if _matches(key, name)]
        own = "vocabulary_head" if names.get(id(output)) in matched and theirs in _GATHERED else _STYLES.get(theirs, theirs)
        if not matched or own is None:
            continue  # a plan also names what only some configurations of the architecture have
        if own not in (*_STYLES.values(), "vocabulary_head") or parameters.intersection(matched):
            raise UserError(f"teacher.sharding: the plan of {kind} has {theirs} for {key}, which tensor does not do; {USE_ZERO}")
        plan[prefix + key] = own
    ends: tuple[tuple[Any, Style], ...] = ((tokens, "vocabulary"), (output, "vocabulary_head"))
    for module, style in ends:
        if module is not None:
            plan[prefix + names[id(module)]] = style
    return plan


def chosen_by(plan: Mapping[str, Style], model: nn.Module) -> Iterator[Chosen]:
    """What the plan names, and of what shares a weight with an embedding or head that it names."""
    styles: dict[str, Style] = {}
    modules = dict(model.named_modules())
    for key, style in plan.items():
        names = [name for name in modules if _matches(key, name)]
        if not names:
            raise ValueError(f"plan: no module is called {key}")
        styles.update(dict.fromkeys(names, style))
    tables = {id(modules[name].weight) for name, style in styles.items() if style in BY_CLASSES}
    for name, module in modules.items():
        if name not in styles and id(module._parameters.get("weight")) in tables:
            styles[name] = "vocabulary" if isinstance(module, nn.Embedding) else "vocabulary_head"
    return ((name, modules[name], style) for name, style in styles.items())


def _matches(key: str, name: str) -> bool:
    return re.fullmatch(re.escape(key).replace(r"\*", r"[^.]+"), name) is not None


# --------------------------------------------------------------------------------------------------------------------- split


def shard(model: nn.Module, plan: Mapping[str, Style], rank: int, ranks: int, group: dist.ProcessGroup | None) -> dict[str, Part]:
    """Keep this rank's part of the modules that `plan` names; returns for every parameter the part of the stored tensor it is.

    model: whole, on any device; on the meta device nothing is allocated. plan: see PLANS and `plan_for`. group: the `ranks`
    processes that share the model; None: all there are. A weight that two modules share is split once and stays shared.
    Parameters that the plan does not reach stay as they are (their Part is None). With one rank nothing changes.

    Raises UserError, with nothing changed, if heads or features cannot be divided by `ranks`, or a rank would get no class.
    """
    assert 0 <= rank < ranks
    if ranks > 1:
        chosen = list(chosen_by(plan, model))
        _check(model, chosen, ranks)
        _split(model, chosen, rank, ranks, group)
        model.requires_grad_(False)
    return {name: getattr(parameter, "part", None) for name, parameter in model.named_parameters()}


def vocabulary_shard(classes: int, rank: int, ranks: int, group: dist.ProcessGroup | None) -> VocabularyShard:
    """Which of the whole head's `classes` a rank's head holds, for the kernels."""
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    return VocabularyShard.of(group, _rows(classes, rank, ranks)[0], classes)


def allocate(model: nn.Module, device: torch.device) -> nn.Module:
    """The same model with uninitialised memory on `device` for what is on the meta device, and everything else moved there.

    Module.to_empty would give weights that two modules share a memory each, and lose the contents of buffers.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                tensor = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.detach().to(device)
                made[id(parameter)] = _parameter(tensor, parameter, getattr(parameter, "part", None))
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                assert not buffer.is_meta, f"buffer {name} has no contents"
                module._buffers[name] = buffer.to(device)
    return model


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the stored tensor that a parameter is, or is a part of; ZeRO-3's partitions included."""
    return tuple(getattr(parameter, "whole_shape", getattr(parameter, "ds_shape", parameter.shape)))


def _check(model: nn.Module, chosen: list[Chosen], ranks: int) -> None:
    for what, number in _heads(model, chosen):
        if number % ranks:
            raise UserError(
                f"teacher.sharding: {number} {what} cannot be divided by {ranks} ranks; start other ranks, or {USE_ZERO}"
            )
    for name, module, style in chosen:
        weight = module._parameters.get("weight")
        # What a subclass does beside its product is not known here. An output layer is any module that has its weight.
        kinds: tuple[type, ...] = (nn.Embedding, Embedding) if style == "vocabulary" else (nn.Linear,)
        if weight is None or weight.ndim != 2 or (style != "vocabulary_head" and type(module) not in kinds):
            raise UserError(f"teacher.sharding: {name} is a {type(module).__name__}, which tensor cannot split; {USE_ZERO}")
        if style in BY_CLASSES:
            rows = weight.shape[0]
            if _rows(rows, ranks - 1, ranks)[0] >= rows:
                raise UserError(f"teacher.sharding: {rows} classes of {name} leave one of {ranks} ranks none; start fewer ranks")
            continue
        features = weight.shape[1 if style == "rowwise" else 0] // (3 if style == "colwise_qkv" else 1)
        if features % ranks:
            raise UserError(
                f"teacher.sharding: {features} features of {name} cannot be divided by {ranks} ranks; start others, or {USE_ZERO}"
            )


def _heads(model: nn.Module, chosen: list[Chosen]) -> Iterator[tuple[str, int]]:
    for owner in _owners(model, chosen):
        for attribute in getattr(owner, "head_counts", ()):
            yield "attention heads" if attribute == "heads" else "key-value heads", getattr(owner, attribute)
    for module in model.modules():
        if hasattr(module, "config"):
            config: Any = module.config
            config = config.get_text_config()
            yield "attention heads", config.num_attention_heads
            yield "key-value heads", getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            return


def _split(model: nn.Module, chosen: list[Chosen], rank: int, ranks: int, group: dist.ProcessGroup | None) -> None:
    cuts: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # id of a whole one: it, so that no other gets its id, and its part

    def cut(parameter: nn.Parameter, part: Ranges) -> nn.Parameter:
        """Once, so that what is shared stays shared; a copy always, so that the whole tensor can go."""
        if id(parameter) not in cuts:
            pieces = [parameter.detach().narrow(part.dim, start, stop - start) for start, stop in part.ranges]
            cuts[id(parameter)] = parameter, _parameter(torch.cat(pieces, part.dim), parameter, part)
        return cuts[id(parameter)][1]

    for name, module, style in chosen:
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        part = _part(style, weight.shape, rank, ranks)
        own = cut(weight, part)
        if style == "rowwise":
            _replace(model, name, RowwiseLinear(own, bias, group))
        elif style == "vocabulary":
            start = part.ranges[0][0]
            _replace(model, name, VocabularyEmbedding(own, weight.shape[0], start, rank == 0, rank == ranks - 1, group))
        else:
            module._parameters |= {"weight": own} if bias is None else {"weight": own, "bias": cut(bias, part)}
            if isinstance(module, nn.Linear):
                module.out_features = own.shape[0]
    _divide_heads(model, chosen, ranks)
    for module in model.modules():  # where another module keeps the whole one: BERT's decoder and its parent share a bias
        for leaf, parameter in module._parameters.items():
            if id(parameter) in cuts:
                module._parameters[leaf] = cuts[id(parameter)][1]


def _part(style: Style, shape: torch.Size, rank: int, ranks: int) -> Ranges:
    """What a rank keeps of a weight [out, in]."""
    if style == "rowwise":
        size = shape[1] // ranks
        return Ranges(1, ((rank * size, (rank + 1) * size),))
    if style in BY_CLASSES:
        return Ranges(0, (_rows(shape[0], rank, ranks),))
    blocks = 3 if style == "colwise_qkv" else 1
    block = shape[0] // blocks
    size = block // ranks
    return Ranges(0, tuple((b * block + rank * size, b * block + (rank + 1) * size) for b in range(blocks)))


def _divide_heads(model: nn.Module, chosen: list[Chosen], ranks: int) -> None:
    """Modules that own projections of whole heads count this rank's from now on."""
    for owner in _owners(model, chosen):
        for attribute in getattr(owner, "head_counts", _LOCAL_SIZES):
            if isinstance(getattr(owner, attribute, None), int):
                setattr(owner, attribute, getattr(owner, attribute) // ranks)


def _owners(model: nn.Module, chosen: list[Chosen]) -> list[nn.Module]:
    """The modules whose projections are split by output features."""
    colwise = (name for name, _, style in chosen if style in ("colwise", "colwise_qkv"))
    return [model.get_submodule(name) for name in dict.fromkeys(name.rpartition(".")[0] for name in colwise)]


def _rows(classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """[start, stop) of a rank's classes: as many each, the last rank less."""
    size = -(-classes // ranks)
    return rank * size, min(classes, (rank + 1) * size)


def _parameter(tensor: Tensor, old: Tensor, part: Part) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=False)
    parameter.part, parameter.whole_shape = part, whole_shape(old)  # type: ignore[attr-defined]
    return parameter


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


# -------------------------------------------------------------------------------------------------------------------- layers


class RowwiseLinear(nn.Module):
    """A linear layer of which this rank has some input features: weight [out, in / ranks], bias [out] or None."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight, self.bias, self.group = weight, bias, group
        self._sum = untraced(sum_over_ranks)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's input features [.., in / ranks] -> [.., out], equal on all ranks."""
        summed: Tensor = self._sum(F.linear(x, self.weight), self.group)
        return summed if self.bias is None else summed + self.bias


class VocabularyEmbedding(nn.Module):
    """An embedding of which this rank has some rows, from `start` on; first, last: whether it is the first or the last rank."""

    def __init__(
        self, weight: nn.Parameter, num_embeddings: int, start: int, first: bool, last: bool, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.weight, self.group = weight, group
        self.num_embeddings, self.embedding_dim = num_embeddings, weight.shape[1]
        self.start, self.first, self.last = start, first, last
        self._sum = untraced(_all_reduce)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [..] int64 -> [.., D], equal on all ranks."""
        rows = ids - self.start
        # Ids that no rank has are left to the outer ranks, where the lookup fails as it would in the whole table.
        other = torch.zeros_like(rows, dtype=torch.bool)
        if not self.first:
            other |= rows < 0
        if not self.last:
            other |= rows >= self.weight.shape[0]
        found = F.embedding(rows.masked_fill_(other, 0), self.weight).masked_fill_(other[..., None], 0.0)
        self._sum(found, self.group)
        return found


@cache
def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which torch.compile leaves out of its graphs; made when a layer is, for it imports dynamo, which takes
    seconds."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def _all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> None:
    """All but one rank have zeros, so the order in which the library adds does not matter."""
    dist.all_reduce(x, group=group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks, each element summed in rank order on one rank: the same bits everywhere, and in every run.

    An all_reduce adds in an order that the library chooses by size and topology, and rounds a half-precision sum at every
    hop, where this rounds once. Like a ring's, each rank sends 2 (R - 1) / R of the tensor.
    """
    ranks = dist.get_world_size(group)
    flat = x.reshape(-1)
    share = -(-flat.numel() // ranks)
    flat = F.pad(flat, (0, share * ranks - flat.numel()))
    parts = torch.empty_like(flat)
    dist.all_to_all_single(parts, flat, group=group)
    dist.all_gather(list(flat.view(ranks, share).unbind()), parts.view(ranks, share).sum(0), group=group)
    return flat[: x.numel()].view(x.shape)

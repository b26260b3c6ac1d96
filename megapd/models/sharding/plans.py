"""Plans: how each matrix of an architecture is split over the ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

from megapd.errors import UserError
from megapd.models.build import Learner
from megapd.models.mlp import MLP

# colwise          output features are split, and the bias
# colwise_qkv      the same, of three matrices one below the other (query, key, value), each by whole heads
# rowwise          input features are split; the outputs are summed over the ranks, then comes the whole bias
# vocabulary       rows of an embedding are split; a rank gives zeros for the ids of others, and the outputs are summed
# vocabulary_head  rows of the output layer are split, and the bias: each rank gives the logits of its own classes
Style = Literal["colwise", "colwise_qkv", "rowwise", "vocabulary", "vocabulary_head"]
BY_CLASSES = ("vocabulary", "vocabulary_head")

# By dotted name, * for a number. Position and type embeddings, norms and BERT's transform are whole on every rank.
PLANS: dict[str, dict[str, Style]] = {
    "megapd": {
        "body.tokens": "vocabulary",
        "body.blocks.*.attention.qkv": "colwise_qkv",
        "body.blocks.*.attention.out": "rowwise",
        "body.blocks.*.up": "colwise",
        "body.blocks.*.down": "rowwise",
        "head": "vocabulary_head",
    },
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
USE_ZERO = "choose teacher.sharding zero, which works for every architecture"

Chosen = tuple[str, nn.Module, Style]  # a module that a plan names, under its name


def plan_for(model: nn.Module) -> dict[str, Style]:
    """The plan of a Learner or of a Pretrained. Raises UserError if it has none."""
    if isinstance(model, Learner):
        if isinstance(model.body, MLP):
            raise UserError("teacher.sharding: an mlp cannot be split by tensor; choose whole or zero")
        return dict(PLANS["megapd"])
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

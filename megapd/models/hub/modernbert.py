"""ModernBERT in transformers' files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from megapd.config import LanguageModelConfig, ModernBertConfig
from megapd.errors import UserError
from megapd.models.build import Learner
from megapd.models.hub.layout import Layout, Link, required
from megapd.models.modernbert import ModernBert

SIZES = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden": "hidden_size", "ffn": "intermediate_size"}
FULL, SLIDING = "full_attention", "sliding_attention"


class ModernBERT(Layout):
    """ModernBertForMaskedLM."""

    kind, model_type, architecture, prefix = "modernbert", "modernbert", "ModernBertForMaskedLM", "model."
    heads = ("head.", "decoder.")
    unused = (".rotary_emb.inv_freq",)
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_activation": ("gelu",),
        "classifier_activation": ("gelu",),
        "norm_bias": (False,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "classifier_bias": (False,),
        "decoder_bias": (True,),
    }

    def section(self, settings: Mapping[str, Any], path: Path) -> ModernBertConfig:
        rope = settings.get("rope_parameters") or {}
        for kind, one in {**rope, "rope_scaling": settings.get("rope_scaling")}.items():
            if isinstance(one, Mapping) and one.get("rope_type", "default") != "default":
                raise UserError(f"{path}: rope_type {one['rope_type']!r} of {kind} is not supported; megapd's has 'default'")
        thetas = {kind: (rope.get(kind) or {}).get("rope_theta") for kind in (FULL, SLIDING)}
        sizes = required(settings, SIZES, path)
        return ModernBertConfig(
            **sizes,
            global_every=_every(settings, sizes["layers"], path),
            local_window=settings.get("local_attention", 128),
            norm_eps=settings.get("norm_eps", 1e-5),
            global_theta=thetas[FULL] or settings.get("global_rope_theta", 160_000.0),
            local_theta=thetas[SLIDING] or settings.get("local_rope_theta", 10_000.0),
            max_length=settings.get("max_position_embeddings"),
            tied=settings.get("tie_word_embeddings", True),
        )

    def settings(self, section: LanguageModelConfig, learner: Learner) -> dict[str, Any]:
        assert isinstance(section, ModernBertConfig)
        assert isinstance(learner.body, ModernBert)
        thetas = {FULL: section.global_theta, SLIDING: section.local_theta}
        dropout = ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout")
        return {
            **{theirs: getattr(section, "ffn_width" if ours == "ffn" else ours) for ours, theirs in SIZES.items()},
            "max_position_embeddings": learner.body.length,
            "local_attention": section.local_window,
            "norm_eps": section.norm_eps,
            "layer_types": [SLIDING if layer % section.global_every else FULL for layer in range(section.layers)],
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
            # For transformers before 5.
            "global_attn_every_n_layers": section.global_every,
            "global_rope_theta": section.global_theta,
            "local_rope_theta": section.local_theta,
            **dict.fromkeys(dropout, 0.0),
            **dict.fromkeys(("cls_token_id", "sep_token_id")),
        }

    def links(self, section: LanguageModelConfig) -> list[Link]:
        assert isinstance(section, ModernBertConfig)
        names = {"model.embeddings.tok_embeddings": "body.tokens", "model.embeddings.norm": "body.embedding_norm"}
        links = [Link(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in names.items()]
        wide = (2 * section.ffn_width, section.hidden)
        for layer in range(section.layers):
            theirs, ours = f"model.layers.{layer}", f"body.blocks.{layer}"
            if layer > 0:
                links.append(Link(f"{theirs}.attn_norm.weight", f"{ours}.attention_norm.weight"))
            links.append(Link(f"{theirs}.attn.Wqkv.weight", f"{ours}.attention.qkv.weight"))
            links.append(Link(f"{theirs}.attn.Wo.weight", f"{ours}.attention.out.weight"))
            links.append(Link(f"{theirs}.mlp_norm.weight", f"{ours}.mlp_norm.weight"))
            for half, name in enumerate(("up", "gate")):
                links.append(Link(f"{theirs}.mlp.Wi.weight", f"{ours}.{name}.weight", pick=partial(_half, half), shape=wide))
            links.append(Link(f"{theirs}.mlp.Wo.weight", f"{ours}.down.weight"))
        links.append(Link("model.final_norm.weight", "body.norm.weight"))
        links.append(Link("head.dense.weight", "transform.dense.weight"))
        links.append(Link("head.norm.weight", "transform.norm.weight"))
        links.append(Link("decoder.bias", "head.bias"))
        return links if section.tied else [*links, Link("decoder.weight", "head.weight")]


def _half(half: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(2)[half]


def _every(settings: Mapping[str, Any], layers: int, path: Path) -> int:
    """How often a layer attends to all tokens; UserError for an order that is no such rhythm."""
    kinds = settings.get("layer_types")
    if kinds is None:
        return int(settings.get("global_attn_every_n_layers", 3))
    everywhere = [place for place, kind in enumerate(kinds) if kind == FULL]
    every = everywhere[1] if len(everywhere) > 1 else layers
    if kinds != [SLIDING if layer % every else FULL for layer in range(layers)]:
        raise UserError(f"{path}: layer_types are not full attention at every n-th layer from the first on, which megapd's has")
    return every

"""Llama, Qwen3, OLMo-2 and GPT-NeoX in transformers' files: one kind of megapd's, by its options."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from megapd.config import LanguageModelConfig, LlamaConfig
from megapd.errors import UserError
from megapd.models.build import Learner
from megapd.models.hub.layout import Layout, Link, pair, required
from megapd.models.llama import Llama

SIZES = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden": "hidden_size", "ffn": "intermediate_size"}


class Decoder(Layout):
    """LlamaForCausalLM, and what differs from it in a subclass.

    fixed   settings of ours that the model_type implies
    norms   their names of our attention_norm and mlp_norm
    norm_eps  of a config.json that leaves it out
    """

    kind, model_type, architecture, prefix = "llama", "llama", "LlamaForCausalLM", "model."
    unused = (".rotary_emb.inv_freq",)
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
    }
    fixed: ClassVar[Mapping[str, Any]] = {
        "mlp": "swiglu",
        "norm": "rms",
        "norm_place": "before",
        "parallel": False,
        "qk_norm": "none",
        "biases": False,
        "rotary_share": 1.0,
    }
    norms: ClassVar[tuple[str, str]] = ("input_layernorm", "post_attention_layernorm")
    norm_eps: ClassVar[float] = 1e-6

    def section(self, settings: Mapping[str, Any], path: Path) -> LlamaConfig:
        return LlamaConfig(
            **required(settings, SIZES, path),
            **self.fixed,
            kv_heads=settings.get("num_key_value_heads"),
            head_size=settings.get("head_dim"),
            norm_eps=settings.get("rms_norm_eps", self.norm_eps),
            rope_theta=_rope(settings, path).get("rope_theta", 10_000.0),
            max_length=settings.get("max_position_embeddings"),
            tied=settings.get("tie_word_embeddings", False),
        )

    def settings(self, section: LanguageModelConfig, learner: Learner) -> dict[str, Any]:
        section, body = _llama(section, learner)
        rope = {"rope_type": "default", "rope_theta": section.rope_theta}
        return {
            **_sizes(section, body),
            "num_key_value_heads": section.key_heads,
            "head_dim": section.width_of_head,
            "rms_norm_eps": section.norm_eps,
            "rope_theta": section.rope_theta,  # for transformers before 5
            "rope_parameters": rope,
        }

    def links(self, section: LanguageModelConfig) -> list[Link]:
        assert isinstance(section, LlamaConfig)
        links = [Link("model.embed_tokens.weight", "body.tokens.weight")]
        for layer in range(section.layers):
            theirs, ours = f"model.layers.{layer}", f"body.blocks.{layer}"
            for their_norm, our_norm in zip(self.norms, ("attention_norm", "mlp_norm"), strict=True):
                links += pair(f"{theirs}.{their_norm}", f"{ours}.{our_norm}", bias=False)
            for their_name, our_name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "out")):
                links += pair(f"{theirs}.self_attn.{their_name}", f"{ours}.attention.{our_name}", bias=False)
            if section.qk_norm != "none":
                links += pair(f"{theirs}.self_attn.q_norm", f"{ours}.attention.query_norm", bias=False)
                links += pair(f"{theirs}.self_attn.k_norm", f"{ours}.attention.key_norm", bias=False)
            for name in ("gate", "up", "down"):
                links += pair(f"{theirs}.mlp.{name}_proj", f"{ours}.mlp.{name}", bias=False)
        links += pair("model.norm", "body.norm", bias=False)
        return links if section.tied else [*links, Link("lm_head.weight", "head.weight")]

    def misfit(self, section: LanguageModelConfig) -> str:
        return next((name for name, value in self.fixed.items() if getattr(section, name) != value), "")


class Qwen3(Decoder):
    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
    }
    fixed: ClassVar[Mapping[str, Any]] = {**Decoder.fixed, "qk_norm": "head"}


class OLMo2(Decoder):
    model_type, architecture = "olmo2", "Olmo2ForCausalLM"
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"hidden_act": ("silu",), "attention_bias": (False,)}
    fixed: ClassVar[Mapping[str, Any]] = {**Decoder.fixed, "qk_norm": "whole", "norm_place": "after"}
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    norm_eps = 1e-5

    def misfit(self, section: LanguageModelConfig) -> str:
        assert isinstance(section, LlamaConfig)
        return super().misfit(section) or ("head_size" if section.width_of_head * section.heads != section.hidden else "")


class GPTNeoX(Layout):
    """GPTNeoXForCausalLM, Pythia's: queries, keys and values of a head lie together in one matrix."""

    kind, model_type, architecture, prefix = "llama", "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox."
    heads = ("embed_out.", "lm_head.")
    unused = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"hidden_act": ("gelu",), "attention_bias": (True,)}
    fixed: ClassVar[Mapping[str, Any]] = {
        "mlp": "gelu",
        "norm": "layer",
        "norm_place": "before",
        "qk_norm": "none",
        "biases": True,
    }

    def section(self, settings: Mapping[str, Any], path: Path) -> LlamaConfig:
        rope = _rope(settings, path)
        return LlamaConfig(
            **required(settings, SIZES, path),
            **self.fixed,
            parallel=settings.get("use_parallel_residual", True),
            norm_eps=settings.get("layer_norm_eps", 1e-5),
            rope_theta=rope.get("rope_theta", settings.get("rotary_emb_base", 10_000.0)),
            rotary_share=rope.get("partial_rotary_factor", settings.get("rotary_pct", 0.25)),
            max_length=settings.get("max_position_embeddings"),
            tied=settings.get("tie_word_embeddings", False),
        )

    def settings(self, section: LanguageModelConfig, learner: Learner) -> dict[str, Any]:
        section, body = _llama(section, learner)
        share, theta = section.rotary_share, section.rope_theta
        rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
        former = {"rotary_pct": share, "rotary_emb_base": theta}  # for transformers before 5
        dropout = dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.0)
        own = {"layer_norm_eps": section.norm_eps, "use_parallel_residual": section.parallel}
        return {**_sizes(section, body), **own, **former, "rope_parameters": rope, **dropout}

    def links(self, section: LanguageModelConfig) -> list[Link]:
        assert isinstance(section, LlamaConfig)
        links = [Link("gpt_neox.embed_in.weight", "body.tokens.weight")]
        heads, width = section.heads, section.width_of_head
        for layer in range(section.layers):
            theirs, ours = f"gpt_neox.layers.{layer}", f"body.blocks.{layer}"
            links += pair(f"{theirs}.input_layernorm", f"{ours}.attention_norm")
            links += pair(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm")
            for part, name in enumerate(("query", "key", "value")):
                how = {"pick": partial(_of_heads, heads, part), "into": partial(_by_heads, heads)}
                shape = (3 * heads * width,)
                links.append(
                    Link(
                        f"{theirs}.attention.query_key_value.weight",
                        f"{ours}.attention.{name}.weight",
                        shape=(*shape, section.hidden),
                        **how,
                    )
                )
                links.append(
                    Link(f"{theirs}.attention.query_key_value.bias", f"{ours}.attention.{name}.bias", shape=shape, **how)
                )
            links += pair(f"{theirs}.attention.dense", f"{ours}.attention.out")
            links += pair(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.mlp.up")
            links += pair(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.mlp.down")
        links += pair("gpt_neox.final_layer_norm", "body.norm")
        return links if section.tied else [*links, Link("embed_out.weight", "head.weight")]

    def misfit(self, section: LanguageModelConfig) -> str:
        assert isinstance(section, LlamaConfig)
        sizes = {
            "kv_heads": section.key_heads == section.heads,
            "head_size": section.width_of_head * section.heads == section.hidden,
        }
        named = next((name for name, value in self.fixed.items() if getattr(section, name) != value), "")
        return named or next((name for name, fits in sizes.items() if not fits), "")

    def canonical(self, stored: str) -> str | None:
        # transformers 5 calls the head as others do; published files, and releases before, embed_out.
        return "embed_out.weight" if stored == "lm_head.weight" else super().canonical(stored)


def _of_heads(heads: int, part: int, tensor: Tensor) -> Tensor:
    """Of [H * 3 * E, ...] the queries', keys' or values' [H, E, ...]."""
    return tensor.view(heads, 3, -1, *tensor.shape[1:])[:, part]


def _by_heads(heads: int, tensor: Tensor) -> Tensor:
    return tensor.view(heads, -1, *tensor.shape[1:])


def _llama(section: LanguageModelConfig, learner: Learner) -> tuple[LlamaConfig, Llama]:
    assert isinstance(section, LlamaConfig)
    assert isinstance(learner.body, Llama)
    return section, learner.body


def _sizes(section: LlamaConfig, body: Llama) -> dict[str, Any]:
    sizes = {theirs: getattr(section, "ffn_width" if ours == "ffn" else ours) for ours, theirs in SIZES.items()}
    return {**sizes, "max_position_embeddings": body.length}


def _rope(settings: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """What config.json says of the rotary positions, in the spelling of transformers 5 or before. UserError for scaled ones."""
    found: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):  # a file may have both
        one = settings.get(name) or {}
        kind = one.get("rope_type", one.get("type", "default"))
        if kind != "default":
            raise UserError(f"{path}: rope_type {kind!r} is not supported; megapd's llama has 'default'")
        found |= one
    theta = settings.get("rope_theta")
    return {**({} if theta is None else {"rope_theta": theta}), **found}

"""GPT-2 and BERT in transformers' files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from megapd.config import LanguageModelConfig, TransformerConfig
from megapd.models.build import Learner
from megapd.models.hub.layout import Layout, Link, pair, required
from megapd.models.transformer import LAYER_NORM_EPS, TOKEN_TYPES, Transformer

BIAS, DECODER, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"


def _third(part: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(3)[part]


class GPT2(Layout):
    """GPT2LMHeadModel. reorder_and_upcast_attn is not among the options: it changes the rounding alone."""

    kind, model_type, architecture, prefix = "gpt", "gpt2", "GPT2LMHeadModel", "transformer."
    unused = (".attn.bias", ".attn.masked_bias")
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (LAYER_NORM_EPS["gpt"],),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    sizes: ClassVar[Mapping[str, str]] = {"layers": "n_layer", "heads": "n_head", "hidden": "n_embd", "max_length": "n_positions"}

    def section(self, settings: Mapping[str, Any], path: Path) -> TransformerConfig:
        tied = settings.get("tie_word_embeddings", True)
        return TransformerConfig(kind="gpt", tied=tied, ffn=settings.get("n_inner"), **required(settings, self.sizes, path))

    def settings(self, section: LanguageModelConfig, learner: Learner) -> dict[str, Any]:
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return {**_sizes(self.sizes, section, learner), "n_inner": _ffn(section), **dropout}

    def links(self, section: LanguageModelConfig) -> list[Link]:
        assert isinstance(section, TransformerConfig)
        links = [Link("transformer.wte.weight", "body.tokens.weight"), Link("transformer.wpe.weight", "body.positions.weight")]
        for layer in range(section.layers):
            theirs, ours = f"transformer.h.{layer}", f"body.blocks.{layer}"
            links += pair(f"{theirs}.ln_1", f"{ours}.attention_norm")
            links += _conv(f"{theirs}.attn.c_attn", f"{ours}.attention.qkv")
            links += _conv(f"{theirs}.attn.c_proj", f"{ours}.attention.out")
            links += pair(f"{theirs}.ln_2", f"{ours}.ffn_norm")
            links += _conv(f"{theirs}.mlp.c_fc", f"{ours}.up")
            links += _conv(f"{theirs}.mlp.c_proj", f"{ours}.down")
        links += pair("transformer.ln_f", "body.norm")
        return links if section.tied else [*links, Link("lm_head.weight", "head.weight")]


class BERT(Layout):
    """BertForMaskedLM."""

    kind, model_type, architecture, prefix = "bert", "bert", "BertForMaskedLM", "bert."
    heads = ("cls.",)
    unused = ("embeddings.position_ids", "embeddings.token_type_ids")
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("gelu",),
        "layer_norm_eps": (LAYER_NORM_EPS["bert"],),
        "position_embedding_type": ("absolute",),
        "type_vocab_size": (TOKEN_TYPES,),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }
    sizes: ClassVar[Mapping[str, str]] = {
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "max_length": "max_position_embeddings",
    }

    def section(self, settings: Mapping[str, Any], path: Path) -> TransformerConfig:
        tied = settings.get("tie_word_embeddings", True)
        return TransformerConfig(kind="bert", tied=tied, **required(settings, self.sizes, path))

    def settings(self, section: LanguageModelConfig, learner: Learner) -> dict[str, Any]:
        dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        return {**_sizes(self.sizes, section, learner), "intermediate_size": _ffn(section), **dropout}

    def links(self, section: LanguageModelConfig) -> list[Link]:
        assert isinstance(section, TransformerConfig)
        tables = {"word": "tokens", "position": "positions", "token_type": "types"}
        links = [Link(f"bert.embeddings.{theirs}_embeddings.weight", f"body.{ours}.weight") for theirs, ours in tables.items()]
        links += pair("bert.embeddings.LayerNorm", "body.norm")
        for layer in range(section.layers):
            theirs, ours = f"bert.encoder.layer.{layer}", f"body.blocks.{layer}"
            for part, projection in enumerate(("query", "key", "value")):
                links += pair(f"{theirs}.attention.self.{projection}", f"{ours}.attention.qkv", into=partial(_third, part))
            links += pair(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
            links += pair(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
            links += pair(f"{theirs}.intermediate.dense", f"{ours}.up")
            links += pair(f"{theirs}.output.dense", f"{ours}.down")
            links += pair(f"{theirs}.output.LayerNorm", f"{ours}.ffn_norm")
        links += pair("cls.predictions.transform.dense", "transform.dense")
        links += pair("cls.predictions.transform.LayerNorm", "transform.norm")
        links.append(Link(BIAS, "head.bias"))
        return links if section.tied else [*links, Link(DECODER, "head.weight"), Link(DECODER_BIAS, "head.bias")]

    def canonical(self, stored: str) -> str | None:
        if stored.endswith((".gamma", ".beta")):  # layer norms in TensorFlow's words, as in the published files
            stored = stored.removesuffix(".gamma").removesuffix(".beta") + (".weight" if stored.endswith(".gamma") else ".bias")
        name = super().canonical(stored)
        return None if name is not None and name.startswith(("bert.pooler.", "cls.seq_relationship.")) else name


def _conv(theirs: str, ours: str) -> list[Link]:
    """Of a Conv1D, which stores [in, out]."""
    return [Link(f"{theirs}.weight", f"{ours}.weight", pick=Tensor.t), Link(f"{theirs}.bias", f"{ours}.bias")]


def _ffn(section: LanguageModelConfig) -> int:
    assert isinstance(section, TransformerConfig)
    return section.ffn_width


def _sizes(names: Mapping[str, str], section: LanguageModelConfig, learner: Learner) -> dict[str, Any]:
    assert isinstance(learner.body, Transformer)
    sizes = {**section.model_dump(), "max_length": learner.body.positions.num_embeddings}
    return {theirs: sizes[ours] for ours, theirs in names.items()}

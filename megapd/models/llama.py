"""Llama's decoder, and by options those of GPT-NeoX / Pythia, OLMo-2 and Qwen3, weight-compatible with transformers' models.

Llama (Touvron et al. 2023): RMSNorm before each sublayer (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU
(Shazeer 2020), queries that share keys and values (Ainslie et al. 2023), no biases.
GPT-NeoX (Black et al. 2022): LayerNorm, attention and MLP side by side, exact GELU, a share of each head rotated, biases.
OLMo-2 (OLMo team 2024): norms after the sublayers and of whole queries and keys. Qwen3: norms of each head's.

There is no dropout, see transformer.py. Shape suffixes: B samples, L tokens a sample, D hidden width, H heads, K heads of keys
and values, E width of a head, R rotated features of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapd.config.families import LlamaConfig
from megapd.models.attention import Mask, attend, rotary_table, rotate, visible, within_documents
from megapd.models.build import Body, Parts, check_sizes
from megapd.models.layers import Block, Embedding, LayerNorm, RMSNorm, run_blocks

INIT_STD = 0.02  # of all the families


class RotaryAttention(nn.Module):
    """Multi-head self-attention with rotary positions; each K heads of keys and values serve H / K heads of queries."""

    head_counts = ("heads", "kv_heads")

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.heads, config.key_heads, config.width_of_head
        attended, keyed = self.heads * self.width, self.kv_heads * self.width
        self.query = nn.Linear(config.hidden, attended, bias=config.biases)
        self.key = nn.Linear(config.hidden, keyed, bias=config.biases)
        self.value = nn.Linear(config.hidden, keyed, bias=config.biases)
        self.out = nn.Linear(attended, config.hidden, bias=config.biases)
        self.norms_heads = config.qk_norm == "head"
        widths = {"none": None, "whole": (attended, keyed), "head": (self.width, self.width)}[config.qk_norm]
        self.query_norm = None if widths is None else RMSNorm(widths[0], eps=config.norm_eps)
        self.key_norm = None if widths is None else RMSNorm(widths[1], eps=config.norm_eps)

    def forward(self, x_BLD: Tensor, cosine: Tensor, sine: Tensor, mask: Mask) -> Tensor:
        """cosine, sine: [1 or B, 1, L, R]; mask: see `attend`."""
        query, key, value = self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)
        if self.query_norm is not None and self.key_norm is not None:
            if self.norms_heads:
                query, key = query.unflatten(-1, (-1, self.width)), key.unflatten(-1, (-1, self.width))
            query, key = self.query_norm(query), self.key_norm(key)
            if self.norms_heads:
                query, key = query.flatten(2), key.flatten(2)
        query_BHLE = rotate(query.unflatten(-1, (self.heads, -1)).transpose(1, 2), cosine, sine)
        key_BKLE = rotate(key.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2), cosine, sine)
        value_BKLE = value.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        shared = self.heads // self.kv_heads
        if shared > 1:
            key_BKLE, value_BKLE = (t.repeat_interleave(shared, dim=1) for t in (key_BKLE, value_BKLE))
        mixed_BHLE = attend(query_BHLE, key_BKLE, value_BKLE, mask, causal=True)
        out_BLD: Tensor = self.out(mixed_BHLE.transpose(1, 2).flatten(2))
        return out_BLD


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), or without a gate down(gelu(up(x)))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.ffn_width, bias=config.biases) if config.mlp == "swiglu" else None
        self.up = nn.Linear(config.hidden, config.ffn_width, bias=config.biases)
        self.down = nn.Linear(config.ffn_width, config.hidden, bias=config.biases)

    def forward(self, x_BLD: Tensor) -> Tensor:
        wide = F.gelu(self.up(x_BLD)) if self.gate is None else F.silu(self.gate(x_BLD)) * self.up(x_BLD)
        out_BLD: Tensor = self.down(wide)
        return out_BLD


class LlamaBlock(Block):
    """Attention and MLP, each with a residual: one after the other or both of the same input, norms before or after them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.compiled, self.parallel, self.norm_first = config.compile, config.parallel, config.norm_place == "before"
        self.attention, self.mlp = RotaryAttention(config), MLP(config)
        self.attention_norm, self.mlp_norm = make_norm(config), make_norm(config)

    def layer(self, x: Tensor, *others: Any) -> Tensor:
        """others: cosine, sine and mask, see RotaryAttention."""
        out: Tensor
        if not self.norm_first:
            x = x + self.attention_norm(self.attention(x, *others))
            out = x + self.mlp_norm(self.mlp(x))
        elif self.parallel:
            out = x + self.attention(self.attention_norm(x), *others) + self.mlp(self.mlp_norm(x))
        else:
            x = x + self.attention(self.attention_norm(x), *others)
            out = x + self.mlp(self.mlp_norm(x))
        return out


class Llama(Body):
    """Embedding, blocks, norm: token ids to final hidden states.

    vocab_size: rows of the token embedding. length: tokens of the samples that it is meant for, which bounds nothing here.
    """

    def __init__(self, config: LlamaConfig, vocab_size: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.checkpointing, self.restarts = config.activation_checkpointing, config.restart_positions
        self.rotated, self.theta, self.flex = config.rotated, config.rope_theta, config.attention == "flex"
        self.tokens = Embedding(vocab_size, config.hidden)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.plan = _plan(config)

    def forward(self, ids_BL: Tensor, segments_BL: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """ids [B, L] int64, segments [B, L] int64 or None, lengths [B] int64 or None -> hidden states [B, L, D] in the weights'
        dtype.

        Segments number the documents of a row: attention stays inside each; positions run on through the row, or restart.
        """
        x_BLD: Tensor = self.tokens(ids_BL)
        positions = torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
        if self.restarts and segments_BL is not None:
            positions = within_documents(segments_BL)
        cosine, sine = rotary_table(positions, self.rotated, self.theta, x_BLD.dtype)
        mask = visible(ids_BL, segments_BL, lengths, causal=True, flex=self.flex)
        x_BLD = run_blocks(self.blocks, x_BLD, cosine, sine, mask, checkpointing=self.checkpointing)
        normed_BLD: Tensor = self.norm(x_BLD)
        return normed_BLD

    def initialise(self, parameter: nn.Parameter, name: str, owner: nn.Module, generator: torch.Generator) -> None:
        """Matrices and embeddings normal(0, 0.02), the projections into the residual stream scaled by 1 / sqrt(2 * layers)
        (Radford et al. 2019, 2.3; the GPT-NeoX and OLMo code scale them too). Biases 0, norms 1 and 0."""
        path, _, leaf = name.rpartition(".")
        if isinstance(owner, (LayerNorm, RMSNorm)):
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
        elif leaf == "bias":
            parameter.zero_()
        else:
            residual = path.endswith(("attention.out", "mlp.down"))
            parameter.normal_(0.0, INIT_STD / math.sqrt(2 * len(self.blocks)) if residual else INIT_STD, generator=generator)


def make_norm(config: LlamaConfig) -> nn.Module:
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.hidden, eps=config.norm_eps)


def _plan(config: LlamaConfig) -> dict[str, str]:
    """For sharding.py. Norms over whole queries and keys need all heads, so there attention stays whole on every rank."""
    plan = {"body.tokens": "vocabulary", "body.blocks.*.mlp.up": "colwise", "body.blocks.*.mlp.down": "rowwise"}
    if config.mlp == "swiglu":
        plan["body.blocks.*.mlp.gate"] = "colwise"
    if config.qk_norm != "whole":
        plan |= {f"body.blocks.*.attention.{name}": "colwise" for name in ("query", "key", "value")}
        plan["body.blocks.*.attention.out"] = "rowwise"
    return {**plan, "head": "vocabulary_head"}


def build(section: LlamaConfig, *, vocab_size: int, classes: int, length: int) -> Parts:
    """The parts of a decoder. UserError if `length` exceeds model.max_length, or a tied head would need classes != vocab_size."""
    check_sizes(section, vocab_size, classes, length)
    body = Llama(section, vocab_size, section.max_length or length)
    return Parts(body, bias=False, embedding=body.tokens if section.tied else None)

"""ModernBERT (Warner et al. 2024), weight-compatible with transformers' ModernBertForMaskedLM.

Bidirectional; LayerNorm without bias before each sublayer, on the embeddings and at the end; rotary positions (Su et al. 2021);
GeGLU (Shazeer 2020); no biases but the output layer's. Every few blocks attend to all tokens, the others to those near by. The
first block's attention has no norm of its own, for the embeddings' stands right before it.

There is no dropout, see transformer.py. Shape suffixes: B samples, L tokens a sample, D hidden width, H heads, E width of a head,
R rotated features, N labelled positions.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapd.config.families import ModernBertConfig
from megapd.models.attention import Mask, attend, rotary_table, rotate, visible, within_documents
from megapd.models.build import Body, Parts, check_sizes
from megapd.models.layers import Block, Embedding, LayerNorm, run_blocks

INIT_STD = 0.02


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; qkv holds the three projections one below the other."""

    head_counts = ("heads",)

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x_BLD: Tensor, cosine: Tensor, sine: Tensor, mask: Mask) -> Tensor:
        """cosine, sine: [1 or B, 1, L, R]; mask: see `attend`."""
        qkv_BL3HE = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1))
        q_BHLE, k_BHLE, v_BHLE = qkv_BL3HE.permute(2, 0, 3, 1, 4).unbind(0)
        q_BHLE, k_BHLE = rotate(q_BHLE, cosine, sine), rotate(k_BHLE, cosine, sine)
        mixed_BHLE = attend(q_BHLE, k_BHLE, v_BHLE, mask, causal=False)
        out_BLD: Tensor = self.out(mixed_BHLE.transpose(1, 2).flatten(2))
        return out_BLD


class ModernBertBlock(Block):
    """Attention, then down(gelu(up(x)) * gate(x)), each with a residual and a norm before it."""

    def __init__(self, config: ModernBertConfig, first: bool) -> None:
        super().__init__()
        self.compiled = config.compile
        self.attention_norm = None if first else make_norm(config)
        self.attention, self.mlp_norm = Attention(config), make_norm(config)
        self.up = nn.Linear(config.hidden, config.ffn_width, bias=False)
        self.gate = nn.Linear(config.hidden, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.hidden, bias=False)

    def layer(self, x: Tensor, *others: Any) -> Tensor:
        """others: cosine, sine and mask, see Attention."""
        x = x + self.attention(x if self.attention_norm is None else self.attention_norm(x), *others)
        normed = self.mlp_norm(x)
        out: Tensor = x + self.down(F.gelu(self.up(normed)) * self.gate(normed))
        return out


class ModernBert(Body):
    """Embedding, blocks, norm: token ids to final hidden states.

    vocab_size: rows of the token embedding. length: tokens of the samples that it is meant for, which bounds nothing here.
    """

    plan = MappingProxyType(
        {
            "body.tokens": "vocabulary",
            "body.blocks.*.attention.qkv": "colwise_qkv",
            "body.blocks.*.attention.out": "rowwise",
            "body.blocks.*.up": "colwise",
            "body.blocks.*.gate": "colwise",
            "body.blocks.*.down": "rowwise",
            "head": "vocabulary_head",
        }
    )

    def __init__(self, config: ModernBertConfig, vocab_size: int, length: int) -> None:
        super().__init__()
        self.length, self.checkpointing, self.restarts = length, config.activation_checkpointing, config.restart_positions
        self.rotated, self.thetas = config.hidden // config.heads, (config.global_theta, config.local_theta)
        self.reach, self.global_every, self.flex = config.local_window // 2, config.global_every, config.attention == "flex"
        self.tokens = Embedding(vocab_size, config.hidden)
        self.embedding_norm = make_norm(config)
        self.blocks = nn.ModuleList(ModernBertBlock(config, layer == 0) for layer in range(config.layers))
        self.norm = make_norm(config)

    def forward(self, ids_BL: Tensor, segments_BL: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """ids [B, L] int64, segments [B, L] int64 or None, lengths [B] int64 or None -> hidden states [B, L, D] in the weights'
        dtype.

        Segments number the documents of a row: attention stays inside each; positions run on through the row, or restart. What
        is near is so by its place in the row.
        """
        x_BLD: Tensor = self.embedding_norm(self.tokens(ids_BL))
        places = torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
        positions = within_documents(segments_BL) if self.restarts and segments_BL is not None else places
        tables = [rotary_table(positions, self.rotated, theta, x_BLD.dtype) for theta in self.thetas]
        reaches = (None, self.reach)
        masks = [visible(ids_BL, segments_BL, lengths, causal=False, reach=reach, flex=self.flex) for reach in reaches]
        for number, block in enumerate(self.blocks):
            kind = int(number % self.global_every != 0)
            x_BLD = run_blocks([block], x_BLD, *tables[kind], masks[kind], checkpointing=self.checkpointing)
        normed_BLD: Tensor = self.norm(x_BLD)
        return normed_BLD

    def initialise(self, parameter: nn.Parameter, name: str, owner: nn.Module, generator: torch.Generator) -> None:
        """Matrices and embeddings normal(0, 0.02), the projections into the residual stream scaled by 1 / sqrt(2 * layers)
        (Radford et al. 2019, 2.3), the output layer's bias 0, norms 1."""
        path, _, leaf = name.rpartition(".")
        if isinstance(owner, LayerNorm):
            parameter.fill_(1.0)
        elif leaf == "bias":
            parameter.zero_()
        else:
            residual = path.endswith(("attention.out", "down"))
            parameter.normal_(0.0, INIT_STD / math.sqrt(2 * len(self.blocks)) if residual else INIT_STD, generator=generator)


class PredictionTransform(nn.Module):
    """What comes before the output layer: dense, exact GELU, norm."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden, config.hidden, bias=False)
        self.norm = make_norm(config)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D]; given the labelled positions alone, for nothing reads the others."""
        normed_ND: Tensor = self.norm(F.gelu(self.dense(x_ND)))
        return normed_ND


def make_norm(config: ModernBertConfig) -> LayerNorm:
    return LayerNorm(config.hidden, eps=config.norm_eps, bias=False)


def build(section: ModernBertConfig, *, vocab_size: int, classes: int, length: int) -> Parts:
    """The parts of an encoder. UserError if `length` exceeds model.max_length, or a tied head would need classes !=
    vocab_size."""
    check_sizes(section, vocab_size, classes, length)
    body = ModernBert(section, vocab_size, section.max_length or length)
    return Parts(body, PredictionTransform(section), bias=True, embedding=body.tokens if section.tied else None)

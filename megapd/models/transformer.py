"""GPT and BERT bodies, weight-compatible with Hugging Face's GPT-2 and BERT.

GPT (Radford et al. 2019): causal, layer norm before each sublayer and once at the end, GELU by its tanh formula.
BERT (Devlin et al. 2018): bidirectional, layer norm after each sublayer and on the embeddings, exact GELU.

There is no dropout. Pre-training sees each token once or a few times, where dropout only slows learning (GPT-3, PaLM
and Llama train without), and a forward pass without random numbers is what makes a resumed run bitwise equal and an
activation-checkpointed one identical.

Shape suffixes: B samples, L tokens a sample, D hidden width, H heads, N labelled positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapd.config import TransformerConfig
from megapd.models.attention import Mask, attend, visible
from megapd.models.build import Body, Parts, check_sizes
from megapd.models.layers import Block, Embedding, LayerNorm, run_blocks

LAYER_NORM_EPS = {"gpt": 1e-5, "bert": 1e-12}  # the published models' values
INIT_STD = 0.02  # GPT-2's and BERT's
TOKEN_TYPES = 2  # BERT's sentence A and B; packed documents are all of type 0, the second row only keeps the layout


class Attention(nn.Module):
    """Multi-head self-attention; qkv holds the three projections one below the other, each split into heads."""

    head_counts = ("heads",)

    def __init__(self, hidden: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x_BLD: Tensor, mask: Mask) -> Tensor:
        """mask: see `attend`."""
        qkv_BL3HE = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1))
        q_BHLE, k_BHLE, v_BHLE = qkv_BL3HE.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHLE = attend(q_BHLE, k_BHLE, v_BHLE, mask, causal=self.causal)
        out_BLD: Tensor = self.out(mixed_BHLE.transpose(1, 2).flatten(2))
        return out_BLD


class TransformerBlock(Block):
    """Attention, then a feed-forward layer, each with a residual; layer norm before (GPT) or after (BERT) each."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        gpt = config.kind == "gpt"
        self.norm_first, self.compiled = gpt, config.compile
        self.gelu: Literal["tanh", "none"] = "tanh" if gpt else "none"
        self.attention = Attention(config.hidden, config.heads, causal=gpt)
        self.attention_norm = LayerNorm(config.hidden, eps=LAYER_NORM_EPS[config.kind])
        self.up = nn.Linear(config.hidden, config.ffn_width)
        self.down = nn.Linear(config.ffn_width, config.hidden)
        self.ffn_norm = LayerNorm(config.hidden, eps=LAYER_NORM_EPS[config.kind])

    def layer(self, x: Tensor, *others: Any) -> Tensor:
        """others: the mask, see Attention."""
        x_BLD, (mask,) = x, others
        if self.norm_first:
            x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), mask)
            x_BLD = x_BLD + self._feed_forward(self.ffn_norm(x_BLD))
        else:
            x_BLD = self.attention_norm(x_BLD + self.attention(x_BLD, mask))
            x_BLD = self.ffn_norm(x_BLD + self._feed_forward(x_BLD))
        result: Tensor = x_BLD
        return result

    def _feed_forward(self, x_BLD: Tensor) -> Tensor:
        out_BLD: Tensor = self.down(F.gelu(self.up(x_BLD), approximate=self.gelu))
        return out_BLD


class Transformer(Body):
    """Embeddings and blocks: token ids to final hidden states.

    vocab_size: rows of the token embedding. max_length: learned positions, the longest row it accepts.
    """

    plan: Mapping[str, str] = MappingProxyType(
        {
            "body.tokens": "vocabulary",
            "body.blocks.*.attention.qkv": "colwise_qkv",
            "body.blocks.*.attention.out": "rowwise",
            "body.blocks.*.up": "colwise",
            "body.blocks.*.down": "rowwise",
            "head": "vocabulary_head",
        }
    )

    def __init__(self, config: TransformerConfig, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.causal, self.checkpointing = config.kind == "gpt", config.activation_checkpointing
        self.flex = config.attention == "flex"
        self.tokens = Embedding(vocab_size, config.hidden)
        self.positions = Embedding(max_length, config.hidden)
        self.types = Embedding(TOKEN_TYPES, config.hidden) if config.kind == "bert" else None
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.hidden, eps=LAYER_NORM_EPS[config.kind])  # GPT: after the blocks; BERT: before

    def forward(self, ids_BL: Tensor, segments_BL: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """ids [B, L] int64, segments [B, L] int64 or None, lengths [B] int64 or None -> hidden states [B, L, D] in the weights'
        dtype.

        Segments number the documents of a row: attention stays inside each, while positions run on through the row.
        """
        length = ids_BL.shape[1]
        assert length <= self.positions.num_embeddings, f"{length} tokens, but {self.positions.num_embeddings} positions"
        x_BLD: Tensor = self.tokens(ids_BL) + self.positions(torch.arange(length, device=ids_BL.device))
        if self.types is not None:
            # One row that broadcasts: looked up for each token, its gradient would scatter B * L rows into one.
            x_BLD = self.norm(x_BLD + self.types(ids_BL.new_zeros(1)))
        mask = visible(ids_BL, segments_BL, lengths, causal=self.causal, flex=self.flex)
        x_BLD = run_blocks(self.blocks, x_BLD, mask, checkpointing=self.checkpointing)
        if self.types is None:
            x_BLD = self.norm(x_BLD)
        return x_BLD

    def initialise(self, parameter: nn.Parameter, name: str, owner: nn.Module, generator: torch.Generator) -> None:
        """GPT: matrices and embeddings normal(0, 0.02), the projections into the residual stream scaled by 1 / sqrt(2 * layers)
        (Radford et al. 2019, 2.3). BERT: normal(0, 0.02). Biases 0, norms 1 and 0."""
        path, _, leaf = name.rpartition(".")
        if isinstance(owner, LayerNorm):
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
        elif leaf == "bias":
            parameter.zero_()
        else:
            residual = self.causal and path.endswith(("attention.out", "down"))
            std = INIT_STD / math.sqrt(2 * len(self.blocks)) if residual else INIT_STD
            parameter.normal_(0.0, std, generator=generator)


class MaskedTransform(nn.Module):
    """What BERT's masked-token head does before its output layer: dense, exact GELU, layer norm."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)
        self.norm = LayerNorm(hidden, eps=LAYER_NORM_EPS["bert"])

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D]; given the labelled positions alone, for nothing reads the others."""
        normed_ND: Tensor = self.norm(F.gelu(self.dense(x_ND)))
        return normed_ND


def build(section: TransformerConfig, *, vocab_size: int, classes: int, length: int) -> Parts:
    """The parts of a GPT or BERT. UserError if `length` exceeds model.max_length, or a tied head would need classes !=
    vocab_size."""
    check_sizes(section, vocab_size, classes, length)
    body = Transformer(section, vocab_size, section.max_length or length)
    transform = None if section.causal else MaskedTransform(section.hidden)
    return Parts(body, transform, bias=not section.causal, embedding=body.tokens if section.tied else None)

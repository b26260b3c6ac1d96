"""Losses of progressive distillation without the logits in memory. Depends on torch and triton alone.

linear_distillation_loss   hidden states and head, against labels and any form of teacher
linear_softmax_kl          the same against a teacher's hidden states and head
linear_sparse_kl           the same against a few classes a position: top-k, samples, the argmax
linear_cross_entropy       the same against labels alone
softmax_kl                 logits in
topk_logits                a teacher's top-k classes with exact log probabilities
distillation_loss          the reference: plain torch over whole logits
"""

from .divergences import (
    JSD,
    LK,
    TVD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    Mixture,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    SoftCrossEntropy,
)
from .losses import linear_cross_entropy, linear_distillation_loss, linear_softmax_kl, linear_sparse_kl, softmax_kl
from .options import LossOptions, LossResult, TokenOutputs
from .reference import distillation_loss
from .rows.base import default_chunk_bytes
from .rows.choose import implementation
from .shard import VocabularyShard
from .sparse import Convention
from .topk import TopK, topk_logits

__version__ = "0.1.0"

__all__ = [
    "JSD",
    "LK",
    "TVD",
    "AlphaBeta",
    "Convention",
    "Divergence",
    "ForwardKL",
    "LossOptions",
    "LossResult",
    "Mixture",
    "ReverseKL",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "SoftCrossEntropy",
    "TokenOutputs",
    "TopK",
    "VocabularyShard",
    "default_chunk_bytes",
    "distillation_loss",
    "implementation",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_softmax_kl",
    "linear_sparse_kl",
    "softmax_kl",
    "topk_logits",
]

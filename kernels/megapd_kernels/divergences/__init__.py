"""The divergences between a teacher's and a student's softmax, each one object: formula, gradient, and its algebra in Triton."""

from .base import NAMES, Divergence, Mixture, named, register
from .bounded import JSD, LK, TVD
from .kl import ForwardKL, ReverseKL, SkewedForwardKL, SkewedReverseKL, SoftCrossEntropy
from .power import AlphaBeta

__all__ = [
    "JSD",
    "LK",
    "NAMES",
    "TVD",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "Mixture",
    "ReverseKL",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "SoftCrossEntropy",
    "named",
    "register",
]

"""Losses of progressive distillation without the logits in memory. Depends on torch alone.

linear_distillation_loss   hidden states and head, against labels and any form of teacher
linear_softmax_kl          the same against a teacher's hidden states and head
linear_cross_entropy       the same against labels alone
softmax_kl                 logits in
distillation_loss          the reference: plain torch over whole logits
"""

from .dispatch import implementation, linear_cross_entropy, linear_distillation_loss, linear_softmax_kl, softmax_kl
from .options import Divergence, LossOptions, LossResult
from .reference import distillation_loss

__all__ = [
    "Divergence",
    "LossOptions",
    "LossResult",
    "distillation_loss",
    "implementation",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_softmax_kl",
    "softmax_kl",
]

"""torchtune.modules.loss' distillation losses by their names and signatures, conventions of torchtune 0.6.

Its forward KL leaves the teacher's entropy out: the value is the cross entropy of both, the gradient that of the KL. Labels mask
and do nothing else; the mean is over what they leave, and nothing left is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..divergences import Divergence, Mixture, ReverseKL, SoftCrossEntropy
from ..losses import softmax_kl
from ..options import LossOptions


class _Masked(nn.Module):
    def __init__(self, divergence: Divergence | Mixture, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index, self.options = ignore_index, LossOptions(divergence)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """Logits [N, V] (any leading dimensions), labels of as many positions in any shape; normalize False: the sum."""
        student, teacher = (logits.reshape(-1, logits.shape[-1]) for logits in (student_logits, teacher_logits))
        return softmax_kl(
            student,
            teacher,
            token_weights=labels.reshape(-1) != self.ignore_index,
            denominator=None if normalize else 1.0,
            options=self.options,
        ).loss


class ForwardKLLoss(_Masked):
    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(SoftCrossEntropy(), ignore_index)


class ReverseKLLoss(_Masked):
    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ReverseKL(), ignore_index)


class SymmetricKLLoss(_Masked):
    """sym_kd_ratio of the forward KL, the rest of the reverse."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(_symmetric(sym_kd_ratio), ignore_index)


class _Chunked(nn.Module):
    """Logits as lists of chunks along the sequence, and labels [B, T] whole: the sum of the chunks over the count of all."""

    def __init__(self, divergence: Divergence | Mixture, num_output_chunks: int, ignore_index: int) -> None:
        super().__init__()
        self.num_output_chunks, self.chunk = num_output_chunks, _Masked(divergence, ignore_index)

    def forward(self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        total = torch.zeros((), device=labels.device)
        for student, teacher, part in zip(
            student_logits, teacher_logits, labels.chunk(self.num_output_chunks, dim=1), strict=True
        ):
            total = total + self.chunk(student, teacher, part, normalize=False)
        return total / (labels != self.chunk.ignore_index).sum().clamp(min=1)


class ForwardKLWithChunkedOutputLoss(_Chunked):
    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(SoftCrossEntropy(), num_output_chunks, ignore_index)


class ReverseKLWithChunkedOutputLoss(_Chunked):
    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ReverseKL(), num_output_chunks, ignore_index)


class SymmetricKLWithChunkedOutputLoss(_Chunked):
    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(_symmetric(sym_kd_ratio), num_output_chunks, ignore_index)


def _symmetric(ratio: float) -> Divergence | Mixture:
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"sym_kd_ratio: must lie in [0, 1], got {ratio}")
    if ratio in (0.0, 1.0):
        return SoftCrossEntropy() if ratio == 1.0 else ReverseKL()
    return ratio * SoftCrossEntropy() + (1.0 - ratio) * ReverseKL()

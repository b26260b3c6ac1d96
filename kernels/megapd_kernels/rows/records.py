"""What each position says, and the sums of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import LossOptions, TokenOutputs
from ..targets import Targets, reciprocal_or_zero

_OUTPUTS = 7  # per token, beside the divergences


class Records:
    """A row of a buffer [R, N] for each value; `divergences` is [M, N], of each member of the weighted sum."""

    def __init__(self, options: LossOptions, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.options, members = options, len(options.mixture.members)
        buffer = torch.zeros(members + (9 if options.per_token else 4), n, dtype=dtype, device=device)
        self.divergences = buffer[:members]
        self.cross_entropy, self.correct, self.smooth, self.log_sum, *outputs = buffer[members:]
        if outputs:
            self.entropy, self.teacher_entropy, self.best, self.teacher_best, self.overlap = outputs

    def results(self, targets: Targets, label_share: float, share: float, *, teacher: bool) -> tuple[Tensor, ...]:
        """(loss, divergence, cross_entropy, correct) as LossResult, and per token [M + 7, N], else empty."""
        divergence = self.options.mixture.total(self.divergences)
        columns = [divergence, self.cross_entropy, self.correct, self.smooth, self.log_sum.square()]
        if targets.weights is not None:
            # where, not times: a row that does not count may hold inf.
            columns = [torch.where(targets.weights != 0, targets.weights * column, 0.0) for column in columns]
        divergence, cross_entropy, correct, smooth, square = columns
        target = cross_entropy if targets.label_weights is None else cross_entropy * targets.label_weights
        if self.options.reduction == "mean":
            target, smooth, square, each = target.sum(), smooth.sum(), square.sum(), divergence.sum()
        else:
            each = divergence
        total, options = torch.zeros_like(each), self.options
        # A share of 0 drops its term: 0 * inf would be NaN.
        if label_share > 0:
            if options.label_smoothing > 0:
                target = (1.0 - options.label_smoothing) * target + options.label_smoothing * smooth
            total = total + label_share * target
        if label_share < 1:
            total = total + share * each
        if options.z_loss > 0:
            total = total + options.z_loss * square
        loss = total * reciprocal_or_zero(targets.denominator)
        return loss, divergence.sum(), cross_entropy.sum(), correct.sum(), self._outputs(targets, teacher)

    def _outputs(self, targets: Targets, teacher: bool) -> Tensor:
        if not self.options.per_token:
            return torch.empty(0, dtype=self.cross_entropy.dtype, device=self.cross_entropy.device)
        argmax = self.teacher_best if teacher else torch.full_like(self.best, -1.0)
        rows = [-self.cross_entropy, self.log_sum, self.entropy, self.teacher_entropy, self.best, argmax, self.overlap]
        out = torch.cat([self.divergences, torch.stack(rows)])
        if targets.counted is not None:
            nothing = torch.zeros(len(out), 1, dtype=out.dtype, device=out.device)
            nothing[-3:-1] = -1.0
            out = torch.where(targets.counted, out, nothing)
        return out


def outputs_shape(divergences: int, n: int) -> tuple[int, ...]:
    """Of the last of Records.results, where it is asked for."""
    return (divergences + _OUTPUTS, n)


def token_outputs(rows: Tensor) -> TokenOutputs | None:
    """Of the last of Records.results."""
    if rows.dim() == 1:
        return None
    divergences, (label, log_sum, entropy, teacher_entropy, best, teacher_best, share) = rows[:-_OUTPUTS], rows[-_OUTPUTS:]
    best, teacher_best = best.long(), teacher_best.long()
    agreement = (best == teacher_best) & (best >= 0)
    return TokenOutputs(divergences, label, log_sum, entropy, teacher_entropy, best, teacher_best, agreement, share)

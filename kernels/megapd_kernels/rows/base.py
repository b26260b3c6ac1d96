"""What every implementation of the row losses shares: the problem, the plan of chunks, the algebra of a row, the sums.

With M the largest logit s_j of a row and L_T = log sum exp((s_j - M) / T), log p_j = (s_j - M) / T - L_T. Keeping M and L_T apart
keeps the digits of p where the logits share a large offset. A row's gradient is, w its weight, h = (1 - alpha) t2 and
c_1 = w (alpha + 2 z_loss (M + L_1)):

    G_j = w h / T dD/da_j  +  c_1 softmax(s)_j  -  w alpha ((1 - label_smoothing) [j = label] + label_smoothing / V)

Letters: N positions, C rows of a chunk, V classes (of this rank), K ids a position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..options import LossOptions, LossResult, Targets, known_names, reciprocal_or_zero
from ..shard import VocabularyShard
from ..sparse import SparseTeacher, one_hot_teacher
from .divergences import local_total, sparse_divergence

# No implementation has more buffers of [C, V].
MOST_BUFFERS = 5

TeacherForm = Literal["none", "sparse", "dense"]


@dataclass(frozen=True)
class Problem:
    """Checked arguments of a loss beyond the differentiable ones; every tensor is a constant."""

    targets: Targets
    dtype: torch.dtype  # of sums, logits and accumulated gradients
    options: LossOptions
    teacher_logits: Tensor | None = None
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None
    teacher_bias: Tensor | None = None
    shard: VocabularyShard | None = None

    @property
    def form(self) -> TeacherForm:
        """Of the teacher as given; a dense one at temperature 0 acts as its argmax."""
        if self.targets.sparse is not None:
            return "sparse"
        return "none" if self.teacher_logits is None and self.teacher_hidden is None else "dense"

    @property
    def label_share(self) -> float:
        return 1.0 if self.form == "none" else self.options.alpha

    @property
    def share(self) -> float:
        """Of the divergence."""
        return (1.0 - self.label_share) * self.options.t2

    @property
    def temperature(self) -> float:
        """Of the student's logits in the divergence."""
        return 1.0 if self.form == "none" else self.options.student_temperature

    @property
    def softmax_one(self) -> bool:
        """Whether a row needs the softmax at temperature 1."""
        return self.targets.labels is not None or self.options.z_loss > 0


class Picked(NamedTuple):
    """A row's ids against the classes outside them: everything [C] or [C, K], of all ranks.

    maximum, log_sum, log_sum_one  M, L_T, L_1 over all classes
    log_p [C, K]                   log p_T at the ids
    p_one [C, K]                   softmax at temperature 1 there
    log_rest, log_rest_one         log of the mass outside the ids, at T and at 1
    """

    maximum: Tensor
    log_sum: Tensor
    log_sum_one: Tensor
    log_p: Tensor
    p_one: Tensor
    log_rest: Tensor
    log_rest_one: Tensor


class RowLoss(ABC):
    """Losses of rows and the gradient of chunks of logits, in buffers [C, V] that every chunk reuses.

    For each (start, stop) of chunks(): fill student() (and teacher() for a dense one), then call: the rows' values are recorded
    and d(sum_i w_i loss_i) / d(student logits) comes back in a buffer, valid until the next chunk; None where no gradient is
    asked for.
    """

    def __init__(self, problem: Problem, n: int, v: int, device: torch.device, *, grad: bool) -> None:
        self.problem, self.options, self.targets, self.grad = problem, problem.options, problem.targets, grad
        self.n, self.v, self.device = n, v, device
        self.dense = problem.form == "dense" and problem.options.teacher_temperature > 0
        # A second softmax, at temperature 1, where the divergence's differs.
        self.apart = problem.softmax_one and problem.temperature != 1.0
        self.classes = v if problem.shard is None else problem.shard.total
        self.total = local_total if problem.shard is None else problem.shard.sum
        self.records = torch.zeros(5, n, dtype=problem.dtype, device=device)
        self.divergence, self.cross_entropy, self.correct, self.smooth, self.log_sum = self.records
        chunk_bytes = problem.options.chunk_bytes or default_chunk_bytes(device)
        # All ranks must cut the rows alike, however many classes and buffers each has: their collectives meet chunk by chunk.
        row_bytes = (
            self.bytes_per_row() if problem.shard is None else MOST_BUFFERS * problem.shard.share() * problem.dtype.itemsize
        )
        most = max(1, chunk_bytes // max(1, row_bytes))
        # Equal chunks: a last one of a few rows costs a whole pass over dW.
        self.rows = -(-n // max(1, -(-n // most)))

    @abstractmethod
    def bytes_per_row(self) -> int:
        """Bytes of buffers that a row of a chunk takes."""

    @abstractmethod
    def student(self, start: int, stop: int) -> Tensor:
        """The buffer [stop - start, V] for the student's logits."""

    @abstractmethod
    def teacher(self, start: int, stop: int) -> Tensor:
        """The buffer [stop - start, V] for a dense teacher's logits."""

    @abstractmethod
    def __call__(self, start: int, stop: int) -> Tensor | None: ...

    def chunks(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.rows, self.n)) for start in range(0, self.n, max(1, self.rows))]

    def copy_rows(self, out: Tensor, source: Tensor, start: int, stop: int) -> None:
        """out = source[start:stop], and 0 where a position does not count: it may hold NaN."""
        out.copy_(source[start:stop])
        if self.targets.counted is not None:
            out.masked_fill_(~self.targets.counted[start:stop, None], 0.0)

    def weights(self, start: int, stop: int) -> Tensor:
        if self.targets.weights is None:
            return torch.ones(stop - start, dtype=self.problem.dtype, device=self.device)
        return self.targets.weights[start:stop]

    def results(self) -> LossResult:
        columns = [*self.records[:4], self.log_sum.square()]
        if self.targets.weights is not None:
            # where, not times: a row that does not count may hold inf.
            weights = self.targets.weights
            columns = [torch.where(weights != 0, weights * column, 0.0) for column in columns]
        divergence, cross_entropy, correct, smooth, square = (column.sum() for column in columns)
        total, options = torch.zeros_like(divergence), self.options
        # A share of 0 drops its term: 0 * inf would be NaN.
        if self.problem.label_share > 0:
            target = cross_entropy
            if options.label_smoothing > 0:
                target = (1.0 - options.label_smoothing) * cross_entropy + options.label_smoothing * smooth
            total = total + self.problem.label_share * target
        if self.problem.label_share < 1:
            total = total + self.problem.share * divergence
        if options.z_loss > 0:
            total = total + options.z_loss * square
        return LossResult(total * reciprocal_or_zero(self.targets.denominator), divergence, cross_entropy, correct)

    def sparse_rows(self, start: int, stop: int, teacher: Tensor | None) -> SparseTeacher | None:
        """The rows' teacher by ids; for a dense one at temperature 0, of logits `teacher` [stop - start, V], its argmax."""
        if self.targets.sparse is not None:
            return self.targets.sparse.select(slice(start, stop))
        if self.problem.form == "none" or self.dense:
            return None
        assert teacher is not None
        value, column = teacher.max(1)
        if self.problem.shard is not None:
            _, column = self.problem.shard.best(value, column)
        return one_hot_teacher(column, self.problem.dtype)

    def record_labels(
        self, rows: slice, maximum: Tensor, log_sum: Tensor, best: Tensor, label_logit: Tensor, mean: Tensor | None
    ) -> None:
        """From [C]: M, L_1, the class of the largest logit, the label's logit and the mean logit, of all ranks."""
        assert self.targets.labels is not None
        self.cross_entropy[rows] = (maximum - label_logit) + log_sum
        self.correct[rows] = best == self.targets.labels[rows]
        if mean is not None:
            self.smooth[rows] = (maximum - mean) + log_sum

    def one_coefficient(self, weights: Tensor, log_sum: Tensor) -> Tensor | None:
        """c_1 [C] of the softmax at temperature 1, whose log sum exp is given; None for none."""
        if self.problem.label_share == 0 and self.options.z_loss == 0:
            return None
        share = weights.new_full((), 0.0 if self.targets.labels is None else self.problem.label_share)
        if self.options.z_loss > 0:
            share = share + 2.0 * self.options.z_loss * log_sum
        return weights * share

    def pick(self, maximum: Tensor, log_sum: Tensor, log_sum_one: Tensor, picks: Tensor, teacher: SparseTeacher) -> Picked:
        """From M, L_T and L_1 [C] of the classes outside the ids, and the logits at the ids [C, K]."""
        temperature = self.problem.temperature
        once = picks if teacher.first is None else picks.masked_fill(~teacher.first, -torch.inf)
        outside = ~(maximum <= self.floor() / 2)  # NaN is not hidden
        rest = torch.where(outside, maximum, -torch.inf)
        overall = torch.maximum(rest, picks.amax(1))

        def combine(temperature: float, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scaled = (picks - overall[:, None]) / temperature
            counted = scaled if teacher.first is None else (once - overall[:, None]) / temperature
            log_rest = torch.where(outside, (rest - overall) / temperature + log_sum, -torch.inf)
            whole = torch.logaddexp(log_rest, torch.logsumexp(counted, 1))
            return whole, scaled - whole[:, None], log_rest - whole

        whole, log_p, log_rest = combine(temperature, log_sum)
        if self.apart:
            whole_one, log_p_one, log_rest_one = combine(1.0, log_sum_one)
        else:
            whole_one, log_p_one, log_rest_one = whole, log_p, log_rest
        return Picked(overall, whole, whole_one, log_p, log_p_one.exp(), log_rest, log_rest_one)

    def floor(self) -> float:
        """Stands for the logit of a class that another sum counts: finite, so that a row of nothing else stays finite too, and
        after the division by a temperature as well."""
        return torch.finfo(torch.float32).min * min(1.0, self.problem.temperature)

    def sparse_terms(
        self, rows: slice, weights: Tensor, picked: Picked, teacher: SparseTeacher
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Record D; (G at the ids [C, K], the factors [C] of the softmaxes over the classes outside at T and, or None, at 1).

        Without the label's and the smoothing's constants, and 0 at an id's further places: what is to be added once.
        """
        value, g, g_rest = sparse_divergence(self.options.divergence, picked.log_p, picked.log_rest, teacher, self.options.beta)
        self.divergence[rows] = value
        scale = weights * (self.problem.share / self.problem.temperature)
        # zeros, not times: the gradient of an infinite divergence is not finite.
        at_ids = scale[:, None] * g if self.problem.share > 0 else torch.zeros_like(g)
        outside = scale * g_rest if self.problem.share > 0 else torch.zeros_like(scale)
        one = self.one_coefficient(weights, picked.maximum + picked.log_sum_one)
        outside_one = None
        if one is not None:
            at_ids = at_ids + one[:, None] * picked.p_one
            outside_one = one * picked.log_rest_one.exp()
            if not self.apart:
                outside, outside_one = outside + outside_one, None
        if teacher.first is not None:
            at_ids = at_ids * teacher.first
        return at_ids, outside, outside_one


@known_names
def default_chunk_bytes(device: torch.device) -> int:
    """Bytes of full-precision logits alive at once, where nothing is asked for."""
    return 64 << 20 if device.type == "cpu" else 2 << 30


def best_of(maximum: Tensor, column: Tensor, picks: Tensor, ids: Tensor) -> Tensor:
    """The class [C] of the largest logit, the lowest on ties: of `column`, logit `maximum` [C], and ids, logits picks [C, K]."""
    top = picks.amax(1)
    last = torch.iinfo(torch.int64).max
    first = ids.masked_fill(picks != top[:, None], last).amin(1)
    return torch.where((top > maximum) | ((top == maximum) & (first < column)), first, column)

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
from typing import Literal

import torch
from torch import Tensor

from ..options import LossOptions, known_names
from ..shard import VocabularyShard
from ..sparse import SparseTeacher, one_hot_teacher
from ..targets import Targets
from .ids import Picked, nucleus_, overlap, shape_, sparse_divergence, student_top, teacher_outputs
from .records import Records

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
    product_dtype: torch.dtype | None = None  # options' or autocast's

    @property
    def form(self) -> TeacherForm:
        """Of the teacher as given; a dense one at temperature 0 acts as its argmax."""
        if self.targets.sparse is not None:
            return "sparse"
        return "none" if self.teacher_logits is None and self.teacher_hidden is None else "dense"

    @property
    def dense(self) -> bool:
        """Whether all classes of a dense teacher count: at temperature 0, and on the student's top k, a few ids do."""
        return self.form == "dense" and self.options.teacher_temperature > 0 and self.options.student_top_k is None

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
        return self.targets.labels is not None or self.options.z_loss > 0 or self.options.per_token


class RowLoss(ABC):
    """Losses of rows and the gradient of chunks of logits, in buffers [C, V] that every chunk reuses.

    For each (start, stop) of chunks(): fill student(), and teacher() for one of hidden states, with the logits as they are, then
    call: the rows' values are recorded and d(sum_i w_i loss_i) / d(student logits) comes back in a buffer, valid until the next
    chunk; None where no gradient is asked for.

    gradient_scale  0-dim or None: what that gradient is multiplied by
    """

    gradient_scale: Tensor | None = None

    def __init__(self, problem: Problem, n: int, v: int, device: torch.device, *, grad: bool) -> None:
        self.problem, self.options, self.targets, self.grad = problem, problem.options, problem.targets, grad
        self.n, self.v, self.device = n, v, device
        self.dense, self.mixture = problem.dense, problem.options.mixture
        # A second softmax, at temperature 1, where the divergence's differs.
        self.apart = problem.softmax_one and problem.temperature != 1.0
        self.classes = v if problem.shard is None else problem.shard.total
        self.total = (lambda x: x) if problem.shard is None else problem.shard.sum
        self.records = Records(problem.options, n, problem.dtype, device)
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

    def results(self) -> tuple[Tensor, ...]:
        """See Records.results."""
        problem = self.problem
        return self.records.results(self.targets, problem.label_share, problem.share, teacher=problem.form != "none")

    def sparse_rows(self, start: int, stop: int, student: Tensor, teacher: Tensor | None) -> SparseTeacher | None:
        """The rows' teacher by ids; for a dense one that counts at few, of logits `teacher` [stop - start, V], those."""
        if self.targets.sparse is not None:
            return self.targets.sparse.select(slice(start, stop))
        if self.problem.form == "none" or self.dense:
            return None
        assert teacher is not None
        if self.options.student_top_k is not None:
            return student_top(student, teacher, self.options.student_top_k, self.options.teacher_temperature)
        value, column = teacher.max(1)
        if self.problem.shard is not None:
            _, column = self.problem.shard.best(value, column)
        return one_hot_teacher(column, self.problem.dtype)

    def shape_teacher(self, teacher: Tensor) -> None:
        """A dense teacher's logits as they count, in place."""
        options = self.options
        if options.teacher_shape > 0:
            shape_(teacher, options.teacher_logit_scale, options.teacher_soft_cap, slope=False)
        if options.teacher_top_p is not None and self.dense:
            nucleus_(teacher, teacher, options.teacher_temperature, options.teacher_top_p)

    def top(self, logits: Tensor) -> Tensor:
        """[C, k], the classes of the k largest logits [C, V] over all ranks, for the agreement."""
        k, shard = self.options.top_k_agreement, self.problem.shard
        values, ids = logits.topk(min(k, logits.shape[1]), 1)
        return ids if shard is None else shard.top(values.float(), ids + shard.start, min(k, shard.total))[1]

    def record_agreement(self, rows: slice, student: Tensor, teacher: Tensor | None, sparse: SparseTeacher | None) -> None:
        """Before the logits are overwritten: how many of the teacher's top k are the student's."""
        k = self.options.top_k_agreement
        if k == 0 or (teacher is None and sparse is None):
            return
        if teacher is None:
            assert sparse is not None
            if sparse.ids.shape[1] < k:
                raise ValueError(
                    f"top_k_agreement: {k}, but the teacher gives {sparse.ids.shape[1]} ids a position; ask for fewer"
                )
            top = sparse.ids.gather(1, sparse.log_q.topk(k, 1).indices)
        else:
            top = self.top(teacher)
        self.records.overlap[rows] = overlap(self.top(student), top)

    def record_teacher_ids(self, rows: slice, teacher: SparseTeacher) -> None:
        if self.options.per_token:
            self.records.teacher_best[rows], self.records.teacher_entropy[rows] = teacher_outputs(teacher)

    def record_labels(
        self, rows: slice, maximum: Tensor, log_sum: Tensor, best: Tensor, label_logit: Tensor, mean: Tensor | None
    ) -> None:
        """From [C]: M, L_1, the class of the largest logit, the label's logit and the mean logit, of all ranks."""
        assert self.targets.labels is not None
        self.records.cross_entropy[rows] = (maximum - label_logit) + log_sum
        self.records.correct[rows] = best == self.targets.labels[rows]
        if mean is not None:
            self.records.smooth[rows] = (maximum - mean) + log_sum

    def record_log_sum(self, rows: slice, log_sum: Tensor) -> None:
        """L_1 with its maximum, [C]."""
        if self.options.z_loss > 0 or self.options.per_token:
            self.records.log_sum[rows] = log_sum

    def label_weights(self, rows: slice) -> Tensor | float:
        """alpha times the class weight of each label."""
        weights = self.targets.label_weights
        return self.problem.label_share if weights is None else self.problem.label_share * weights[rows]

    def one_coefficient(self, rows: slice, weights: Tensor, log_sum: Tensor) -> Tensor | None:
        """c_1 [C] of the softmax at temperature 1, whose log sum exp is given; None for none."""
        if self.problem.label_share == 0 and self.options.z_loss == 0:
            return None
        share = weights.new_zeros(()) + (0.0 if self.targets.labels is None else self.label_weights(rows))
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
        values, g, g_rest = sparse_divergence(self.mixture, picked.log_p, picked.log_rest, teacher)
        self.records.divergences[:, rows] = values
        scale = weights * (self.problem.share / self.problem.temperature)
        # zeros, not times: the gradient of an infinite divergence is not finite.
        at_ids = scale[:, None] * g if self.problem.share > 0 else torch.zeros_like(g)
        outside = scale * g_rest if self.problem.share > 0 else torch.zeros_like(scale)
        one = self.one_coefficient(rows, weights, picked.maximum + picked.log_sum_one)
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

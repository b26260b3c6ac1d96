"""The row losses in plain torch, on any device: one pass of torch operations over buffers that each chunk reuses."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Problem, RowLoss
from .ids import best_of, shape_

# What the operations on rows need beside their logits is as large as a block, not as a chunk: the budget buys half as many rows
# again, and each chunk's product reads and writes all of dW. Blocks of 1 MiB to 1 GiB took the same time.
BLOCK_BYTES = 4 << 20


class TorchRows(RowLoss):
    """Logits of a chunk, for the products; on a CPU, scratch for a block of its rows."""

    def __init__(self, problem: Problem, n: int, v: int, device: torch.device, *, grad: bool) -> None:
        super().__init__(problem, n, v, device, grad=grad)
        # Ranks of a vocabulary shard speak to each other once or twice a block.
        whole = device.type != "cpu" or problem.shard is not None
        most = BLOCK_BYTES // max(1, v * problem.dtype.itemsize * (self._logits_count() + self._scratch_count()))
        self.block = max(1, self.rows if whole else min(self.rows, most))
        self._logits = [torch.empty(self.rows, v, dtype=problem.dtype, device=device) for _ in range(self._logits_count())]
        self._scratch = [
            torch.empty(min(self.block, self.rows), v, dtype=problem.dtype, device=device) for _ in range(self._scratch_count())
        ]

    def _logits_count(self) -> int:
        """Of a chunk: a teacher's logits that exist are read a block at a time, where they are."""
        return 1 + (self.problem.teacher_hidden is not None)

    def _scratch_count(self) -> int:
        given = self.problem.teacher_logits is not None
        return 1 + given + (self.dense and self.mixture.scratch > 1) + self._keep_one()

    def _keep_one(self) -> bool:
        """Whether the softmax at temperature 1 lives beside the divergence's until the gradient."""
        return self.apart and self.grad and (self.problem.label_share > 0 or self.options.z_loss > 0)

    def bytes_per_row(self) -> int:
        whole = self.device.type != "cpu" or self.problem.shard is not None
        return (self._logits_count() + whole * self._scratch_count()) * self.v * self.problem.dtype.itemsize

    def student(self, start: int, stop: int) -> Tensor:
        return self._logits[0][: stop - start]

    def teacher(self, start: int, stop: int) -> Tensor:
        return self._logits[1][: stop - start]

    def __call__(self, start: int, stop: int) -> Tensor | None:
        for first in range(start, stop, self.block):
            last = min(first + self.block, stop)
            s, *teachers = (buffer[first - start : last - start] for buffer in self._logits)
            scratch = [buffer[: last - first] for buffer in self._scratch]
            if self.problem.teacher_logits is not None:
                teachers = [scratch.pop()]
                self.copy_rows(teachers[0], self.problem.teacher_logits, first, last)
            teacher = teachers[0] if teachers else None
            slope = None
            if self.options.shape > 0:
                slope = shape_(s, self.options.logit_scale, self.options.soft_cap, slope=self.grad)
            if teacher is not None:
                self.shape_teacher(teacher)
            g = self._rows(first, last, s, teacher, scratch)
            if g is not None and slope is not None:
                g.mul_(slope)
            if g is not None and g is not s:
                s.copy_(g)
        return self.student(start, stop) if self.grad else None

    def _rows(self, start: int, stop: int, s: Tensor, teacher: Tensor | None, scratch: list[Tensor]) -> Tensor | None:
        """The gradient of some rows, in one of the buffers; their logits are overwritten."""
        options, problem, shard, rows = self.options, self.problem, self.problem.shard, slice(start, stop)
        w = self.weights(start, stop)
        sparse = self.sparse_rows(start, stop, s, teacher)
        log_p, *free = scratch
        self.record_agreement(rows, s, teacher, sparse)

        labels, columns, mine = self.targets.labels, None, None
        label_logit = mean = None
        if labels is not None:
            columns, mine = self._columns(labels[rows])
            label_logit = self._everywhere(_pick(s, columns), mine)
            if options.label_smoothing > 0:
                mean = self.total(s.sum(1)) / self.classes
        picks, id_columns, id_mine, picked = None, None, None, None
        if sparse is not None:
            id_columns, id_mine = self._columns(sparse.ids)
            picks = self._everywhere(s.gather(1, id_columns), id_mine)
            # From here on s is that of the classes outside the ids. amin with inf leaves another rank's id alone.
            low = torch.full_like(picks, self.floor())
            s.scatter_reduce_(1, id_columns, low if id_mine is None else torch.where(id_mine, low, torch.inf), "amin")

        # Normalisers: needed as numbers wherever more than log_softmax itself reads them.
        maximum = column = None
        if problem.softmax_one or sparse is not None or shard is not None:
            maximum, column = s.max(1)
        if shard is not None:
            assert maximum is not None
            s.masked_fill_((maximum == -torch.inf)[:, None], self.floor())  # a part with nothing but banned classes
        p_one: Tensor | None = None
        if self.apart:
            p_one = torch.log_softmax(s, 1, out=free.pop() if self._keep_one() else log_p)
            assert column is not None
            log_sum_one = -_pick(p_one, column)
            if p_one is not log_p:
                p_one.exp_()
        if problem.temperature != 1.0:
            s.div_(problem.temperature)
        torch.log_softmax(s, 1, out=log_p)
        if maximum is not None and column is not None:
            log_sum = -_pick(log_p, column)
            if not self.apart:
                log_sum_one = log_sum
            if shard is not None:
                _, column = shard.best(maximum, column)
                here, log_sum_here, one_here = maximum, log_sum, log_sum_one
                maximum, log_sum, log_sum_one = shard.logsumexp(here, (log_sum, problem.temperature), (log_sum_one, 1.0))
                log_p += _shift(here, log_sum_here, maximum, log_sum, problem.temperature)
                if p_one is not None and p_one is not log_p:
                    p_one *= _shift(here, one_here, maximum, log_sum_one, 1.0).exp()
            if sparse is not None:
                assert picks is not None
                column = best_of(maximum, column, picks, sparse.ids)
                picked = self.pick(maximum, log_sum, log_sum_one, picks, sparse)
                maximum, log_sum_one = picked.maximum, picked.log_sum_one
            if label_logit is not None:
                self.record_labels(rows, maximum, log_sum_one, column, label_logit, mean)
            self.record_log_sum(rows, maximum + log_sum_one)
            if options.per_token:
                self.records.best[rows] = column
        if options.per_token:
            entropy = self.total(_entropy(log_p))
            self.records.entropy[rows] = entropy if picked is None or sparse is None else picked.entropy(entropy, sparse.first)
        if sparse is not None:
            self.record_teacher_ids(rows, sparse)

        if self.dense:
            assert teacher is not None
            if options.per_token:
                value, best = teacher.max(1)
                self.records.teacher_best[rows] = best if shard is None else shard.best(value, best)[1]
            log_q = self._log_softmax(teacher, s)
            if options.per_token:
                self.records.teacher_entropy[rows] = self.total(_entropy(log_q))
            values, g, p = self.mixture.rows(log_p, log_q, [teacher, *free], self.total)
            self.records.divergences[:, rows] = values
            if not self.grad:
                return None
            # zero_, not times: the gradient of an infinite divergence is not finite.
            g.mul_((w * (problem.share / problem.temperature))[:, None]) if problem.share > 0 else g.zero_()
            if maximum is not None:
                one = self.one_coefficient(rows, w, maximum + log_sum_one)
                if one is not None:
                    g.addcmul_(p if p_one is None else p_one, one[:, None])
        elif sparse is not None:
            assert picked is not None
            assert id_columns is not None
            at_ids, outside, outside_one = self.sparse_terms(rows, w, picked, sparse)
            if not self.grad:
                return None
            g = log_p.exp_().mul_(outside[:, None])
            if outside_one is not None:
                assert p_one is not None
                g.addcmul_(p_one, outside_one[:, None])
            # The softmax of the classes outside is 0 at the ids.
            g.scatter_add_(1, id_columns, at_ids if id_mine is None else at_ids.masked_fill(~id_mine, 0.0))
        else:
            if not self.grad:
                return None
            assert maximum is not None
            one = self.one_coefficient(rows, w, maximum + log_sum_one)
            assert one is not None
            g = log_p.exp_().mul_(one[:, None])
        if columns is not None and problem.label_share > 0:
            value = -self.label_weights(rows) * (1.0 - options.label_smoothing) * w
            g.scatter_add_(1, columns[:, None], (value if mine is None else value.masked_fill(~mine, 0.0))[:, None])
            if options.label_smoothing > 0:
                g -= (problem.label_share * options.label_smoothing / self.classes * w)[:, None]
        return g

    def _columns(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return (ids, None) if self.problem.shard is None else self.problem.shard.inside(ids, self.v)

    def _everywhere(self, x: Tensor, mine: Tensor | None) -> Tensor:
        return x if mine is None else self.total(x.masked_fill(~mine, 0.0))

    def _log_softmax(self, logits: Tensor, out: Tensor) -> Tensor:
        """log softmax of logits / teacher temperature, over all ranks; overwrites logits."""
        temperature, shard = self.options.teacher_temperature, self.problem.shard
        if shard is None and temperature == 1.0:
            return torch.log_softmax(logits, 1, out=out)
        maximum, column = logits.max(1)
        if shard is not None:
            logits.masked_fill_((maximum == -torch.inf)[:, None], self.floor())
        # (logits - their maximum) / temperature: 1e-20 does not overflow to inf - inf.
        torch.log_softmax(logits.sub_(torch.where(maximum == -torch.inf, 0.0, maximum)[:, None]).div_(temperature), 1, out=out)
        if shard is not None:
            here = -_pick(out, column)
            overall, log_sum = shard.logsumexp(maximum, (here, temperature))
            out += _shift(maximum, here, overall, log_sum, temperature)
        return out


def _entropy(log_p: Tensor) -> Tensor:
    """[C] of log probabilities [C, V]."""
    terms: Tensor = torch.special.entr(log_p.exp())
    return terms.sum(1)


def _shift(maximum: Tensor, log_sum: Tensor, overall: Tensor, log_sum_overall: Tensor, temperature: float) -> Tensor:
    """[C, 1], what turns a part's log softmax into that of all classes."""
    return ((maximum - overall) / temperature + log_sum - log_sum_overall)[:, None]


def _pick(x: Tensor, columns: Tensor) -> Tensor:
    return x.gather(1, columns[:, None]).squeeze(1)

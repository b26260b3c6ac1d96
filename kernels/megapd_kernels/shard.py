"""VocabularyShard: a head whose classes are split over the ranks of a process group (vocabulary parallel)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .options import known_names


@known_names
@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the classes. Every rank of the group calls the loss with the same rows and its own part of the weight.

    group  name of the process group (`group.group_name`), as strings are what compiled operations can carry
    start  the first class of this rank's weight; the parts of the ranks lie next to each other in rank order
    total  classes of all ranks together
    """

    group: str
    start: int
    total: int

    @staticmethod
    @known_names
    def of(group: dist.ProcessGroup, start: int, total: int) -> VocabularyShard:
        if not 0 <= start <= total:
            raise ValueError(f"start: must lie in [0, {total}], got {start}")
        return VocabularyShard(group.group_name, start, total)

    def check(self, classes: int) -> None:
        """Raise ValueError unless `classes` of this rank fit into the total."""
        if not 1 <= classes <= self.total - self.start:
            raise ValueError(f"shard: {classes} classes from {self.start} on, but all ranks together have {self.total}")

    def share(self) -> int:
        """Classes of a rank on average, rounded up: the same number on every rank."""
        return -(-self.total // dist.get_world_size(self._group()))

    def inside(self, ids: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """(ids as columns of this rank's part, 0 where they lie elsewhere; whether they lie in it); classes: size of the part."""
        columns = ids - self.start
        mine = (columns >= 0) & (columns < classes)
        return columns.masked_fill(~mine, 0), mine

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in rank order on every rank, so that all hold the same bits."""
        return self._gathered(x).sum(0)

    def logsumexp(self, maximum: Tensor, *log_sums: tuple[Tensor, float]) -> tuple[Tensor, ...]:
        """(maximum over ranks; log sum exp((x - maximum) / temperature) over all classes for each (local sum, temperature)).

        All [C]. One collective. A rank whose classes are all banned has maximum -inf.
        """
        parts = self._gathered(torch.stack([maximum, *(log_sum for log_sum, _ in log_sums)]))
        overall = parts[:, 0].amax(0)
        merged = []
        for column, (_, temperature) in enumerate(log_sums, start=1):
            gap = ((parts[:, 0] - overall) / temperature).nan_to_num_(nan=0.0, neginf=-torch.inf)
            merged.append(torch.logsumexp(gap + parts[:, column], 0))
        return overall, *merged

    def best(self, value: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """(the largest value over ranks, its class): on ties the lowest rank, hence the lowest class. [C]."""
        values, classes = self._gathered(value), self._gathered(column + self.start)
        rank = values.argmax(0, keepdim=True)
        return values.gather(0, rank).squeeze(0), classes.gather(0, rank).squeeze(0)

    def top(self, values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(values, ids) [C, k], the largest over ranks, ties by rising id; each rank gives at most k, as many as it has."""
        pad = k - values.shape[1]
        values = torch.nn.functional.pad(values, (0, pad), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, pad), value=self.total)
        all_values, all_ids = self._gathered(values), self._gathered(ids)
        values, ids = all_values.transpose(0, 1).flatten(1), all_ids.transpose(0, 1).flatten(1)
        ids, order = ids.sort(1)
        values, order = values.gather(1, order).sort(stable=True, dim=1, descending=True)
        return values[:, :k].contiguous(), ids.gather(1, order[:, :k])

    def whole(self, part: Tensor, dim: int = 0) -> Tensor:
        """All classes on every rank, from each rank's own along `dim`, of parts of `share` classes, the last ones fewer.

        Raises ValueError if this rank's part is none of those.
        """
        width, classes = self.share(), part.shape[dim]
        if self.start != dist.get_rank(self._group()) * width or classes != min(width, self.total - self.start):
            raise ValueError(f"shard: {classes} classes from {self.start} on; whole takes parts of {width} of the {self.total}")
        padded = part.new_zeros(*part.shape[:dim], width, *part.shape[dim + 1 :])
        padded.narrow(dim, 0, classes).copy_(part)
        return torch.cat(self._gathered(padded).unbind(), dim).narrow(dim, 0, self.total).contiguous()

    def reduce(self, x: Tensor) -> None:
        """Sum over ranks in place, for large tensors."""
        dist.all_reduce(x, group=self._group())

    def _gathered(self, x: Tensor) -> Tensor:
        group = self._group()
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
        return out

    def _group(self) -> dist.ProcessGroup:
        return torch._C._distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]

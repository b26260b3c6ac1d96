"""How good a model is on data that it does not learn from: held-out loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapd.batch import Batch
from megapd.errors import UserError
from megapd.tasks import Task
from megapd.world import World


def held_out(task: Task, samples: int, world: World, micro_batch: int, sums_of: Callable[[Batch], Tensor]) -> dict[str, float]:
    """Cross entropy and accuracy over the first `samples` held-out samples; the same for any number of ranks.

    Of a task whose samples come from several sources, also the cross entropy of each, as `loss/NAME`.
    sums_of: detached sums of a batch, the first three divergence, cross entropy, correct. All ranks call it together and make
    the same number of forwards, as ZeRO-3 gathers weights in each: a rank whose share ends early runs empty batches.
    """
    check_samples(task, samples)
    by_source: Callable[[int], dict[str, Any]] = getattr(task, "heldout_by_source", lambda n: {"": range(n)})
    sources = by_source(samples)
    sums = torch.zeros(len(sources), 4, dtype=torch.float64, device=world.device)
    for rows, kept in zip(sources.values(), sums, strict=True):
        for first in range(0, len(rows), micro_batch * world.size):
            begin = min(len(rows), first + world.rank * micro_batch)
            batch = task.heldout(rows[begin : begin + micro_batch]).to(world.device)
            kept[:3] += sums_of(batch)[:3]
            kept[3] += batch.labelled
    if world.size > 1:
        dist.all_reduce(sums)
    _, cross_entropy, correct, labelled = sums.sum(dim=0).tolist()
    found = {"loss": cross_entropy / max(labelled, 1), "accuracy": correct / max(labelled, 1), "samples": samples}
    if len(sources) > 1:
        found |= {f"loss/{name}": row[1] / max(row[3], 1) for name, row in zip(sources, sums.tolist(), strict=True)}
    return found


def check_samples(task: Task, samples: int) -> None:
    """UserError where the task has fewer held-out samples."""
    if samples > task.heldout_samples:
        what = f"evaluation.samples: {samples} asked for, the task holds out {task.heldout_samples}"
        raise UserError(f"{what}; ask for as many, or raise corpus.heldout_fraction and prepare again")

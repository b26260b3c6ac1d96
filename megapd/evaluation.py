"""How good a model is on data that it does not learn from: held-out loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megapd.batch import Batch
from megapd.tasks import Task
from megapd.world import World


def held_out(task: Task, samples: int, world: World, micro_batch: int, sums_of: Callable[[Batch], Tensor]) -> dict[str, float]:
    """Cross entropy and accuracy over `samples` held-out samples, all if there are fewer; the same for any number of ranks.

    sums_of: detached sums [3] of a batch: divergence, cross entropy, correct. All ranks call it together and make the same
    number of forwards, as ZeRO-3 gathers weights in each: a rank whose share ends early runs empty batches.
    """
    samples = min(samples, task.heldout_samples)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    for first in range(0, samples, micro_batch * world.size):
        begin = min(samples, first + world.rank * micro_batch)
        batch = task.heldout(range(begin, min(samples, begin + micro_batch))).to(world.device)
        sums[:3] += sums_of(batch)
        sums[3] += batch.labelled
    if world.size > 1:
        dist.all_reduce(sums)
    _, cross_entropy, correct, labelled = sums.tolist()
    return {"loss": cross_entropy / max(labelled, 1), "accuracy": correct / max(labelled, 1), "samples": samples}

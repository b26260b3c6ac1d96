"""A teacher's top-k classes with exact log probabilities, without the logits in memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .linear import Product
from .options import MIN_TEMPERATURE, LossOptions, known_names
from .rows.base import default_chunk_bytes
from .shard import VocabularyShard
from .targets import accumulation_dtype, check_rows


class TopK(NamedTuple):
    """ids [N, k] int64 by falling probability, ties by rising id; logprobs [N, k] and log_rest [N], the log of the mass of all
    other classes, float32 (float64 where an input is): log softmax of logits / temperature over all V classes."""

    ids: Tensor
    logprobs: Tensor
    log_rest: Tensor


@known_names
@torch.no_grad()
def topk_logits(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> TopK:
    """The k largest of the logits hidden [N, D] @ weight [V, D].T + bias [V], a chunk of rows at a time. Not differentiable.

    log_rest comes from the sum over the other classes, not from 1 - sum of the k: it keeps its digits where the k hold nearly
    all. temperature: above 0; `linear_sparse_kl` then takes the result at teacher_temperature 1. shard: weight and bias are this
    rank's part; every rank gets the top k of all. Raises ValueError that names the argument.
    """
    check_rows("hidden", hidden, (None, None), hidden.device)
    check_rows("weight", weight, (None, hidden.shape[1]), hidden.device)
    rows, classes = hidden.shape[0], weight.shape[0]
    if bias is not None:
        check_rows("bias", bias, (classes,), hidden.device)
    if shard is not None:
        shard.check(classes)
    total = classes if shard is None else shard.total
    if not 1 <= k <= total:
        raise ValueError(f"k: must lie in [1, {total}], the number of classes, got {k}")
    if not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature: must be at least {MIN_TEMPERATURE}, got {temperature}; the argmax is k = 1")
    dtype = accumulation_dtype(hidden, weight, bias)
    LossOptions(chunk_bytes=chunk_bytes)
    width = classes if shard is None else shard.share()  # all ranks must cut the rows alike
    most = (default_chunk_bytes(hidden.device) if chunk_bytes is None else chunk_bytes) // max(1, 2 * width * dtype.itemsize)
    size = min(max(1, most), max(1, rows))
    buffer = torch.empty(size, classes, dtype=dtype, device=hidden.device)
    product = Product(hidden, weight, bias, dtype)
    ids = torch.empty(rows, k, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(rows, k, dtype=dtype, device=hidden.device)
    log_rest = torch.empty(rows, dtype=dtype, device=hidden.device)
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        logits = buffer[: chunk.stop - chunk.start]
        product.logits(logits, chunk.start, chunk.stop)
        ids[chunk], logprobs[chunk], log_rest[chunk] = _top(logits, k, temperature, shard)
    return TopK(ids, logprobs, log_rest)


def _top(logits: Tensor, k: int, temperature: float, shard: VocabularyShard | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [C, V], which are overwritten."""
    here = min(k, logits.shape[1])
    values, columns = logits.topk(here, 1)
    # Equal values come in any order, and which of those at the k-th place are in is open too: fixed by rising id within the k.
    columns, order = columns.sort(1)
    values, order = values.gather(1, order).sort(stable=True, dim=1, descending=True)
    ids = columns.gather(1, order)
    if shard is not None:
        values, ids = shard.top(values, ids + shard.start, k)
    maximum = values[:, :1]
    scaled = (values - maximum) / temperature
    # The other classes: those of this rank that are not in the k; another rank's ids change nothing (amin with inf).
    mine_columns, low = ids, torch.full_like(values, -torch.inf)
    if shard is not None:
        mine_columns, mine = shard.inside(ids, logits.shape[1])
        low = low.masked_fill(~mine, torch.inf)
    logits.scatter_reduce_(1, mine_columns, low, "amin")
    rest = torch.logsumexp(logits.sub_(maximum).div_(temperature), 1)
    if shard is not None:
        _, rest = shard.logsumexp(torch.zeros_like(rest), (rest, 1.0))  # not the sum of exp: it underflows below e-103
    whole = torch.logaddexp(torch.logsumexp(scaled, 1), rest)
    return ids, scaled - whole[:, None], rest - whole

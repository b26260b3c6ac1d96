"""Teachers given by a few class ids a position: top-k in three conventions, samples, the argmax.

Let K be the ids of a position, q_k the teacher's probabilities there, p the student's softmax over all V classes. The sums of

    tail          run over K + 1 buckets, the last holding the rest: t = 1 - sum q_k against 1 - sum p_k. Every divergence
    renormalised  run over all classes, with q_k / sum q in K and 0 elsewhere. Not reverse_kl, which is infinite
    support       run over K alone, with q_k as they are: sum_k q_k (log q_k - log p_k). forward_kl, soft_cross_entropy
    sampled       estimate the cross entropy from draws of the teacher: - sum_k w_k log p_k, where logprobs are the log of the
                  weights and ids may repeat. Unbiased if w_k is the number of draws of k over all draws, or weights by importance
                  ("Sparse Logit Sampling", arXiv 2503.16870). forward_kl and soft_cross_entropy, which then are the same number

`renormalised` is `tail` with t = 0: where q is 0, only the sum of p matters to every divergence here. The argmax is its case
K = 1.
Through buckets the gradient is that of the dense formulas: with g_b = dD/da_b over the K + 1 log probabilities a_b,

    dD/ds_k = g_k                in K
    dD/ds_j = g_rest p_j / P     elsewhere, P the student's mass there

and for `support` and `sampled`, with m = sum q_k: dD/ds_j = m p_j - q_j. None of them subtracts near-equal numbers: P comes from
the sum over the classes outside K, not from 1 - sum p_k.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .options import LossOptions

Convention = Literal["tail", "renormalised", "support", "sampled"]


class SparseTeacher(NamedTuple):
    """ids [N, K] int64; log_q [N, K] and log_rest [N] of the accumulation type; buckets: whether the sums run over K + 1 buckets.

    first [N, K] bool, or None where ids are distinct: an id's first place. Every place of a repeated id holds its whole weight.
    entropy_free: the divergence's log q term is left out (an estimate from draws has none).
    """

    ids: Tensor
    log_q: Tensor
    log_rest: Tensor
    first: Tensor | None
    buckets: bool
    entropy_free: bool

    def select(self, rows: slice | Tensor) -> SparseTeacher:
        """The teacher of some positions, a slice or a mask [N]."""
        first = None if self.first is None else self.first[rows]
        return self._replace(ids=self.ids[rows], log_q=self.log_q[rows], log_rest=self.log_rest[rows], first=first)


def one_hot_teacher(ids: Tensor, dtype: torch.dtype) -> SparseTeacher:
    """The teacher that gives all its mass to ids [N]."""
    zero = torch.zeros(ids.shape[0], 1, dtype=dtype, device=ids.device)
    return SparseTeacher(ids[:, None], zero, torch.full_like(zero[:, 0], -torch.inf), None, True, False)


def sparse_teacher(
    ids: Tensor,
    logprobs: Tensor,
    log_rest: Tensor | None,
    convention: Convention | None,
    options: LossOptions,
    dtype: torch.dtype,
    counted: Tensor | None,
    classes: int,
) -> SparseTeacher:
    """ids, logprobs [N, K] in a convention; log_rest [N]: log of the mass outside K, by default log(1 - sum exp logprobs), at
    least what rounding leaves unknown of that mass, see `_rest`; no mass where K is all `classes`: no class can take it.

    Raises ValueError that names the argument.
    """
    mixture, temperature = options.mixture, options.teacher_temperature
    if convention not in get_args(Convention):
        raise ValueError(f"convention: name one of {', '.join(get_args(Convention))} for teacher_logprobs, got {convention!r}")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"teacher_ids: expected shape [N, K] with K at least 1, got {list(ids.shape)}")
    if convention != "sampled" and ids.shape[1] > classes:
        raise ValueError(f"teacher_ids: {ids.shape[1]} distinct ids a position, but there are {classes} classes; give fewer")
    if log_rest is not None and convention != "tail":
        raise ValueError(f"teacher_log_rest: has a meaning for the convention tail, not for {convention}; leave it out")
    if convention in ("support", "sampled") and not mixture.from_support:
        raise ValueError(f"divergence: {mixture.name} has no meaning for the convention {convention}; choose forward_kl")
    if convention == "renormalised" and mixture.needs_rest:
        raise ValueError(f"convention: {mixture.needs_rest}; choose tail, or another divergence")
    if temperature != 1.0 and convention != "renormalised" and not (temperature == 0.0 and convention != "sampled"):
        raise ValueError(
            f"teacher_temperature: {temperature} cannot be applied to a part of a softmax ({convention}); "
            "give log-probabilities that have it, see topk_logits, and leave it at 1"
        )
    if counted is not None:
        # What a position that does not count holds, NaN too, has no influence: a teacher of finite divergence in its place.
        even = -math.log(ids.shape[1] + 1)
        logprobs = logprobs.masked_fill(~counted[:, None], even)
        ids = torch.where(counted[:, None], ids, torch.arange(ids.shape[1], device=ids.device) % classes)
        log_rest = None if log_rest is None else log_rest.masked_fill(~counted, even)
    if temperature == 0.0:
        return one_hot_teacher(ids.gather(1, logprobs.argmax(1, keepdim=True)).squeeze(1), logprobs.dtype)
    nothing = torch.full_like(logprobs[:, 0], -torch.inf, dtype=dtype)
    if convention == "renormalised":
        # A position whose K are all -inf stays that, for check_ids to find.
        log_q = torch.log_softmax(logprobs.to(dtype) / temperature, 1).masked_fill(
            (logprobs == -torch.inf).all(1, True), -torch.inf
        )
        return SparseTeacher(ids, log_q, nothing, None, True, False)
    if convention == "tail":
        if log_rest is None:
            log_rest = nothing if ids.shape[1] == classes else _rest(logprobs, dtype)
        return SparseTeacher(ids, logprobs.to(dtype), log_rest, None, True, False)
    if convention == "support":
        return SparseTeacher(ids, logprobs.to(dtype), nothing, None, False, False)
    return _merged(ids, logprobs.to(dtype))


def _rest(logprobs: Tensor, dtype: torch.dtype) -> Tensor:
    """[N], log(1 - sum_k q_k), but no less mass than the log probabilities' rounding may have taken: each is off by half a unit
    in its last place, eps |log q_k| / 2, hence q_k by eps q_k |log q_k| / 2, and their sum by its type's eps.

    A confident token's sum rounds to 1: a mass of 0 there would make a reverse KL infinite.
    """
    exact = logprobs.to(torch.promote_types(logprobs.dtype, dtype))
    q = exact.exp()
    unknown = (q * exact.masked_fill(q == 0, 0.0)).sum(1).abs() * (torch.finfo(logprobs.dtype).eps / 2)
    return torch.maximum(1.0 - q.sum(1), unknown + torch.finfo(exact.dtype).eps).log().to(dtype)


def check_ids(teacher: SparseTeacher, counted: Tensor | None) -> None:
    """Raise ValueError for a position whose ids are not distinct, where they must be, or give no class any mass: what neither its
    shape nor its type shows. On a GPU, whose answer would have to be waited for, it is a device-side assertion.
    """
    log_q = teacher.log_q
    repeated = torch.zeros((), dtype=torch.bool, device=log_q.device)
    if teacher.first is None and teacher.ids.shape[1] > 1:
        ids = teacher.ids.sort(1).values
        same = (ids[:, 1:] == ids[:, :-1]).any(1)
        repeated = (same if counted is None else same & counted).any()
    empty = (log_q == -torch.inf).all(1) & (teacher.log_rest == -torch.inf)
    if log_q.shape[0] > 0:
        _refuse(repeated, "teacher_ids: a position has an id twice; give distinct ids, or the convention sampled")
        _refuse(empty.any(), "teacher_logprobs: a position gives no class any mass; weigh it with 0")


def _refuse(wrong: Tensor, message: str) -> None:
    try:
        torch._assert_async(~wrong, message)
    except RuntimeError as error:  # a CPU's answer is there at once
        raise ValueError(message) from error


def _merged(ids: Tensor, log_weights: Tensor) -> SparseTeacher:
    """Draws with repeated ids brought together. The prefix sums are float64: their differences keep a weight of 1e-9."""
    ids, order = ids.sort(1)
    sums = torch.nn.functional.pad(log_weights.gather(1, order).double().exp().cumsum(1), (1, 0))
    left, right = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)
    totals = (sums.gather(1, right) - sums.gather(1, left)).to(log_weights.dtype)
    first = left == torch.arange(ids.shape[1], device=ids.device)
    return SparseTeacher(ids, totals.log(), torch.full_like(totals[:, 0], -torch.inf), first, False, True)

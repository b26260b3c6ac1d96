"""The teacher's top-k against torch over whole logits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import LossOptions, TopK, linear_sparse_kl, topk_logits

from .cases import DIVERGENCES, F64, D, N, Recorder, V, assert_equal_results, make_case, relative


def plain(logits: Tensor, k: int, temperature: float) -> TopK:
    """Over whole logits, in their type."""
    log_q = torch.log_softmax(logits / temperature, 1)
    order = log_q.sort(dim=1, descending=True, stable=True).indices
    rest = log_q.gather(1, order[:, k:])
    return TopK(order[:, :k], log_q.gather(1, order[:, :k]), torch.logsumexp(rest, 1))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch_over_whole_logits(dtype: torch.dtype, bias: bool) -> None:
    case = make_case(bias=bias).to(dtype)
    logits = F.linear(*(t.double() for t in case.student))
    bound = 1e-12 if dtype == F64 else 1e-5
    for k, temperature, rows in itertools.product((1, 5, V - 1), (1.0, 0.5, 3.0), (1, 4, 1000)):
        itemsize = 8 if dtype == F64 else 4
        ids, logprobs, log_rest = topk_logits(
            case.hidden, case.weight, k, bias=case.bias, temperature=temperature, chunk_bytes=rows * 2 * V * itemsize
        )
        wanted = plain(logits, k, temperature)
        assert torch.equal(ids, wanted.ids)
        assert logprobs.dtype == log_rest.dtype == (F64 if dtype == F64 else torch.float32)
        assert relative(logprobs, wanted.logprobs) < bound
        assert relative(log_rest, wanted.log_rest) < bound
        assert not any(t.requires_grad for t in (logprobs, log_rest))


def test_every_class() -> None:
    case = make_case()
    ids, logprobs, log_rest = topk_logits(case.hidden, case.weight, V, bias=case.bias)
    wanted = plain(F.linear(case.hidden, case.weight, case.bias), V, 1.0)
    assert torch.equal(ids, wanted.ids)
    assert relative(logprobs, wanted.logprobs) < 1e-12
    assert (log_rest == -math.inf).all()


def test_ties_come_by_rising_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 9.0]])
    ids, logprobs, log_rest = topk_logits(logits, torch.eye(6), 5)
    assert ids[0].tolist() == [1, 3, 5, 2, 4]
    assert ids[1, 0] == 5
    assert ids[1, 1:].tolist() == sorted(ids[1, 1:].tolist())
    assert relative(logprobs.exp().sum(1) + log_rest.exp(), torch.ones(2)) < 1e-6


def test_the_rest_keeps_its_digits_where_the_k_hold_nearly_all() -> None:
    """1 - sum of the k would be rounding: a mass of 1e-20, and one of e-200, come out to the last digits of float32."""
    torch.manual_seed(0)
    logits = torch.randn(4, 50)
    logits[0, :3] += 50.0
    logits[1, :3] += 200.0
    logits[2] += 1e4
    result = topk_logits(logits, torch.eye(50), 3)
    wanted = plain(logits.double(), 3, 1.0)
    assert wanted.log_rest[1] < -150
    for row in range(4):
        assert abs(result.log_rest[row].item() - wanted.log_rest[row].item()) < 1e-6 * max(1, abs(wanted.log_rest[row].item()))
        assert relative(result.logprobs[row], wanted.logprobs[row]) < 1e-5


def test_banned_classes_and_no_rows() -> None:
    bias = torch.zeros(5, dtype=F64)
    bias[1:4] = -math.inf
    hidden = torch.eye(5, dtype=F64)
    ids, logprobs, log_rest = topk_logits(hidden, torch.eye(5, dtype=F64), 2, bias=bias)
    assert {tuple(sorted(row)) for row in ids.tolist()} == {(0, 4)}
    assert relative(logprobs.exp().sum(1), torch.ones(5)) < 1e-12
    assert (log_rest == -math.inf).all()
    ids, logprobs, log_rest = topk_logits(hidden[:0], torch.eye(5, dtype=F64), 2)
    assert (ids.shape, logprobs.shape, log_rest.shape) == ((0, 2), (0, 2), (0,))


def test_nothing_of_tokens_times_vocabulary_is_made() -> None:
    hidden, weight = torch.randn(256, 4), torch.randn(300, 4)
    with Recorder() as recorder:
        topk_logits(hidden, weight, 7, chunk_bytes=16 * 2 * 300 * 4)
    assert recorder.largest == 16 * 300


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher_temperature", [1.0, 2.0])
def test_fed_into_the_tail(divergence: str, teacher_temperature: float) -> None:
    """With K = V - 1 the tail is the dense loss, so teacher, top-k and loss together can be held against it."""
    case = make_case()
    top = topk_logits(case.teacher_hidden, case.teacher_weight, V - 1, bias=case.teacher_bias, temperature=teacher_temperature)
    options: dict[str, Any] = {"student_temperature": 1.5, "alpha": 0.2}
    result = linear_sparse_kl(
        case.hidden,
        case.weight,
        top.ids,
        top.logprobs,
        bias=case.bias,
        convention="tail",
        teacher_log_rest=top.log_rest,
        labels=case.labels,
        options=LossOptions(divergence, **options),
    )
    wanted = case.reference("hidden", LossOptions(divergence, teacher_temperature, **options), labels=case.labels)
    assert_equal_results(result, case.student, wanted, 1.0, 1e-10)


def test_arguments_without_a_meaning_are_refused() -> None:
    hidden, weight, bias = torch.zeros(N, D), torch.zeros(V, D), torch.zeros(V)
    for k in (0, -1, V + 1):
        with pytest.raises(ValueError, match=rf"^k: must lie in \[1, {V}\]"):
            topk_logits(hidden, weight, k, bias=bias)
    for temperature in (0.0, -1.0, math.inf, math.nan, 1e-40):
        with pytest.raises(ValueError, match=r"^temperature: must be at least"):
            topk_logits(hidden, weight, 2, bias=bias, temperature=temperature)
    with pytest.raises(ValueError, match=r"^chunk_bytes: must be at least 1"):
        topk_logits(hidden, weight, 2, bias=bias, chunk_bytes=0)
    with pytest.raises(ValueError, match=r"^weight: expected shape"):
        topk_logits(hidden, weight[:, :3], 2, bias=bias)
    with pytest.raises(ValueError, match=r"^bias: expected shape"):
        topk_logits(hidden, weight, 2, bias=bias[:3])
    with pytest.raises(ValueError, match=r"^hidden: expected a floating-point"):
        topk_logits(hidden.long(), weight, 2, bias=bias)

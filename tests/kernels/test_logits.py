"""Losses of logits that exist already: where their gradient is written, strides, offsets beyond 2^31."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megapd_kernels import LossOptions, LossResult, distillation_loss, softmax_kl

from .cases import DIVERGENCES, F64, N, V, assert_equal_results, possible, relative, row_bytes

FORMS = ["none", "ids", "logits"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def targets(form: str) -> dict[str, Tensor]:
    """Labels with masked positions, and a teacher."""
    labels = torch.arange(N) % V
    labels[::4] = -100
    teacher = drawn(N, V, seed=1)
    return {
        "labels": labels,
        **{"none": {}, "ids": {"teacher_ids": teacher.argmax(1)}, "logits": {"teacher_logits": teacher}}[form],
    }


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_in_place_the_gradient_takes_the_logits_storage(divergence: str, form: str, dtype: torch.dtype) -> None:
    if not possible(divergence, form):
        return
    options = LossOptions(divergence, 0.5, 2.0, 0.3, z_loss=0.1, label_smoothing=0.1, chunk_bytes=3 * row_bytes(V))
    logits = drawn(N, V).to(dtype)
    leaf, beside = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    result = softmax_kl(leaf, **targets(form), options=options, in_place=True)
    wanted = softmax_kl(beside, **targets(form), options=options)
    assert tuple(result) == tuple(wanted)
    upstream = torch.tensor(-3.0, dtype=result.loss.dtype)
    (gradient,) = torch.autograd.grad(result.loss, leaf, upstream)
    (expected,) = torch.autograd.grad(wanted.loss, beside, upstream)
    assert gradient.data_ptr() == leaf.data_ptr()
    assert torch.equal(gradient, expected)
    assert expected.norm() > 0
    assert torch.equal(beside.detach(), logits)


def test_in_place_through_a_linear_layer() -> None:
    hidden, weight = drawn(N, 4), drawn(V, 4, seed=2).requires_grad_()
    gradients = []
    for in_place in (False, True):
        logits = hidden @ weight.t()
        loss = softmax_kl(logits, drawn(N, V, seed=3), in_place=in_place).loss * 2
        gradients += torch.autograd.grad(loss, weight)
    assert torch.equal(*gradients)


def test_in_place_a_second_backward_is_an_error() -> None:
    leaf = drawn(N, V).requires_grad_()
    loss = softmax_kl(leaf, drawn(N, V, seed=1), in_place=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


def test_out_of_place_a_second_backward_is_the_same() -> None:
    leaf = drawn(N, V).requires_grad_()
    loss = softmax_kl(leaf, drawn(N, V, seed=1)).loss
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layout", ["columns", "transposed", "rows"])
def test_non_contiguous_logits(form: str, in_place: bool, layout: str) -> None:
    base = {"columns": drawn(N, 2 * V)[:, ::2], "transposed": drawn(V, N).t(), "rows": drawn(2 * N, V)[1::2]}[layout]
    logits = base.requires_grad_()
    assert not logits.is_contiguous()
    options = LossOptions("jsd", 0.5, 2.0, 0.3, chunk_bytes=3 * row_bytes(V))
    dense = logits.detach().contiguous().requires_grad_()
    wanted: LossResult = distillation_loss(dense, **targets(form), options=options)
    result = softmax_kl(logits, **targets(form), options=options, in_place=in_place)
    assert_equal_results(result, (logits,), wanted, -2.0, 1e-11, (dense,))


def test_an_expanded_row_may_serve_all_positions() -> None:
    row, teacher = drawn(1, V).requires_grad_(), drawn(1, V, seed=1)
    result = softmax_kl(row.expand(N, V), teacher.expand(N, V), options=LossOptions("jsd"))
    (gradient,) = torch.autograd.grad(result.loss, row)
    alone = softmax_kl(row, teacher, options=LossOptions("jsd"))
    (expected,) = torch.autograd.grad(alone.loss, row)
    assert relative(result.loss, alone.loss) < 1e-12
    assert relative(gradient, expected) < 1e-12
    with pytest.raises(ValueError, match=r"^in_place: student_logits is an expanded view"):
        softmax_kl(row.expand(N, V), teacher.expand(N, V), in_place=True)


@pytest.mark.parametrize("in_place", [False, True])
def test_offsets_beyond_32_bits(in_place: bool) -> None:
    """Rows 2^31 + 5 elements apart, in 4 GiB of address space of which only the pages of the rows are ever touched."""
    stride, classes = 2**31 + 5, 1000
    logits, teacher = (
        torch.empty(stride + classes, dtype=torch.float16)
        .as_strided((2, classes), (stride, 1))
        .copy_(drawn(2, classes, seed=seed))
        for seed in (0, 1)
    )
    assert logits[1].storage_offset() > 2**31
    near = logits.contiguous().double().requires_grad_()
    wanted = distillation_loss(near, teacher_logits=teacher.contiguous().double())
    (expected,) = torch.autograd.grad(wanted.loss, near)
    leaf = logits.requires_grad_()
    result = softmax_kl(leaf, teacher, in_place=in_place)
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    assert relative(result.loss, wanted.loss) < 1e-6
    assert relative(gradient, expected) < 2e-3  # a 16-bit gradient's own rounding
    assert (gradient.data_ptr() == leaf.data_ptr()) == in_place


def test_infinite_logits_in_place() -> None:
    logits, teacher = drawn(3, 5), drawn(3, 5, seed=1)
    logits[:, 2] = teacher[:, 2] = -math.inf
    for divergence in DIVERGENCES:
        leaf, dense = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        result = softmax_kl(leaf, teacher, options=LossOptions(divergence), in_place=True)
        wanted = distillation_loss(dense, teacher_logits=teacher, options=LossOptions(divergence))
        assert_equal_results(result, (leaf,), wanted, 1.0, 1e-11, (dense,))

"""What only a GPU can show: memory, offsets beyond 2^31, 16-bit products, no host synchronisation. Skipped without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import LossOptions, distillation_loss, linear_softmax_kl, softmax_kl, topk_logits

from .cases import DIVERGENCES, FORMS, make_case, possible, relative
from .test_triton import moved

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_sync() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def randn(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def problem(n: int, v: int, d: int, e: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    hidden, weight = randn(n, d, seed=0, dtype=dtype), randn(v, d, seed=1, scale=d**-0.5, dtype=dtype)
    return [
        hidden.requires_grad_(),
        weight.requires_grad_(),
        randn(n, e, seed=2, dtype=dtype),
        randn(v, e, seed=3, scale=2 * e**-0.5, dtype=dtype),
    ]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_memory_of_the_linear_loss(divergence: str, recompute: bool) -> None:
    """At 8192 x 128256, Ds 1024, Dt 2048: chunk logits and one float32 dW, and what comes back."""
    n, v, d, e = 8192, 128256, 1024, 2048
    hidden, weight, teacher_hidden, teacher_weight = problem(n, v, d, e)
    options = LossOptions(divergence, recompute=recompute, chunk_bytes=1 << 30)
    torch.mm(teacher_hidden[:16], teacher_weight[:16].t())  # cuBLAS takes its workspace, 32 MiB on sm_90, with the first product
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_softmax_kl(hidden, weight, teacher_hidden, teacher_weight, options=options).loss
    between = torch.cuda.memory_allocated() - before
    loss.backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    dw, dx = 4 * v * d, 4 * n * d
    returned = 2 * (v * d + n * d)
    assert extra <= (1 << 30) + dw + dx + returned + (64 << 20)
    assert between <= (16 << 20 if recompute else dw + dx + (16 << 20))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_errors_are_at_most_twice_those_of_torch(divergence: str, dtype: torch.dtype) -> None:
    hidden, weight, teacher_hidden, teacher_weight = problem(512, 8192, 256, 384, dtype)
    options = LossOptions(divergence)
    wide = [t.detach().double() for t in (hidden, weight, teacher_hidden, teacher_weight)]
    leaves = (wide[0].requires_grad_(), wide[1].requires_grad_())
    exact = distillation_loss(leaves[0] @ leaves[1].t(), teacher_logits=wide[2] @ wide[3].t(), options=options).loss
    wanted = torch.autograd.grad(exact, leaves)
    ours = linear_softmax_kl(hidden, weight, teacher_hidden, teacher_weight, options=options).loss
    plain = distillation_loss(F.linear(hidden, weight), teacher_logits=F.linear(teacher_hidden, teacher_weight), options=options)
    assert relative(ours, exact) <= 2 * relative(plain.loss, exact) + 1e-5
    for value, other, want in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(plain.loss, (hidden, weight)), wanted, strict=True
    ):
        assert relative(value, want) <= 2 * relative(other, want) + torch.finfo(dtype).eps


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_offsets_beyond_two_to_the_31(divergence: str) -> None:
    n, v = 17000, 131072  # 2.2e9 logits, 4.5 GB each in bf16
    assert n * v > 2**31
    student, teacher = randn(n, v, seed=0), randn(n, v, seed=1)
    student.requires_grad_()
    weights = torch.zeros(n, device="cuda")
    weights[-3:] = 1.0  # rows that a 32-bit offset would read from elsewhere
    options = LossOptions(divergence)
    result = softmax_kl(student, teacher, token_weights=weights, options=options)
    (gradient,) = torch.autograd.grad(result.loss, student)
    leaf = student.detach()[-3:].double().requires_grad_()
    wanted = distillation_loss(leaf, teacher_logits=teacher[-3:].double(), options=options)
    (expected,) = torch.autograd.grad(wanted.loss, leaf)
    assert relative(result.loss, wanted.loss) < 1e-5
    assert relative(gradient[-3:], expected) < 1e-2
    assert not gradient[:-3:1000].any()


@pytest.mark.parametrize("form", FORMS)
def test_no_host_synchronisation(form: str, no_sync: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    case = moved(make_case(64, 3000, 32, 16))
    for divergence in DIVERGENCES:
        if not possible(divergence, form):
            continue
        options = LossOptions(divergence, 0.7, 2.0, 0.3, z_loss=1e-4, chunk_bytes=1 << 18)
        teacher = case.teacher(form)
        targets: dict[str, Any] = {"labels": case.labels, "token_weights": case.token_weights}
        case.loss(form, options, **targets).loss.backward()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        case.loss(form, options, **targets).loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        assert teacher is not None


def test_topk_against_torch() -> None:
    _, _, hidden, weight = problem(300, 50257, 8, 64)
    top = topk_logits(hidden, weight, 32, chunk_bytes=1 << 24)
    logprobs = torch.log_softmax(hidden.double() @ weight.double().t(), 1)
    assert relative(top.logprobs, logprobs.gather(1, top.ids)) < 1e-5
    assert relative(top.logprobs, logprobs.topk(32, 1).values) < 1e-5
    rest = logprobs.scatter(1, top.ids, -torch.inf).logsumexp(1)
    assert relative(top.log_rest, rest) < 1e-5


def test_compiled_whole_graph() -> None:
    tensors = problem(256, 5000, 64, 96)

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        return linear_softmax_kl(hidden * 2, weight, teacher_hidden, teacher_weight).loss * 3

    expected = torch.autograd.grad(loss(*tensors), tensors[:2])
    value = torch.compile(loss, fullgraph=True)(*tensors)
    for got, want in zip(torch.autograd.grad(value, tensors[:2]), expected, strict=True):
        assert relative(got, want) < 1e-2

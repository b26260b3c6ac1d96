"""Students, teachers and comparisons that the kernels' tests share."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megapd_kernels import LossOptions, LossResult, TokenOutputs, distillation_loss, linear_distillation_loss, ops


def _broken_interpreter() -> bool:
    """Whether kernels cannot run here: there is no GPU, and Triton's interpreter before 3.7 fails with numpy 2.4 or later."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    release = tuple(int(part) for name in ("triton", "numpy") for part in version(name).split(".")[:2])
    return release[:2] < (3, 7) and release[2:] >= (2, 4)


BROKEN_INTERPRETER = _broken_interpreter()
interpreter = pytest.mark.skipif(BROKEN_INTERPRETER, reason="Triton's interpreter before 3.7 fails with numpy 2.4 or later")
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy"]
FORMS = ["none", "ids", "logits", "hidden"]
SPARSE = ["tail", "renormalised", "support", "sampled"]
F64 = torch.float64
N, V, D, E = 13, 37, 8, 5


def possible(divergence: str, form: str, teacher_temperature: float = 1.0) -> bool:
    if form in ("support", "sampled") and divergence not in ("forward_kl", "soft_cross_entropy"):
        return False
    if (
        form in SPARSE
        and teacher_temperature != 1.0
        and form != "renormalised"
        and (teacher_temperature > 0 or form == "sampled")
    ):
        return False
    if form == "renormalised" and divergence == "reverse_kl":
        return False
    return divergence != "reverse_kl" or (form != "ids" and teacher_temperature > 0)


@dataclasses.dataclass
class Case:
    """A student, a teacher in every form, targets; float64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    labels: Tensor
    token_weights: Tensor

    @property
    def student(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.hidden, self.weight, self.bias) if t is not None)

    def to(self, dtype: torch.dtype) -> Case:
        """Rounded to a type; still leaves."""

        def convert(value: Tensor | None) -> Tensor | None:
            if value is None or not value.is_floating_point():
                return value
            return value.detach().to(dtype).requires_grad_(value.requires_grad)

        return Case(**{f.name: convert(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def teacher_logits(self) -> Tensor:
        return F.linear(self.teacher_hidden, self.teacher_weight, self.teacher_bias)

    def sparse(self, convention: str, k: int = 5) -> dict[str, Any]:
        """The teacher's top k, or k draws of it; as exact as the sums are, whatever the type of the hidden states."""
        log_q = torch.log_softmax(self.to(F64).teacher_logits(), 1)
        if convention == "sampled":
            ids = torch.multinomial(log_q.exp(), k, replacement=True, generator=torch.Generator().manual_seed(0))
            logprobs = torch.full_like(ids, 1 / k, dtype=F64).log()
        else:
            logprobs, ids = log_q.topk(k, 1)
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        return {"teacher_ids": ids, "teacher_logprobs": logprobs.to(dtype), "convention": convention}

    def teacher(self, form: str) -> dict[str, Any]:
        if form in SPARSE:
            return self.sparse(form)
        if form == "none":
            return {}
        if form == "ids":
            return {"teacher_ids": self.teacher_logits().argmax(1)}
        if form == "logits":
            return {"teacher_logits": self.teacher_logits()}
        parts = ("teacher_hidden", "teacher_weight", "teacher_bias")
        return {name: getattr(self, name) for name in parts}

    def loss(self, form: str, options: LossOptions, **targets: Any) -> LossResult:
        return self.linear(**targets, **self.teacher(form), options=options)

    def linear(self, **arguments: Any) -> LossResult:
        """Of a teacher among the arguments, or of none."""
        return linear_distillation_loss(self.hidden, self.weight, bias=self.bias, **arguments)

    def reference(self, form: str, options: LossOptions, **targets: Any) -> LossResult:
        """In float64, from the same rounded inputs."""
        student = F.linear(self.hidden.double(), self.weight.double(), None if self.bias is None else self.bias.double())
        teacher = self.to(F64).teacher("logits" if form == "hidden" else form)
        return distillation_loss(student, **targets, **teacher, options=options)


def make_case(n: int = N, v: int = V, d: int = D, e: int = E, *, seed: int = 0, bias: bool = True, ignored: int = 4) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    labels = torch.randint(v, (n,), generator=generator)
    labels[:ignored] = -100
    return Case(
        hidden=randn(n, d).requires_grad_(),
        weight=(randn(v, d) / 2).requires_grad_(),
        bias=randn(v).requires_grad_() if bias else None,
        teacher_hidden=randn(n, e),
        teacher_weight=randn(v, e) / 2,
        teacher_bias=randn(v) if bias else None,
        labels=labels,
        token_weights=torch.rand(n, generator=generator, dtype=F64) + 0.1,
    )


def below(call: Callable[[], Any]) -> tuple[Any, ...]:
    """What `call` hands to an operation, (hidden, weight, bias, problem) or (logits, problem, in_place), without running it.

    A dispatch mode does not see inside an operation: tests that must look there call the function below it.
    """
    scalars = (torch.zeros(()),) * 4
    with (
        mock.patch.object(ops, "linear", return_value=scalars) as linear,
        mock.patch.object(ops, "logits", return_value=scalars) as logits,
    ):
        call()
    ((arguments, _),) = linear.call_args_list + logits.call_args_list
    return tuple(arguments)


def row_bytes(v: int, dtype: torch.dtype = F64) -> int:
    """chunk_bytes of one row of the widest case, five buffers: smaller ones give the same single row."""
    return 5 * v * dtype.itemsize


def relative(value: Tensor, wanted: Tensor) -> float:
    """||value - wanted|| / ||wanted||: unlike an absolute tolerance, a zero gradient does not pass."""
    assert value.shape == wanted.shape
    return ((value.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300)).item()


def assert_equal_losses(case: Case, form: str, options: LossOptions, upstream: float, bound: float, **targets: Any) -> None:
    assert_equal_results(
        case.loss(form, options, **targets), case.student, case.reference(form, options, **targets), upstream, bound
    )


def assert_equal_results(
    result: LossResult,
    leaves: tuple[Tensor, ...],
    wanted: LossResult,
    upstream: float,
    bound: float,
    wanted_leaves: tuple[Tensor, ...] | None = None,
) -> None:
    """The four numbers and the gradients, by relative norm."""
    gradients = torch.autograd.grad(result.loss, leaves, torch.tensor(upstream, dtype=result.loss.dtype))
    expected = torch.autograd.grad(wanted.loss, wanted_leaves or leaves, torch.tensor(upstream, dtype=wanted.loss.dtype))
    for name in ("loss", "divergence", "cross_entropy", "correct"):
        assert relative(getattr(result, name), getattr(wanted, name)) < bound, name
    assert_equal_tokens(result.tokens, wanted.tokens, bound)
    for name, value, want in zip(("dX", "dW", "db"), gradients, expected, strict=False):
        assert want.norm() > 0, name
        assert relative(value, want) < bound, name


def assert_equal_tokens(tokens: TokenOutputs | None, wanted: TokenOutputs | None, bound: float) -> None:
    assert (tokens is None) == (wanted is None)
    if tokens is None or wanted is None:
        return
    for name, value, want in zip(TokenOutputs._fields, tokens, wanted, strict=True):
        assert value.dtype == want.dtype or value.is_floating_point(), name
        if want.is_floating_point():
            assert value.isfinite().all(), name
            assert (value.double() - want.double()).norm() <= bound * want.double().norm().clamp(min=1.0), name
        else:
            assert torch.equal(value, want), name


class Recorder(TorchDispatchMode):
    """Shapes of all tensors that operations give back."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.made.add(tuple(tensor.shape))
                self.largest = max(self.largest, tensor.numel())
        return out

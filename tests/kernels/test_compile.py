"""torch.compile takes a loss as one node, and the operations keep the rules of torch's dispatcher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import LossOptions, linear_cross_entropy, linear_softmax_kl, linear_sparse_kl, ops, softmax_kl

from .cases import D, E, N, V, below, make_case, relative

pytestmark = pytest.mark.slow

OPTIONS = LossOptions(alpha=0.3, student_temperature=2.0, label_smoothing=0.1, z_loss=0.01, chunk_bytes=1 << 12)


def inputs(n: int = N) -> dict[str, Tensor]:
    """Float32, as in training; hidden, weight and bias are leaves."""
    case = make_case(n).to(torch.float32)
    assert case.bias is not None
    assert case.teacher_bias is not None
    top = case.sparse("tail")
    draws = case.sparse("sampled")
    return {
        "hidden": case.hidden,
        "weight": case.weight,
        "bias": case.bias,
        "teacher_hidden": case.teacher_hidden,
        "teacher_weight": case.teacher_weight,
        "teacher_bias": case.teacher_bias,
        "labels": case.labels,
        "weights": case.token_weights,
        "ids": top["teacher_ids"],
        "logprobs": top["teacher_logprobs"],
        "draws": draws["teacher_ids"],
        "draws_logprobs": draws["teacher_logprobs"],
    }


def biases(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[name] for name in ("bias", "teacher_bias")}


def hidden_teacher(x: dict[str, Tensor]) -> Tensor:
    hidden = torch.tanh(x["hidden"])
    result = linear_softmax_kl(
        hidden,
        x["weight"],
        x["teacher_hidden"],
        x["teacher_weight"],
        **biases(x),
        labels=x["labels"],
        token_weights=x["weights"],
        options=OPTIONS,
    )
    return result.loss * 3 + result.cross_entropy


def labels_alone(x: dict[str, Tensor]) -> Tensor:
    options = LossOptions(label_smoothing=0.1, z_loss=0.01)
    return linear_cross_entropy(torch.tanh(x["hidden"]), x["weight"], x["labels"], bias=x["bias"], options=options).loss * 3


def few_classes(x: dict[str, Tensor]) -> Tensor:
    return linear_sparse_kl(
        torch.tanh(x["hidden"]),
        x["weight"],
        x["ids"],
        x["logprobs"],
        bias=x["bias"],
        convention="tail",
        labels=x["labels"],
        options=OPTIONS,
    ).loss


def draws(x: dict[str, Tensor]) -> Tensor:
    hidden = torch.tanh(x["hidden"])
    return linear_sparse_kl(hidden, x["weight"], x["draws"], x["draws_logprobs"], bias=x["bias"], convention="sampled").loss


def recomputed(x: dict[str, Tensor]) -> Tensor:
    hidden, teacher = torch.tanh(x["hidden"]), (x["teacher_hidden"], x["teacher_weight"])
    return linear_softmax_kl(hidden, x["weight"], *teacher, **biases(x), options=LossOptions(recompute=True)).loss * 3


def of_logits(x: dict[str, Tensor]) -> Tensor:
    logits = F.linear(torch.tanh(x["hidden"]), x["weight"], x["bias"])
    teacher = F.linear(x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"])
    return softmax_kl(logits, teacher, labels=x["labels"], options=OPTIONS).loss * 3


def of_logits_in_place(x: dict[str, Tensor]) -> Tensor:
    logits = F.linear(torch.tanh(x["hidden"]), x["weight"], x["bias"])
    teacher = F.linear(x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"])
    return softmax_kl(logits, teacher, options=LossOptions("jsd"), in_place=True).loss * 3


LOSSES = [hidden_teacher, labels_alone, few_classes, draws, recomputed, of_logits, of_logits_in_place]


def assert_same(compiled: Callable[..., Tensor], eager: Callable[..., Tensor], x: dict[str, Tensor]) -> None:
    leaves = (x["hidden"], x["weight"], x["bias"])
    value, wanted = compiled(x), eager(x)
    assert relative(value, wanted) < 1e-6
    for gradient, expected in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert expected.norm() > 0
        assert relative(gradient, expected) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_one_graph(loss: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """fullgraph raises where a part cannot be traced. Another number of positions must not need a graph of constants."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (N, N + 4, N + 9):
        assert_same(compiled, loss, inputs(n))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (1, 2)


def test_inductor() -> None:
    torch._dynamo.reset()

    def together(x: dict[str, Tensor]) -> Tensor:
        return hidden_teacher(x) + few_classes(x) + of_logits(x)

    assert_same(torch.compile(together, fullgraph=True, backend="inductor"), together, inputs())


# --------------------------------------------------------------------------------------------- the dispatcher's rules


def linear_arguments(call: Callable[[], Any], needs: list[bool]) -> tuple[Any, ...]:
    hidden, weight, bias, problem = below(call)
    return (hidden, weight, bias, *needs, *ops.pack(problem))


def problems(recompute: bool) -> list[Callable[[], Any]]:
    x = inputs()
    heads = (x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"])
    options = LossOptions("jsd", alpha=0.3, student_temperature=2.0, recompute=recompute)
    sampled = {"convention": "sampled", "options": LossOptions(recompute=recompute)}
    return [
        lambda: linear_softmax_kl(*heads, **biases(x), labels=x["labels"], token_weights=x["weights"], options=options),
        lambda: linear_cross_entropy(x["hidden"], x["weight"], x["labels"], options=options),
        lambda: linear_sparse_kl(*heads[:2], x["draws"], x["draws_logprobs"], bias=x["bias"], **sampled),
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck_of_linear_loss(recompute: bool) -> None:
    for call in problems(recompute):
        has_bias = below(call)[2] is not None
        needs = [not recompute, not recompute, has_bias and not recompute]
        torch.library.opcheck(torch.ops.megapd_kernels.linear_loss.default, linear_arguments(call, needs))


def test_opcheck_of_logits_loss_and_gradient() -> None:
    x = inputs()
    student = F.linear(x["hidden"], x["weight"], x["bias"]).detach().requires_grad_()
    teacher = F.linear(x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"])
    logits, problem, in_place = below(lambda: softmax_kl(student, teacher, labels=x["labels"], options=OPTIONS))
    packed = ops.pack(problem)
    torch.library.opcheck(torch.ops.megapd_kernels.logits_loss.default, (logits, in_place, *packed))
    statistics = torch.ops.megapd_kernels.logits_loss(logits.detach(), in_place, *packed)[-1]
    arguments = (logits.detach(), torch.tensor(2.0), statistics, *packed)
    torch.library.opcheck(torch.ops.megapd_kernels.logits_gradient.default, arguments)
    torch.library.opcheck(torch.ops.megapd_kernels.logits_gradient_.default, (logits.detach().clone(), *arguments[1:]))


def test_a_problem_survives_the_operations_arguments() -> None:
    """Every field, by comparing what comes out with what went in."""
    x = inputs()
    settings = {
        "teacher_temperature": 0.5,
        "beta": 0.2,
        "label_smoothing": 0.1,
        "z_loss": 0.3,
        "scale_t2": True,
        "recompute": True,
    }
    options = LossOptions("jsd", student_temperature=2.0, alpha=0.4, chunk_bytes=77, **settings)
    for call in (
        lambda: linear_softmax_kl(
            x["hidden"], torch.zeros(V, D), torch.zeros(N, E), torch.zeros(V, E), labels=x["labels"], options=options
        ),
        lambda: linear_sparse_kl(x["hidden"], x["weight"], x["draws"], x["draws_logprobs"], convention="sampled"),
        lambda: linear_sparse_kl(x["hidden"], x["weight"], x["ids"], x["logprobs"], convention="tail", denominator=3.0),
    ):
        *_, problem = below(call)
        again = ops._unpack(ops.pack(problem))
        assert again.options.mixture == problem.options.mixture
        assert dataclasses.replace(again.options, divergence="jsd") == dataclasses.replace(
            problem.options, divergence="jsd", beta=0.5
        )
        assert again.dtype == problem.dtype
        assert (again.form, again.shard) == (problem.form, problem.shard)
        for value, wanted in (
            *zip(again.targets, problem.targets, strict=True),
            *((getattr(again, name), getattr(problem, name)) for name in ("teacher_logits", "teacher_hidden", "teacher_weight")),
        ):
            assert value is wanted or tuple(value) == tuple(wanted)

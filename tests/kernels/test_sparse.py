"""Teachers given by a few class ids: each convention against the reference, the dense loss it must become, and its limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import LossOptions, distillation_loss, linear_distillation_loss, linear_sparse_kl, softmax_kl

from .cases import (
    DIVERGENCES,
    F64,
    SPARSE,
    N,
    V,
    assert_equal_losses,
    assert_equal_results,
    make_case,
    possible,
    relative,
    row_bytes,
)

GRID = [
    (convention, divergence, temperature)
    for convention, divergence, temperature in itertools.product(SPARSE, DIVERGENCES, (0.0, 0.5, 1.0))
    if possible(divergence, convention, temperature) and not (divergence == "reverse_kl" and temperature == 0)
]
PAIRS = [(convention, divergence) for convention, divergence, temperature in GRID if temperature == 1.0]


def pair(n: int = N, v: int = V) -> tuple[Tensor, Tensor]:
    """Logits [n, v] of a student, a leaf, and log probabilities of a teacher."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (2 * torch.randn(n, v, generator=generator, dtype=F64) for _ in range(2))
    return student.requires_grad_(), torch.log_softmax(teacher, 1)


def of_logits(student: Tensor, **arguments: Any) -> Any:
    """The chunked loss of logits: those of hidden states that are the logits, under the identity."""
    return linear_distillation_loss(student, torch.eye(student.shape[1], dtype=student.dtype), **arguments)


@pytest.mark.parametrize(("convention", "divergence", "teacher_temperature"), GRID)
def test_equals_the_reference(convention: str, divergence: str, teacher_temperature: float) -> None:
    case = make_case()
    for student_temperature, alpha, masked in itertools.product((1.0, 0.6, 2.0), (0.0, 0.3, 1.0), (False, True)):
        options = LossOptions(
            divergence, teacher_temperature, student_temperature, alpha, beta=0.3, scale_t2=True, chunk_bytes=4 * row_bytes(V)
        )
        targets: dict[str, Any] = {"labels": case.labels if masked else case.labels.clamp(min=0)}
        if masked:
            targets["token_weights"] = case.token_weights
        assert_equal_losses(case, convention, options, -3.0, 1e-11, **targets)


@pytest.mark.parametrize(("convention", "divergence"), PAIRS)
def test_float32_equals_the_reference(convention: str, divergence: str) -> None:
    case = make_case(32, 501, ignored=0).to(torch.float32)
    for temperature in (1.0, 2.0):
        options = LossOptions(divergence, student_temperature=temperature, alpha=0.2, z_loss=0.01, chunk_bytes=1 << 14)
        teacher = case.sparse(convention, 8)
        wide = {name: t.double() if name == "teacher_logprobs" else t for name, t in teacher.items()}
        result = case.linear(labels=case.labels, **teacher, options=options)
        logits = F.linear(*(t.double() for t in case.student))
        wanted = distillation_loss(logits, labels=case.labels, **wide, options=options)
        assert_equal_results(result, case.student, wanted, 2.0, 1e-5)


@pytest.mark.parametrize(("convention", "divergence"), PAIRS)
def test_gradcheck(convention: str, divergence: str) -> None:
    case = make_case(4, 6, 3, 2, ignored=1)
    teacher = case.sparse(convention, 3)
    options = LossOptions(divergence, 1.0, 2.0, 0.3, beta=0.3, scale_t2=True, chunk_bytes=2 * row_bytes(6))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_distillation_loss(hidden, weight, bias=bias, labels=case.labels, **teacher, options=options).loss

    assert torch.autograd.gradcheck(loss, case.student, fast_mode=False)


# ------------------------------------------------------------------------------------------ the dense loss in disguise


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tail_with_one_class_outside_is_the_dense_loss(divergence: str) -> None:
    student, log_q = pair()
    logprobs, ids = log_q.topk(V - 1, 1)
    shuffled = torch.randperm(V - 1, generator=torch.Generator().manual_seed(0))
    for arguments in (
        {"teacher_ids": ids, "teacher_logprobs": logprobs},
        {"teacher_ids": ids[:, shuffled], "teacher_logprobs": logprobs[:, shuffled], "teacher_log_rest": log_q.amin(1)},
    ):
        result = of_logits(student, **arguments, convention="tail", options=LossOptions(divergence))
        wanted = softmax_kl(student, log_q, options=LossOptions(divergence))
        assert_equal_results(result, (student,), wanted, -2.0, 1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_class_an_id_leaves_no_rest(divergence: str, dtype: torch.dtype) -> None:
    """1 - sum q is then the sum's rounding, and must not be taken for the mass of a class."""
    student, log_q = pair()
    leaf = student.detach().to(dtype).requires_grad_()
    logprobs, ids = log_q.to(dtype).sort(1)
    wanted = softmax_kl(student, log_q, options=LossOptions(divergence))
    for convention in SPARSE:
        if not possible(divergence, convention):
            continue
        result = of_logits(
            leaf, teacher_ids=ids, teacher_logprobs=logprobs, convention=convention, options=LossOptions(divergence)
        )
        reference = distillation_loss(
            leaf, teacher_ids=ids, teacher_logprobs=logprobs, convention=convention, options=LossOptions(divergence)
        )
        bound = 1e-10 if dtype == F64 else 1e-5
        (gradient,), (expected,) = (
            torch.autograd.grad(result.loss, leaf),
            torch.autograd.grad(wanted.loss, student, retain_graph=True),
        )
        assert relative(gradient, expected) < bound
        assert relative(result.loss, reference.loss) < bound
        if convention != "sampled" or divergence == "soft_cross_entropy":
            assert relative(result.loss, wanted.loss) < bound


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_renormalised_is_the_dense_loss_of_the_scattered_teacher(divergence: str, temperature: float) -> None:
    student, log_q = pair()
    logprobs, ids = log_q.topk(6, 1)
    scattered = torch.full_like(log_q, -torch.inf).scatter(1, ids, logprobs - 3.0)  # whatever it sums to
    options = LossOptions(divergence, teacher_temperature=temperature, student_temperature=1.5, beta=0.2)
    wanted = softmax_kl(student, scattered, options=options)
    result = of_logits(student, teacher_ids=ids, teacher_logprobs=logprobs, convention="renormalised", options=options)
    assert_equal_results(result, (student,), wanted, 2.0, 1e-11)


def test_support_by_hand() -> None:
    """sum_k q_k (log q_k - log p_k) with q as it is, and the gradient m p - q: m is the teacher's mass on the ids."""
    p, q = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=F64), torch.tensor([[0.5, 0.25]], dtype=F64)
    student = p.log().requires_grad_()
    ids = torch.tensor([[1, 3]])
    arguments: dict[str, Any] = {"teacher_ids": ids, "teacher_logprobs": q.log(), "convention": "support"}
    kl = of_logits(student, **arguments)
    assert kl.loss.item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(2), rel=1e-12)
    soft = of_logits(student, **arguments, options=LossOptions("soft_cross_entropy"))
    assert soft.loss.item() == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(8), rel=1e-12)
    wanted = 0.75 * p - torch.tensor([[0.0, 0.5, 0.0, 0.25]], dtype=F64)
    for result in (kl, soft):
        (gradient,) = torch.autograd.grad(result.loss, student)
        assert relative(gradient, wanted) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tail_by_hand(divergence: str) -> None:
    """Buckets (1/4, 1/2, 1/4) of the student against (1/2, 1/4, 1/4)."""
    student = torch.tensor([[0.25, 0.125, 0.5, 0.125]], dtype=F64).log()
    arguments: dict[str, Any] = {
        "teacher_ids": torch.tensor([[0, 2]]),
        "teacher_logprobs": torch.tensor([[0.5, 0.25]], dtype=F64).log(),
        "convention": "tail",
    }
    wanted = {
        "forward_kl": 0.25 * math.log(2),
        "reverse_kl": 0.25 * math.log(2),
        "jsd": 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3),
        "tvd": 0.25,
        "soft_cross_entropy": 1.25 * math.log(2) + 0.5 * math.log(2),
    }[divergence]
    assert of_logits(student, **arguments, options=LossOptions(divergence)).loss.item() == pytest.approx(wanted, rel=1e-12)


def test_temperature_zero_is_the_argmax() -> None:
    student, log_q = pair()
    logprobs, ids = log_q.topk(5, 1)
    logprobs, ids = logprobs.flip(1), ids.flip(1)
    for convention, divergence in PAIRS:
        if convention == "sampled" or divergence == "reverse_kl":
            continue
        options = LossOptions(divergence, teacher_temperature=0.0)
        result = of_logits(student, teacher_ids=ids, teacher_logprobs=logprobs, convention=convention, options=options)
        wanted = softmax_kl(student, teacher_ids=log_q.argmax(1), options=options)
        assert_equal_results(result, (student,), wanted, 1.0, 1e-12)


# -------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_repeated_ids_add_up(dtype: torch.dtype) -> None:
    student, log_q = pair(4)
    leaf = student.detach().to(dtype).requires_grad_()
    ids = torch.tensor([[3, 3, 3, 3], [1, 0, 1, 0], [5, 6, 5, 36], [0, 1, 2, 3]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 1e-9, 0.2], [0.25, 0.25, 0.5, 1.0], [0.1, 0.2, 0.3, 0.4]], dtype=F64)
    dense = torch.zeros_like(log_q).scatter_add(1, ids, weights)
    for temperature, alpha in itertools.product((1.0, 2.0), (0.0, 0.3)):
        options = LossOptions("forward_kl", student_temperature=temperature, alpha=alpha)
        labels = torch.tensor([3, 2, 5, 36])
        result = of_logits(
            leaf, teacher_ids=ids, teacher_logprobs=weights.log().to(dtype), convention="sampled", labels=labels, options=options
        )
        soft = -(dense * torch.log_softmax(student / temperature, 1)).sum() / 4
        wanted = alpha * F.cross_entropy(student, labels) + (1 - alpha) * soft
        (gradient,), (expected,) = torch.autograd.grad(result.loss, leaf), torch.autograd.grad(wanted, student)
        bound = 1e-12 if dtype == F64 else 1e-5
        assert relative(result.loss, wanted) < bound
        assert relative(gradient, expected) < bound
        # Forward KL has no entropy of the teacher to subtract here: it is the cross entropy.
        assert relative(result.divergence, 4 * soft.detach()) < bound


def test_draws_are_unbiased() -> None:
    """The mean over draws, from the teacher or, by importance, from another distribution, tends to the dense loss as 1 / sqrt."""
    student, log_q = pair(1, 11)
    dense = softmax_kl(student, log_q, options=LossOptions("soft_cross_entropy"))
    (exact,) = torch.autograd.grad(dense.loss, student)
    draws, k = 20000, 4
    rows = student.detach().expand(draws, -1).requires_grad_()
    for proposal in (log_q.exp(), torch.full_like(log_q, 1 / 11)):
        ids = torch.multinomial(proposal.expand(draws, -1), k, replacement=True, generator=torch.Generator().manual_seed(0))
        log_weights = (log_q - proposal.log() - math.log(k)).expand(draws, -1).gather(1, ids)
        result = of_logits(
            rows, teacher_ids=ids, teacher_logprobs=log_weights, convention="sampled", options=LossOptions("soft_cross_entropy")
        )
        (gradient,) = torch.autograd.grad(result.loss, rows)
        mean = gradient.sum(0, keepdim=True)
        # The standard error of the mean of each entry: 5 of them leave a chance of 6e-7.
        error = (gradient * draws).std(0) / math.sqrt(draws)
        assert (error > 0).all()
        assert ((mean - exact).abs() <= 5 * error).all()
        assert relative(mean, exact) < 0.05
        assert relative(result.loss, dense.loss) < 0.02


# ------------------------------------------------------------------------------------------------------- hard numbers


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_saturated_on_the_ids_keeps_the_tails_digits(divergence: str) -> None:
    """The student's mass outside, 1e-9, is lost in float32 to 1 - sum p; summed over the classes outside it keeps its digits."""
    torch.manual_seed(0)
    logits = torch.randn(8, 100)
    logits[:, :4] += 25.0
    ids = torch.arange(4).expand(8, 4)
    log_q = torch.log_softmax(torch.randn(8, 5, dtype=F64) - torch.tensor([0.0, 0, 0, 0, 19.0]), 1)
    arguments = {"teacher_ids": ids, "convention": "tail", "options": LossOptions(divergence)}
    narrow, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    result = of_logits(narrow, teacher_logprobs=log_q[:, :4].float(), teacher_log_rest=log_q[:, 4].float(), **arguments)
    wanted = distillation_loss(
        wide, teacher_logprobs=log_q[:, :4].float().double(), teacher_log_rest=log_q[:, 4].float().double(), **arguments
    )
    assert 1e-10 < torch.softmax(wide, 1)[:, 4:].sum(1).mean() < 1e-8
    (gradient,), (expected,) = torch.autograd.grad(result.loss, narrow), torch.autograd.grad(wanted.loss, wide)
    assert relative(gradient, expected) < 1e-5
    assert expected[:, 4:].norm() > 0
    assert relative(gradient[:, 4:], expected[:, 4:]) < (1e-5 if divergence != "tvd" else 1e-4)
    assert relative(result.loss, wanted.loss) < 1e-5


@pytest.mark.parametrize(("convention", "divergence"), PAIRS)
def test_positions_that_do_not_count_may_hold_anything(convention: str, divergence: str) -> None:
    case = make_case(ignored=0)
    teacher = case.sparse(convention)
    if convention == "tail":
        teacher["teacher_log_rest"] = torch.log1p(-teacher["teacher_logprobs"].exp().sum(1))
    keep = torch.arange(N) % 3 > 0
    options = LossOptions(divergence, alpha=0.5, chunk_bytes=3 * row_bytes(V))
    per_token = {name: t[keep] if isinstance(t, Tensor) else t for name, t in teacher.items()}
    expected = linear_distillation_loss(
        case.hidden[keep], case.weight, bias=case.bias, labels=case.labels[keep], **per_token, options=options
    )
    wanted = torch.autograd.grad(expected.loss, case.student)
    dirty = case.hidden.detach().masked_fill(~keep[:, None], math.nan).requires_grad_()
    for tensor in teacher.values():
        if isinstance(tensor, Tensor):
            tensor[~keep] = math.nan if tensor.is_floating_point() else -1
    for targets in (
        {"labels": case.labels.masked_fill(~keep, -100)},
        {"labels": case.labels.masked_fill(~keep, 10**6), "token_weights": keep.double()},
    ):
        result = linear_distillation_loss(dirty, case.weight, bias=case.bias, **targets, **teacher, options=options)
        gradients = torch.autograd.grad(result.loss, (dirty, case.weight, case.bias))
        for value, reference in zip((*result[:4], *gradients), (*expected[:4], *wanted), strict=True):
            assert relative(value, reference) < 1e-12
        assert torch.equal(gradients[0][~keep], torch.zeros_like(gradients[0][~keep]))


@pytest.mark.parametrize(("convention", "divergence"), PAIRS)
def test_a_nan_that_counts_is_not_hidden(convention: str, divergence: str) -> None:
    case = make_case(ignored=0)
    with torch.no_grad():
        case.hidden[3, 2] = math.nan
    result = case.loss(convention, LossOptions(divergence))
    result.loss.backward()
    assert result.loss.isnan()
    assert case.weight.grad is not None
    assert case.weight.grad.isnan().any()
    case = make_case(ignored=0)
    teacher = case.sparse(convention)
    teacher["teacher_logprobs"][3, 2] = math.nan
    result = case.linear(**teacher, options=LossOptions(divergence))
    assert result.loss.isnan()
    assert torch.autograd.grad(result.loss, case.hidden)[0][3].isnan().any()


@pytest.mark.parametrize(("convention", "divergence"), PAIRS)
def test_classes_banned_outside_and_ids_without_mass(convention: str, divergence: str) -> None:
    """-inf logits outside the ids, on all of them too, and ids with logprob -inf."""
    if divergence == "reverse_kl":
        return  # infinite
    case = make_case()
    assert case.bias is not None
    teacher = case.sparse(convention)
    ids = torch.arange(5).expand(N, 5).contiguous()
    options = LossOptions(divergence, student_temperature=1.5, chunk_bytes=3 * row_bytes(V))
    for banned in (slice(20, None), slice(5, None)):
        logprobs = teacher["teacher_logprobs"].clone()
        logprobs[:, 3] = -math.inf
        bias = case.bias.detach().clone()
        bias[banned] = -math.inf
        leaves = (case.hidden, case.weight, bias.requires_grad_())
        arguments = {"teacher_ids": ids, "teacher_logprobs": logprobs, "convention": convention, "options": options}
        result = linear_distillation_loss(*leaves[:2], bias=bias, **arguments)
        wanted = distillation_loss(F.linear(*leaves), **arguments)
        if convention == "tail" and banned == slice(5, None) and divergence in ("forward_kl", "soft_cross_entropy"):
            assert result.loss.item() == wanted.loss.item() == math.inf  # the teacher has mass where the student has none
            continue
        assert wanted.loss.isfinite()
        assert_equal_results(result, leaves, wanted, 1.0, 1e-11)


def test_the_argmax_of_the_student_may_be_inside_or_outside_the_ids() -> None:
    student = torch.tensor([[5.0, 1.0, 0.0], [0.0, 1.0, 5.0], [3.0, 3.0, 3.0], [1.0, 3.0, 3.0]])
    ids = torch.tensor([[0, 1], [0, 1], [2, 1], [2, 0]])
    logprobs = torch.full((4, 2), 0.4).log()
    for labels, correct in (([0, 2, 0, 1], 4), ([1, 1, 1, 2], 0), ([0, 2, 2, 2], 2)):
        result = of_logits(student, teacher_ids=ids, teacher_logprobs=logprobs, convention="tail", labels=torch.tensor(labels))
        assert result.correct == correct


# -------------------------------------------------------------------------------------------------------------- arguments


def test_linear_sparse_kl_is_a_thin_wrapper() -> None:
    case = make_case()
    teacher = case.sparse("tail")
    rest = torch.log1p(-teacher["teacher_logprobs"].exp().sum(1)) - 0.5
    options = LossOptions("jsd", alpha=0.5)
    wrapped = linear_sparse_kl(
        case.hidden,
        case.weight,
        teacher["teacher_ids"],
        teacher["teacher_logprobs"],
        bias=case.bias,
        teacher_log_rest=rest,
        convention="tail",
        labels=case.labels,
        options=options,
    )
    whole = case.linear(**teacher, teacher_log_rest=rest, labels=case.labels, options=options)
    assert wrapped == whole
    argmax = case.teacher("ids")["teacher_ids"]
    assert linear_sparse_kl(case.hidden, case.weight, argmax, bias=case.bias, options=LossOptions("jsd")) == case.loss(
        "ids", LossOptions("jsd")
    )


def test_log_rest_is_used_in_place_of_the_sum() -> None:
    student, log_q = pair()
    logprobs, ids = log_q.topk(5, 1)
    rest = torch.log1p(-logprobs.exp().sum(1))
    arguments: dict[str, Any] = {"teacher_ids": ids, "teacher_logprobs": logprobs, "convention": "tail"}
    default = of_logits(student, **arguments)
    given = of_logits(student, **arguments, teacher_log_rest=rest)
    moved = of_logits(student, **arguments, teacher_log_rest=rest - 1.0)
    assert relative(given.loss, default.loss) < 1e-12
    assert relative(moved.loss, default.loss) > 1e-3
    assert relative(moved.loss, distillation_loss(student, **arguments, teacher_log_rest=rest - 1.0).loss) < 1e-12


IDS, LOGPROBS = torch.zeros(N, 3, dtype=torch.int64), torch.full((N, 3), 0.2, dtype=F64).log()
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (r"^convention: name one of tail, renormalised, support, sampled", {"convention": None}),
    (r"^convention: name one of .* got 'top'", {"convention": "top"}),
    (r"^convention: reverse_kl is infinite", {"convention": "renormalised", "options": LossOptions("reverse_kl")}),
    (
        r"^teacher_ids: expected shape \[N, K\] with K at least 1",
        {"teacher_ids": IDS[:, :0], "teacher_logprobs": LOGPROBS[:, :0]},
    ),
    (r"^teacher_ids: expected shape \[N, K\]", {"teacher_ids": IDS[:, 0], "teacher_logprobs": LOGPROBS[:, 0]}),
    (
        r"^teacher_ids: 38 distinct ids",
        {"teacher_ids": torch.zeros(N, 38, dtype=torch.int64), "teacher_logprobs": torch.zeros(N, 38)},
    ),
    (r"^teacher_ids: expected torch.int64", {"teacher_ids": IDS.float()}),
    (r"^teacher_ids: expected shape", {"teacher_ids": IDS[:4]}),
    (r"^teacher_logprobs: expected shape \[13, 3\]", {"teacher_logprobs": LOGPROBS[:, :2]}),
    (r"^teacher_logprobs: expected a floating-point", {"teacher_logprobs": IDS}),
    (r"^teacher_logprobs: needed with teacher_ids of shape", {"teacher_logprobs": None, "convention": None}),
    (r"^teacher_log_rest: expected shape \[13\]", {"teacher_log_rest": LOGPROBS}),
    (r"^convention, teacher_log_rest: have no meaning", {"teacher_ids": IDS[:, 0], "teacher_logprobs": None}),
    (r"^teacher_logprobs, convention, teacher_log_rest: have no meaning", {"teacher_ids": None, "labels": IDS[:, 0]}),
    *(
        (rf"^teacher_log_rest: has a meaning for the convention tail, not for {convention}", rest)
        for convention in SPARSE[1:]
        for rest in [{"convention": convention, "teacher_log_rest": LOGPROBS[:, 0]}]
    ),
    *(
        (rf"^divergence: {divergence} has no meaning for the convention {convention}", settings)
        for divergence in ("reverse_kl", "jsd", "tvd")
        for convention in ("support", "sampled")
        for settings in [{"convention": convention, "options": LossOptions(divergence)}]
    ),
    *(
        (rf"^teacher_temperature: {temperature} cannot be applied to a part of a softmax \({convention}\)", settings)
        for convention, temperature in (("tail", 0.5), ("support", 2.0), ("sampled", 0.5), ("sampled", 0.0))
        for settings in [{"convention": convention, "options": LossOptions(teacher_temperature=temperature)}]
    ),
]


@pytest.mark.parametrize(("message", "changes"), REFUSED)
def test_arguments_without_a_meaning_are_refused(message: str, changes: dict[str, Any]) -> None:
    case = make_case()
    arguments = {"teacher_ids": IDS, "teacher_logprobs": LOGPROBS, "convention": "tail", **changes}
    with pytest.raises(ValueError, match=message):
        case.linear(**arguments)
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(N, V, dtype=F64), **arguments)


def test_a_teacher_by_ids_beside_another_is_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"at most one form"):
        case.linear(**case.sparse("tail"), **case.teacher("logits"))


def test_an_out_of_range_id_is_an_error() -> None:
    case = make_case()
    for convention in SPARSE:
        teacher = case.sparse(convention)
        teacher["teacher_ids"] = teacher["teacher_ids"].clone()
        teacher["teacher_ids"][5, 1] = V
        with pytest.raises(RuntimeError, match=r"out of bounds"):
            case.linear(**teacher)


def test_the_teacher_is_a_constant() -> None:
    case = make_case()
    teacher = case.sparse("tail")
    rest = torch.log1p(-teacher["teacher_logprobs"].exp().sum(1)).requires_grad_()
    teacher["teacher_logprobs"].requires_grad_()
    case.linear(**teacher, teacher_log_rest=rest).loss.backward()
    assert teacher["teacher_logprobs"].grad is None
    assert rest.grad is None

"""The reference against closed forms, torch's own losses and its own limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import LossOptions, distillation_loss

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy"]
F64 = torch.float64


def logits_of(*probabilities: float) -> Tensor:
    """One row of logits whose softmax is `probabilities`; 0 becomes -inf."""
    return torch.tensor([probabilities], dtype=F64).log()


def random_pair(rows: int = 6, classes: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(rows, classes, generator=generator, dtype=F64) for _ in range(2))
    return student.requires_grad_(), teacher


def value(divergence: str, student: Tensor, teacher: Tensor, **settings: float) -> float:
    options = LossOptions(divergence, **settings)
    return distillation_loss(student, teacher_logits=teacher, options=options).loss.item()


def test_hand_computed_values() -> None:
    student, teacher = logits_of(0.5, 0.25, 0.25), logits_of(0.25, 0.25, 0.5)
    # KL = 1/4 log(1/2) + 0 + 1/2 log 2 = 1/4 log 2, in either direction; TVD = 1/2 (1/4 + 1/4).
    assert value("forward_kl", student, teacher) == pytest.approx(0.25 * math.log(2), rel=1e-12)
    assert value("reverse_kl", student, teacher) == pytest.approx(0.25 * math.log(2), rel=1e-12)
    assert value("tvd", student, teacher) == pytest.approx(0.25, rel=1e-12)
    # - (1/4 log 1/2 + 3/4 log 1/4) = 7/4 log 2
    assert value("soft_cross_entropy", student, teacher) == pytest.approx(1.75 * math.log(2), rel=1e-12)
    # m = (3/8, 1/4, 3/8): by symmetry JSD(1/2) = KL(q || m) = 1/4 log(2/3) + 1/2 log(4/3)
    assert value("jsd", student, teacher) == pytest.approx(0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 3), rel=1e-12)
    # beta weighs the teacher: m = 1/4 q + 3/4 p = (7, 4, 5) / 16
    kl_q = 0.25 * math.log(4 / 7) + 0.5 * math.log(8 / 5)
    kl_p = 0.5 * math.log(8 / 7) + 0.25 * math.log(4 / 5)
    assert value("jsd", student, teacher, beta=0.25) == pytest.approx(0.25 * kl_q + 0.75 * kl_p, rel=1e-12)


def test_temperatures_and_t2_by_hand() -> None:
    # Halving the logits of (16, 1) / 17 gives (4, 1) / 5; doubling those of (2, 1) / 3 gives (4, 1) / 5.
    student, teacher = logits_of(16 / 17, 1 / 17), logits_of(2 / 3, 1 / 3)
    assert value("forward_kl", student, teacher, student_temperature=2.0, teacher_temperature=0.5) == pytest.approx(0, abs=1e-14)
    at_two = value("tvd", student, teacher, student_temperature=2.0)
    assert at_two == pytest.approx(4 / 5 - 2 / 3, rel=1e-12)
    assert value("tvd", student, teacher, student_temperature=2.0, scale_t2=True) == pytest.approx(4 * at_two, rel=1e-12)


def test_kl_equals_torch_kl_div() -> None:
    student, teacher = random_pair()
    result = distillation_loss(student, teacher_logits=teacher)
    wanted = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(result.loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.divergence, wanted.detach() * 6, rtol=1e-12, atol=0)
    reverse = distillation_loss(student, teacher_logits=teacher, options=LossOptions("reverse_kl")).loss
    wanted = F.kl_div(teacher.log_softmax(-1), student.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(reverse, wanted, rtol=1e-12, atol=0)


def test_soft_cross_entropy_equals_torch_and_has_the_gradient_of_the_kl() -> None:
    student, teacher = random_pair()
    soft = distillation_loss(student, teacher_logits=teacher, options=LossOptions("soft_cross_entropy")).loss
    torch.testing.assert_close(soft, F.cross_entropy(student, teacher.softmax(-1)), rtol=1e-12, atol=0)
    kl = distillation_loss(student, teacher_logits=teacher).loss
    (soft_gradient,), (kl_gradient,) = torch.autograd.grad(soft, student), torch.autograd.grad(kl, student)
    torch.testing.assert_close(soft_gradient, kl_gradient, rtol=1e-9, atol=1e-14)
    assert kl_gradient.norm() > 0.1


def test_labels_alone_equal_torch_cross_entropy_whatever_alpha() -> None:
    student, _ = random_pair()
    labels = torch.tensor([0, 3, -100, 10, 5, -100])
    wanted = F.cross_entropy(student, labels)
    for alpha in (0.0, 0.3):
        options = LossOptions(alpha=alpha, student_temperature=3.0, scale_t2=True)
        result = distillation_loss(student, labels=labels, options=options)
        torch.testing.assert_close(result.loss, wanted, rtol=1e-12, atol=0)
    assert result.divergence == 0
    torch.testing.assert_close(result.cross_entropy, wanted.detach() * 4, rtol=1e-12, atol=0)


def test_the_mix_weighs_each_part_at_its_own_temperature() -> None:
    student, teacher = random_pair()
    labels = torch.arange(6)
    options = LossOptions("reverse_kl", teacher_temperature=2.0, student_temperature=2.0, alpha=0.3, scale_t2=True)
    result = distillation_loss(student, labels=labels, teacher_logits=teacher, options=options)
    wanted = 0.3 * F.cross_entropy(student, labels) + 0.7 * 4.0 * F.kl_div(
        (teacher / 2).log_softmax(-1), (student / 2).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(result.loss, wanted, rtol=1e-12, atol=0)


def test_weights_mask_and_denominator() -> None:
    student, teacher = random_pair()
    labels = torch.tensor([1, -100, 2, 3, 4, 5])
    weights = torch.tensor([0.5, 9.0, 2.0, 0.0, 1.0, 1.0], dtype=F64)
    per_row = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1).detach()
    total = (per_row * torch.tensor([0.5, 0, 2.0, 0, 1.0, 1.0], dtype=F64)).sum()
    result = distillation_loss(student, labels=labels, teacher_logits=teacher, token_weights=weights)
    torch.testing.assert_close(result.loss, total / 4.5, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.divergence, total, rtol=1e-12, atol=0)
    for denominator in (8.0, torch.tensor(8.0), torch.tensor([8])):
        result = distillation_loss(student, labels=labels, teacher_logits=teacher, token_weights=weights, denominator=denominator)
        torch.testing.assert_close(result.loss, total / 8, rtol=1e-12, atol=0)


def test_correct_counts_weighted_argmax_hits_with_the_lowest_index_on_ties() -> None:
    student = torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 0.0], [0.0, 0.0, 7.0], [0.0, 1.0, 0.0]])
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert distillation_loss(student, labels=torch.tensor([1, 0, 2, -100]), token_weights=weights).correct == 7
    assert distillation_loss(student, labels=torch.tensor([2, 0, 1, 1]), token_weights=weights).correct == 10


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "reverse_kl"])
def test_argmax_ids_temperature_zero_and_tiny_temperatures_agree(divergence: str) -> None:
    student, teacher = random_pair()
    ids = distillation_loss(student, teacher_ids=teacher.argmax(-1), options=LossOptions(divergence)).loss
    (wanted,) = torch.autograd.grad(ids, student)
    assert wanted.norm() > 0.01
    for temperature in (0.0, 1e-20, 1e-4):
        options = LossOptions(divergence, teacher_temperature=temperature)
        loss = distillation_loss(student, teacher_logits=teacher, options=options).loss
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(loss, ids, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_one_hot_divergences_by_hand() -> None:
    student, ids = logits_of(0.5, 0.25, 0.25), torch.tensor([1])
    values = {
        d: distillation_loss(student, teacher_ids=ids, options=LossOptions(d)).loss.item() for d in ("forward_kl", "tvd", "jsd")
    }
    assert values["forward_kl"] == pytest.approx(math.log(4), rel=1e-12)
    assert values["tvd"] == pytest.approx(0.75, rel=1e-12)
    # m = (2, 5, 1) / 8
    kl_p = 0.5 * math.log(2) + 0.25 * math.log(2 / 5) + 0.25 * math.log(2)
    assert values["jsd"] == pytest.approx(0.5 * math.log(8 / 5) + 0.5 * kl_p, rel=1e-12)


def test_temperature_zero_takes_the_lowest_index_on_ties() -> None:
    student = logits_of(0.7, 0.2, 0.1)
    teacher = torch.tensor([[1.0, 4.0, 4.0]], dtype=F64)
    assert value("forward_kl", student, teacher, teacher_temperature=0.0) == pytest.approx(-math.log(0.2), rel=1e-12)
    # Above 0 the tie is shared, however low the temperature.
    shared = -0.5 * (math.log(0.2) + math.log(0.1)) - math.log(2)
    assert value("forward_kl", student, teacher, teacher_temperature=1e-20) == pytest.approx(shared, rel=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_banned_on_both_sides_are_as_if_absent(divergence: str) -> None:
    student, teacher = random_pair()
    wanted = distillation_loss(student, teacher_logits=teacher, options=LossOptions(divergence)).loss
    (gradient,) = torch.autograd.grad(wanted, student)
    banned = torch.full((6, 2), -torch.inf, dtype=F64)
    wide = torch.cat([student.detach(), banned], 1).requires_grad_()
    loss = distillation_loss(wide, teacher_logits=torch.cat([teacher, banned], 1), options=LossOptions(divergence)).loss
    (wide_gradient,) = torch.autograd.grad(loss, wide)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(wide_gradient[:, :-2], gradient, rtol=1e-10, atol=1e-14)
    assert torch.equal(wide_gradient[:, -2:], torch.zeros(6, 2, dtype=F64))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_classes_banned_on_one_side(divergence: str, side: str) -> None:
    free, half = logits_of(0.5, 0.25, 0.25), logits_of(0.5, 0.5, 0.0)
    student, teacher = (half, free) if side == "student" else (free, half)
    student.requires_grad_()
    loss = distillation_loss(student, teacher_logits=teacher, options=LossOptions(divergence)).loss
    infinite = side == "student" and divergence in ("forward_kl", "soft_cross_entropy")
    infinite = infinite or (side == "teacher" and divergence == "reverse_kl")
    if infinite:
        assert loss.item() == math.inf
        return
    (gradient,) = torch.autograd.grad(loss, student)
    wanted = {
        "forward_kl": 0.5 * math.log(2),
        "reverse_kl": 0.5 * math.log(2),
        "soft_cross_entropy": 1.5 * math.log(2),
        "tvd": 0.25,
        # m = (4, 3, 1) / 8
        "jsd": 0.5 * (0.5 * math.log(4 / 3)) + 0.5 * (0.25 * math.log(2 / 3) + 0.25 * math.log(2)),
    }[divergence]
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert torch.isfinite(gradient).all()
    assert gradient.norm() > 0.01


def test_nothing_counted_gives_zero_and_zero_gradients() -> None:
    student, teacher = random_pair()
    labels = torch.full((6,), -100)
    result = distillation_loss(student, labels=labels, teacher_logits=teacher, options=LossOptions(alpha=0.5))
    (gradient,) = torch.autograd.grad(result.loss, student)
    assert [x.item() for x in result[:4]] == [0, 0, 0, 0]
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_16_bit_logits_are_widened() -> None:
    student, teacher = random_pair()
    half = student.detach().bfloat16()
    result = distillation_loss(half, teacher_logits=teacher.bfloat16())
    wanted = distillation_loss(half.double(), teacher_logits=teacher.bfloat16().double())
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"divergence": "kl"}, "divergence"),
        ({"teacher_temperature": -1.0}, "teacher_temperature"),
        ({"teacher_temperature": math.nan}, "teacher_temperature"),
        ({"teacher_temperature": 1e-40}, "teacher_temperature"),
        ({"student_temperature": 0.0}, "student_temperature"),
        ({"student_temperature": math.inf}, "student_temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"beta": 0.0}, "beta"),
        ({"beta": 1.0}, "beta"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"divergence": "reverse_kl", "teacher_temperature": 0.0}, "teacher_temperature"),
    ],
)
def test_options_refuse_bad_values(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: [^\n]*$"):
        LossOptions(**settings)


def test_arguments_without_a_meaning_are_refused() -> None:
    student, teacher = random_pair()
    ids = teacher.argmax(-1)
    cases: list[tuple[str, dict[str, object]]] = [
        ("labels: needed where no teacher", {}),
        ("labels: needed for alpha", {"teacher_logits": teacher, "options": LossOptions(alpha=0.1)}),
        ("at most one form", {"teacher_logits": teacher, "teacher_ids": ids}),
        ("same vocabulary", {"teacher_logits": teacher[:, :5]}),
        ("^teacher_logits: expected shape", {"teacher_logits": teacher[:3]}),
        ("^teacher_ids: reverse_kl", {"teacher_ids": ids, "options": LossOptions("reverse_kl")}),
        ("^labels: expected shape", {"labels": ids[:2]}),
        ("^labels: expected torch.int64", {"labels": ids.float()}),
        ("^token_weights: expected shape", {"labels": ids, "token_weights": torch.ones(6, 1)}),
        ("^denominator: must be finite", {"labels": ids, "denominator": -1.0}),
        ("^denominator: expected one number", {"labels": ids, "denominator": torch.ones(2)}),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            distillation_loss(student, **arguments)

"""What a loss costs: 16-bit errors against plain torch's, tensors made and kept, and no wait of the host for the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from megapd_kernels import LossOptions, distillation_loss, softmax_kl, topk_logits
from megapd_kernels.linear import linear_loss
from megapd_kernels.logits import logits_gradient, logits_loss
from megapd_kernels.rows.base import default_chunk_bytes
from megapd_kernels.targets import reciprocal_or_zero

from .cases import (
    DIVERGENCES,
    F64,
    FORMS,
    SPARSE,
    Case,
    D,
    E,
    N,
    Recorder,
    V,
    below,
    make_case,
    possible,
    relative,
    row_bytes,
)

ALL = (True, True, True)
GRID = [(d, form) for d in DIVERGENCES for form in ("none", "ids", "hidden", *SPARSE) if possible(d, form)]


# ---------------------------------------------------------------------------------------------------------- 16-bit types


@pytest.mark.parametrize(("divergence", "form"), [(d, f) for d, f in GRID if f in ("hidden", *SPARSE)] + [("forward_kl", "none")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_errors_are_at_most_twice_those_of_torch(divergence: str, form: str, dtype: torch.dtype) -> None:
    case = make_case(64, 512, 32, 16, bias=False).to(dtype)
    options = LossOptions(divergence, alpha=0.2, chunk_bytes=16 * row_bytes(512, torch.float32))
    wanted = case.reference(form, options, labels=case.labels)
    exact = torch.autograd.grad(wanted.loss, case.student)

    result = case.loss(form, options, labels=case.labels)
    ours = torch.autograd.grad(result.loss, case.student)
    teacher = case.teacher("logits" if form == "hidden" else form)
    plain = distillation_loss(F.linear(case.hidden, case.weight), labels=case.labels, **teacher, options=options)
    theirs = torch.autograd.grad(plain.loss, case.student)
    for value, other, expected in zip(ours, theirs, exact, strict=True):
        # The reference's gradients are rounded to 16 bits too, so the bound has their last digit on top.
        assert value.dtype == dtype
        assert relative(value, expected) <= 2 * relative(other, expected) + torch.finfo(dtype).eps
    assert result.loss.dtype == torch.float32
    assert relative(result.loss, wanted.loss) <= 2 * relative(plain.loss, wanted.loss) + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_cross_entropy_errs_at_most_twice_as_much_as_torchs(dtype: torch.dtype) -> None:
    case = make_case(64, 512, 32, bias=False, ignored=8).to(dtype)
    options = LossOptions(label_smoothing=0.1, chunk_bytes=16 * row_bytes(512, torch.float32))
    logits = F.linear(case.hidden.double(), case.weight.double())
    exact = torch.autograd.grad(F.cross_entropy(logits, case.labels, label_smoothing=0.1), case.student)
    ours = torch.autograd.grad(case.loss("none", options, labels=case.labels).loss, case.student)
    plain = F.cross_entropy(F.linear(case.hidden, case.weight), case.labels, label_smoothing=0.1)
    for value, other, expected in zip(ours, torch.autograd.grad(plain, case.student), exact, strict=True):
        assert relative(value, expected) <= 2 * relative(other, expected) + torch.finfo(dtype).eps


@pytest.mark.parametrize("recompute", [False, True])
def test_small_fp16_gradients_do_not_underflow_before_the_loss_scale(recompute: bool) -> None:
    case = make_case(32, 64, 8, bias=False, ignored=0).to(torch.float16)
    scale, denominator = 2.0**16, 1e7  # without the scale, the gradients lie below the smallest fp16 number, 6e-8
    options = LossOptions(recompute=recompute)
    gradients = torch.autograd.grad(case.loss("hidden", options, denominator=denominator).loss * scale, case.student)
    wide = case.to(F64)
    expected = torch.autograd.grad(wide.reference("hidden", options, denominator=denominator).loss * scale, wide.student)
    for value, wanted in zip(gradients, expected, strict=True):
        assert relative(value, wanted) < 2e-3


# ---------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("divergence", "form"), GRID)
@pytest.mark.parametrize("extra", [{}, {"alpha": 0.5, "z_loss": 0.01, "label_smoothing": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_tokens_times_vocabulary_is_made(
    divergence: str, form: str, extra: dict[str, Any], dtype: torch.dtype
) -> None:
    n, v, d, e, rows = 256, 300, 4, 3, 8
    case = make_case(n, v, d, e).to(dtype)
    options = LossOptions(divergence, student_temperature=2.0, chunk_bytes=rows * row_bytes(v, torch.float32), **extra)
    arguments = below(lambda: case.loss(form, options, labels=case.labels))
    with torch.no_grad(), Recorder() as recorder:
        _, gradients = linear_loss(*arguments, ALL)
    assert all(g is not None and g.norm() > 0 for g in gradients)
    # The logits keep to chunk_bytes: the student's alone has 40 rows, and more buffers have fewer each.
    assert options.chunk_bytes is not None
    assert recorder.largest * 4 <= options.chunk_bytes < n * v * 4 // 6


def test_the_recorder_sees_what_plain_torch_makes() -> None:
    case = make_case(256, 300, 4, 3)
    with Recorder() as recorder:
        case.reference("hidden", LossOptions()).loss.backward()
    assert recorder.largest == 256 * 300


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_are_read_in_chunks(divergence: str) -> None:
    student, teacher = torch.randn(2, 256, 300).unbind()
    options = LossOptions(divergence, student_temperature=2.0, chunk_bytes=16 * row_bytes(300, torch.float32))
    logits, problem, _ = below(lambda: softmax_kl(student, teacher, options=options))
    out, one = torch.empty_like(logits), torch.ones(())
    with Recorder() as recorder:
        _, statistics = logits_loss(logits, problem)
    rows = math.ceil(256 / math.ceil(256 / (16 * 5)))  # a chunk of the student's logits alone, the widest case has five buffers
    assert recorder.largest <= rows * 300
    inputs = {tuple(out.shape), tuple(out[:0].shape)}
    with Recorder() as recorder:
        logits_gradient(logits, problem, one, statistics, out)
    assert max(math.prod(shape) for shape in recorder.made - inputs) <= rows * 300
    assert statistics.numel() <= 16 * 256


def test_the_default_chunk_is_the_devices() -> None:
    """64 MiB on a CPU: nothing larger is made where the logits together are larger."""
    case = make_case(600, 30000, 2, 2, bias=False).to(torch.float32)
    arguments = below(lambda: case.loss("none", LossOptions(), labels=case.labels))
    with torch.no_grad(), Recorder() as recorder:
        linear_loss(*arguments, ALL)
    assert 4 << 20 < recorder.largest * 4 <= default_chunk_bytes(torch.device("cpu")) == 64 << 20 < 600 * 30000 * 4


class Kept:
    """The tensors that autograd keeps for backward."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __enter__(self) -> Kept:
        def keep(tensor: Tensor) -> Tensor:
            self.tensors.append(tensor)
            return tensor

        self._hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def new(self, case: Case) -> list[tuple[int, ...]]:
        """Shapes of those that are not the case's own."""
        own = {t.data_ptr() for t in vars(case).values() if t is not None}
        return [tuple(t.shape) for t in self.tensors if t.numel() > 0 and t.data_ptr() not in own]


def test_what_is_kept_for_backward() -> None:
    """Without recompute dX, dW and db, and neither the weight nor the hidden states; with it the inputs alone."""
    for form in (*FORMS, *SPARSE):
        case = make_case(v=101, d=17)
        with Kept() as kept:
            case.loss(form, LossOptions(), labels=case.labels)
        made = kept.new(case)
        assert sorted(shape for shape in made if shape) == sorted([(N, 17), (101, 17), (101,)])
        assert len(kept.tensors) <= 4  # those and the denominator: no input among them
        with Kept() as kept:
            case.loss(form, LossOptions(recompute=True), labels=case.labels)
        made = kept.new(case)
        dense = [(N, 101)] if form == "logits" else []
        assert [shape for shape in made if 17 in shape or 101 in shape] == dense
        assert any(t.data_ptr() == case.weight.data_ptr() for t in kept.tensors)


# ------------------------------------------------------------------------------------------------------------------ host


def fake_case() -> Case:
    return Case(
        hidden=torch.empty(N, D, requires_grad=True),
        weight=torch.empty(V, D, requires_grad=True),
        bias=torch.empty(V, requires_grad=True),
        teacher_hidden=torch.empty(N, E),
        teacher_weight=torch.empty(V, E),
        teacher_bias=torch.empty(V),
        labels=torch.empty(N, dtype=torch.int64),
        token_weights=torch.empty(N),
    )


def fake_teacher(case: Case, form: str) -> dict[str, Any]:
    if form not in SPARSE:
        return case.teacher(form)
    ids = torch.empty(N, 5, dtype=torch.int64)
    return {"teacher_ids": ids, "teacher_logprobs": torch.empty(N, 5), "convention": form}


@pytest.mark.parametrize("form", [*FORMS, *SPARSE])
def test_no_host_sync(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: .item(), nonzero and boolean indexing raise on them."""
    with FakeTensorMode():
        case = fake_case()
        teacher = fake_teacher(case, form)
        monkeypatch.setattr(Case, "teacher", lambda *_: teacher)
        for divergence in DIVERGENCES:
            if not possible(divergence, form):
                continue
            for label_smoothing, student_temperature in ((0.0, 1.0), (0.1, 2.0)):
                options = LossOptions(
                    divergence,
                    1.0,
                    student_temperature,
                    0.5,
                    label_smoothing=label_smoothing,
                    z_loss=0.1,
                    chunk_bytes=3 * row_bytes(V),
                )
                targets = {"labels": case.labels, "token_weights": case.token_weights, "denominator": torch.empty(())}
                with torch.no_grad():
                    result, gradients = linear_loss(*below(lambda: case.loss(form, options, **targets)), ALL)  # noqa: B023
                assert [None if t is None else tuple(t.shape) for t in (*result[:4], *gradients)] == [
                    (),
                    (),
                    (),
                    (),
                    (N, D),
                    (V, D),
                    (V,),
                ]
            # Through the operation, too: what surrounds it runs, and it says its outputs' shapes.
            case.loss(form, options, **targets).loss.backward()
        assert case.weight.grad is not None
        assert case.weight.grad.shape == (V, D)


def test_no_host_sync_of_logits_and_topk() -> None:
    with FakeTensorMode():
        student, teacher = torch.empty(2, N, V).unbind()
        for divergence in DIVERGENCES:
            options = LossOptions(divergence, 0.7, 2.0, z_loss=0.1, chunk_bytes=3 * row_bytes(V))
            logits, problem, _ = below(lambda: softmax_kl(student, teacher, options=options))  # noqa: B023
            result, statistics = logits_loss(logits, problem)
            assert [s.shape for s in result[:4]] == [()] * 4
            out = torch.empty(N, V)
            logits_gradient(logits, problem, reciprocal_or_zero(torch.empty(())), statistics, out)
        ids, logprobs, log_rest = topk_logits(torch.empty(N, D), torch.empty(V, D), 4, chunk_bytes=3 * row_bytes(V))
        assert (ids.shape, logprobs.shape, log_rest.shape) == ((N, 4), (N, 4), (N,))

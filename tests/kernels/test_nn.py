"""The losses as modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch.nn import functional as F

from megapd_kernels import LossOptions, linear_cross_entropy, softmax_kl
from megapd_kernels.nn import LinearCrossEntropy, LinearDistillation, SoftmaxDivergence

from . import fsdp_worker
from .cases import D, V, make_case, relative


def test_modules_are_the_functions() -> None:
    case = make_case()
    options = LossOptions("jsd", beta=0.3, alpha=0.2, soft_cap=5.0)
    loss = LinearDistillation(divergence="jsd", beta=0.3, alpha=0.2, soft_cap=5.0)
    result = loss(case.hidden, weight=case.weight, bias=case.bias, labels=case.labels, **case.teacher("hidden"))
    assert torch.equal(result.loss, case.loss("hidden", options, labels=case.labels).loss)
    assert loss.extra_repr() == "divergence='jsd', alpha=0.2, beta=0.3, soft_cap=5.0"
    assert list(loss.parameters()) == []
    found = LinearCrossEntropy(label_smoothing=0.1)(case.hidden, case.labels, weight=case.weight)
    wanted = linear_cross_entropy(case.hidden, case.weight, case.labels, options=LossOptions(label_smoothing=0.1))
    assert torch.equal(found.loss, wanted.loss)
    logits, teacher = torch.randn(4, V), torch.randn(4, V)
    found = SoftmaxDivergence(options=LossOptions("tvd"))(logits, teacher)
    assert torch.equal(found.loss, softmax_kl(logits, teacher, options=LossOptions("tvd")).loss)


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_of_its_own_learns(bias: bool) -> None:
    case = make_case().to(torch.float32)
    loss = LinearDistillation(D, V, bias=bias, divergence="reverse_kl")
    assert sorted(name for name, _ in loss.named_parameters()) == (["head.bias", "head.weight"] if bias else ["head.weight"])
    optimizer = torch.optim.SGD(loss.parameters(), lr=5.0)
    values = []
    for _ in range(20):
        result = loss(case.hidden.detach(), **case.teacher("hidden"))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        values.append(result.loss.item())
    assert values[-1] < 0.7 * values[0]
    head = LinearCrossEntropy(D, V, bias=bias)
    assert head.head is not None
    wanted = linear_cross_entropy(case.hidden, head.head.weight, case.labels, bias=head.head.bias)
    assert torch.equal(head(case.hidden, case.labels).loss, wanted.loss)


def test_arguments_without_a_meaning_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"^width, classes: a head needs both"):
        LinearDistillation(8)
    with pytest.raises(ValueError, match=r"^weight: needed where the loss owns no head"):
        LinearDistillation()(case.hidden, **case.teacher("hidden"))
    with pytest.raises(ValueError, match=r"^weight, bias: this loss owns its head"):
        LinearCrossEntropy(D, V)(case.hidden, case.labels, weight=case.weight)
    with pytest.raises(ValueError, match=r"^options: give LossOptions, or its fields by name \(alpha\), not both"):
        SoftmaxDivergence(options=LossOptions(), alpha=0.1)
    with pytest.raises(TypeError, match=r"did you mean .*'divergence'"):
        SoftmaxDivergence(divergenc="jsd")


def test_a_head_of_its_own_gives_logits_too() -> None:
    loss, hidden = LinearCrossEntropy(D, V, bias=True), torch.randn(3, D)
    assert loss.head is not None
    assert torch.equal(loss.head(hidden), F.linear(hidden, loss.head.weight, loss.head.bias))


@pytest.mark.slow
def test_fully_sharded_heads_see_each_ranks_own_rows(tmp_path: Path) -> None:
    """Wrapped by itself, with the loss or within it: the loss of a rank's own rows, and the mean of the ranks' gradients."""
    torch.multiprocessing.start_processes(fsdp_worker.main, (str(tmp_path),), nprocs=fsdp_worker.WORLD, start_method="forkserver")
    loss, teacher_weight = fsdp_worker.heads()
    assert loss.head is not None
    values = []
    for rank in range(fsdp_worker.WORLD):
        hidden, teacher_hidden = fsdp_worker.rows(rank)
        values.append(loss(hidden, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight).loss)
        (values[-1] / fsdp_worker.WORLD).backward()
    assert abs(values[0] - values[1]) > 0.01
    for rank, value in enumerate(values):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert sorted(found) == ["both", "chunked_divergence_loss", "head", "loss"]
        for wrapped in fsdp_worker.WRAPPED:
            for got, want in zip(found[wrapped], (value, loss.head.weight.grad, loss.head.bias.grad), strict=True):
                assert relative(got, want) < 1e-5, wrapped
        plain = LinearDistillation(divergence="jsd")
        hidden, teacher_hidden = fsdp_worker.rows(rank)
        unbiased = plain(hidden, weight=loss.head.weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight).loss
        assert relative(found["chunked_divergence_loss"][0], unbiased) < 1e-5

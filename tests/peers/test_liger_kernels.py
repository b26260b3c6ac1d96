"""The shims of liger's Triton modules against the installed kernels themselves: interpreted on a CPU, else on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton import language as tl

from megapd_kernels.compat import liger as ours

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # -inf - -inf of the interpreter's numpy
peer = pytest.importorskip("liger_kernel.transformers")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, V, D, E = 12, 29, 6, 10


class Number(float):
    """A number as Triton's compiler hands it to a kernel, where liger casts it; the interpreter hands over a plain float."""

    def to(self, dtype: object) -> Number:
        return self


@pytest.fixture(autouse=True)
def typed_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        return
    from liger_kernel.ops import cross_entropy, fused_linear_cross_entropy

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            launch = cross_entropy.liger_cross_entropy_kernel[grid]

            def run(**named: Any) -> None:
                launch(**{name: Number(value) if type(value) is float else value for name, value in named.items()})

            return run

    monkeypatch.setattr(fused_linear_cross_entropy, "liger_cross_entropy_kernel", Kernel())
    monkeypatch.setattr(cross_entropy, "tanh", lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0)  # libdevice's has no interpreter


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,), "teacher_hidden": (N, E), "teacher_weight": (V, E)}
    found = {name: torch.randn(*shape, generator=generator).to(DEVICE, dtype) for name, shape in shapes.items()}
    labels = torch.randint(V, (N,), generator=generator)
    labels[[0, 4, 5]] = -100
    return {**found, "labels": labels.to(DEVICE)}


def same(mine: Tensor, theirs: Tensor, bound: float) -> None:
    assert mine.shape == theirs.shape
    assert theirs.double().norm() > 0
    assert (mine.double() - theirs.double()).norm() <= bound * theirs.double().norm()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.1, "lse_square_scale": 1e-2},
        {"use_token_scaling": True, "lse_square_scale": 1e-2, "return_z_loss": True},
        {"return_z_loss": True, "lse_square_scale": 1e-2, "return_token_accuracy": True, "return_predicted_tokens": True},
        {"ignore_index": 7, "return_token_accuracy": True, "accum_dtype": torch.float32},
        {"softcap": 2.0},
        {"softcap": 2.0, "use_token_scaling": True},
        {"ce_weight": True},
        {"ce_weight": True, "use_token_scaling": True},
    ],
)
def test_cross_entropy(settings: dict[str, Any], reduction: str, dtype: torch.dtype, bound: float) -> None:
    """Values and gradients, of an upstream gradient of its own for each position where there is one."""
    x = tensors(dtype)
    settings = dict(settings)
    labels = x["labels"].masked_fill(x["labels"] == -100, settings.get("ignore_index", -100))
    if "ce_weight" in settings:
        settings["ce_weight"] = torch.linspace(0.2, 2.0, V, device=DEVICE)
    found = []
    for module in (ours, peer):
        leaves = [x[name].clone().requires_grad_() for name in ("weight", "hidden", "bias")]
        loss = module.LigerFusedLinearCrossEntropyLoss(reduction=reduction, **settings)
        out = loss(leaves[0], leaves[1], labels, leaves[2])
        value = out if isinstance(out, Tensor) else out.loss
        upstream = torch.linspace(-3.0, 2.0, N, device=DEVICE) if reduction == "none" else torch.tensor(-3.0, device=DEVICE)
        gradients = torch.autograd.grad(value, leaves, upstream.to(value.dtype))
        rest = () if isinstance(out, Tensor) else (out.z_loss, out.token_accuracy, out.predicted_tokens)
        found.append((value.detach(), gradients, rest))
    (value, gradients, rest), (their_value, their_gradients, their_rest) = found
    same(value, their_value, bound)
    for got, want in zip(gradients, their_gradients, strict=True):
        same(got, want, bound)
    assert len(rest) == len(their_rest)
    for got, want in zip(rest, their_rest, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.shape == want.shape
            torch.testing.assert_close(got.double(), want.double(), rtol=bound, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", [True, False])
def test_jsd(beta: float, masked: bool, dtype: torch.dtype, bound: float) -> None:
    x = tensors(dtype)
    labels = x["labels"] if masked else None
    found = []
    for module in (ours, peer):
        leaves = [x[name].clone().requires_grad_() for name in ("hidden", "weight")]
        loss = module.LigerFusedLinearJSD(jsd_beta=beta, temperature=2.0)
        value = loss(*leaves, x["teacher_hidden"], x["teacher_weight"], labels)
        gradients = torch.autograd.grad(value, leaves, torch.tensor(-3.0, device=DEVICE))
        found.append((value.detach(), *gradients))
    for got, want in zip(*found, strict=True):
        same(got, want, bound)


def test_labels_that_only_mask_need_not_be_classes() -> None:
    x = tensors(torch.float32)
    strange = torch.where(x["labels"] == -100, -100, V + x["labels"])
    arguments = (x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"])
    loss = ours.LigerFusedLinearJSD()
    assert torch.equal(loss(*arguments, strange), loss(*arguments, x["labels"]))
    chunked = ours.LigerFusedLinearJSDLoss(weight_hard_loss=0.0)
    assert torch.equal(chunked(*arguments, strange), chunked(*arguments, x["labels"]))


def test_what_is_refused_is_named() -> None:
    loss = ours.LigerFusedLinearCrossEntropyLoss
    with pytest.raises(ValueError, match=r"^ce_weight: cannot be combined with label_smoothing"):
        loss(ce_weight=torch.ones(V), label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"^ce_weight: in a mean liger divides lse_square_scale's term by another sum"):
        loss(ce_weight=torch.ones(V), lse_square_scale=0.1)
    x = tensors(torch.float32)
    with pytest.raises(ValueError, match=r"^teacher_weight: the teacher has 29 classes, the student 28"):  # liger pads with 0
        ours.LigerFusedLinearJSDLoss()(x["hidden"], x["weight"][1:], x["teacher_hidden"], x["teacher_weight"], x["labels"] // 2)
    with pytest.raises(ValueError, match=r"^accum_dtype: torch.bfloat16 has no counterpart"):
        loss(accum_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^reduction: 'batchmean' is not one of mean, sum, none"):
        loss(reduction="batchmean")
    with pytest.raises(ValueError, match=r"^beta: must lie in \[0, 1\], got 1.5"):
        ours.LigerFusedLinearJSD(jsd_beta=1.5)
    with pytest.raises(ValueError, match=r"^weight_hard_loss, weight_soft_loss: must not be negative, nor both 0"):
        ours.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=0.0)

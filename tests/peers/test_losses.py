"""The shims of megapd_kernels.compat against the functions that they stand in for: values and gradients, upstream not 1."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import JSD, ForwardKL, LossOptions, ReverseKL, linear_sparse_kl
from megapd_kernels.compat import liger as our_liger
from megapd_kernels.compat import torchtune as our_torchtune
from megapd_kernels.compat import transformers as our_transformers
from megapd_kernels.compat import trl as our_trl

N, V, D, E = 12, 29, 6, 10
# bf16: of the peer, whose logits are bf16 too; its own gradient is up to 4 % off there.
BOUND = {torch.float32: 3e-6, torch.bfloat16: 6e-2}


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(V, (N,), generator=generator)
    labels[:3] = -100
    return {
        "hidden": randn(N, D),
        "weight": randn(V, D) / 2,
        "bias": randn(V),
        "teacher_hidden": randn(N, E),
        "teacher_weight": randn(V, E) / 2,
        "teacher_bias": randn(V),
        "labels": labels,
    }


def agree(ours: Callable[..., Any], theirs: Callable[..., Any], *leaves: Tensor, bound: float = BOUND[torch.float32]) -> None:
    """Values (all, where several come back) and gradients of -3 times the first, by relative norm."""
    found: list[list[Tensor]] = []
    for call in (ours, theirs):
        inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out = call(*inputs)
        values = list(out) if isinstance(out, (tuple, list)) else [out]
        upstream = torch.full_like(values[0], -3.0)
        found.append([*(v.detach() for v in values), *torch.autograd.grad(values[0], inputs, upstream)])
    for value, wanted in zip(*found, strict=True):
        assert value.shape == wanted.shape
        assert wanted.double().norm() > 0
        assert (value.double() - wanted.double()).norm() <= bound * wanted.double().norm()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ligers_chunked_jsd(beta: float, temperature: float, dtype: torch.dtype) -> None:
    peer = pytest.importorskip("liger_kernel.chunked_loss")
    x = tensors(dtype)
    for hard, soft in ((0.5, 0.5), (0.0, 2.0), (0.3, 0.9)):
        settings = {
            "weight_hard_loss": hard,
            "weight_soft_loss": soft,
            "beta": beta,
            "temperature": temperature,
            "compiled": False,
        }
        ours, theirs = our_liger.LigerFusedLinearJSDLoss(**settings), peer.LigerFusedLinearJSDLoss(**settings)
        rest = (x["teacher_hidden"], x["teacher_weight"], x["labels"])
        agree(
            lambda h, w, b: ours(h, w, *rest, b, x["teacher_bias"]),
            lambda h, w, b: theirs(h, w, *rest, b, x["teacher_bias"]),
            x["hidden"],
            x["weight"],
            x["bias"],
            bound=max(BOUND[dtype], 1e-5),
        )
        settings["return_soft_hard_loss"] = True
        ours, theirs = our_liger.LigerFusedLinearJSDLoss(**settings), peer.LigerFusedLinearJSDLoss(**settings)
        value, wanted = ours(x["hidden"], x["weight"], *rest), theirs(x["hidden"], x["weight"], *rest)
        assert value[1].item() == pytest.approx(wanted[1].item(), rel=BOUND[dtype])
        assert value[2].item() == pytest.approx(wanted[2].item(), rel=BOUND[dtype])


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_ligers_fused_jsd_by_its_definition(beta: float) -> None:
    """Its kernels need a GPU: here its formulas, as its documentation has them, in float64."""
    pytest.importorskip("liger_kernel.transformers")
    x = {name: t.double() if t.is_floating_point() else t for name, t in tensors().items()}
    ours = our_liger.LigerFusedLinearJSD(jsd_beta=beta, temperature=2.0)

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        keep = x["labels"] != -100
        log_q = F.log_softmax(hidden @ weight.T / 2.0, -1)[keep]
        log_p = F.log_softmax(x["teacher_hidden"] @ x["teacher_weight"].T / 2.0, -1)[keep]
        p, q = log_p.exp(), log_q.exp()
        if beta == 0.0:
            loss = p * (log_p - log_q)
        elif beta == 1.0:
            loss = q * (log_q - log_p)
        else:
            log_m = (beta * p + (1 - beta) * q).log()
            loss = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        return loss.sum() / keep.sum()

    agree(
        lambda h, w: ours(h, w, x["teacher_hidden"], x["teacher_weight"], x["labels"]),
        theirs,
        x["hidden"],
        x["weight"],
        bound=1e-11,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 2.0}, {"label_smoothing": 0.1, "lse_square_scale": 1e-2}, {"ce_weight": True}]
)
def test_ligers_cross_entropy_by_its_definition(settings: dict[str, Any], reduction: Any) -> None:
    pytest.importorskip("liger_kernel.transformers")
    x = {name: t.double() if t.is_floating_point() else t for name, t in tensors().items()}
    settings = dict(settings)
    if "ce_weight" in settings:
        settings["ce_weight"] = torch.rand(V, dtype=torch.float64)
    ours = our_liger.LigerFusedLinearCrossEntropyLoss(reduction=reduction, **settings)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        if "softcap" in settings:
            logits = settings["softcap"] * torch.tanh(logits / settings["softcap"])
        smoothing = settings.get("label_smoothing", 0.0)
        loss = F.cross_entropy(logits, x["labels"], settings.get("ce_weight"), reduction=reduction, label_smoothing=smoothing)
        keep = x["labels"] != -100
        z = settings.get("lse_square_scale", 0.0) * logits.logsumexp(1).square() * keep
        if reduction == "none":
            return loss + z
        return loss + z.sum() / (keep.sum() if reduction == "mean" else 1)

    agree(lambda h, w, b: ours(w, h, x["labels"], b), theirs, x["hidden"], x["weight"], x["bias"], bound=1e-11)
    asked = our_liger.LigerFusedLinearCrossEntropyLoss(
        **{k: v for k, v in settings.items() if k != "ce_weight"},
        return_token_accuracy=True,
        return_predicted_tokens=True,
        return_z_loss=True,
    )
    out = asked(x["weight"], x["hidden"], x["labels"], x["bias"])
    logits = F.linear(x["hidden"], x["weight"], x["bias"])
    keep = x["labels"] != -100
    assert torch.equal(out.predicted_tokens[keep], logits.argmax(1)[keep])
    assert out.token_accuracy.item() == pytest.approx((logits.argmax(1) == x["labels"])[keep].float().mean().item())


def test_ligers_signatures() -> None:
    """Every argument of the installed peer's modules is one of the shim's, with its default."""
    transformers = pytest.importorskip("liger_kernel.transformers")
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    for module, name in (
        (transformers, "LigerFusedLinearJSD"),
        (transformers, "LigerFusedLinearCrossEntropyLoss"),
        (chunked, "LigerFusedLinearJSDLoss"),
    ):
        for method in ("__init__", "forward"):
            theirs = inspect.signature(getattr(getattr(module, name), method)).parameters
            ours = inspect.signature(getattr(getattr(our_liger, name), method)).parameters
            assert list(ours) == list(theirs), (name, method)
            if method == "__init__":
                assert [p.default for p in ours.values()] == [p.default for p in theirs.values()], name


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 3.0}, {"reduction": "sum"}, {"num_items_in_batch": 40}, {"reduction": "mean"}]
)
@pytest.mark.parametrize("masked", [True, False])
def test_trls_generalized_jsd(beta: float, settings: dict[str, Any], masked: bool) -> None:
    peer = pytest.importorskip("trl.experimental.gkd")
    student, teacher = torch.randn(2, 6, V), torch.randn(2, 6, V)
    labels = tensors()["labels"].view(2, 6) if masked else None
    agree(
        lambda s: our_trl.generalized_jsd_loss(s, teacher, labels, beta, **settings),
        lambda s: peer.GKDTrainer.generalized_jsd_loss(s, teacher, labels, beta, **settings),
        student,
    )


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("items", [None, 33])
def test_trls_chunked_divergence(beta: float, items: int | None) -> None:
    peer = pytest.importorskip("trl.trainer.distillation_trainer")
    x = tensors()
    mask = (x["labels"] != -100).view(2, 6).int()
    shape: dict[str, Any] = {
        "student_logit_scale": 0.7,
        "teacher_logit_scale": 1.3,
        "student_final_logit_softcapping": 2.0,
        "teacher_final_logit_softcapping": 3.0,
        "temperature": 1.5,
        "num_items_in_batch": items,
        "teacher_lm_head_bias": x["teacher_bias"],
    }

    def call(loss: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return loss(
                hidden.view(2, 6, D),
                x["teacher_hidden"].view(2, 6, E),
                weight,
                x["teacher_weight"],
                mask,
                beta,
                student_lm_head_bias=bias,
                **shape,
            )

        return run

    agree(
        call(our_trl.chunked_divergence_loss),
        call(peer._chunked_divergence_loss),
        x["hidden"],
        x["weight"],
        x["bias"],
        bound=1e-5,
    )
    ours = inspect.signature(our_trl.chunked_divergence_loss).parameters
    assert list(ours) == list(inspect.signature(peer._chunked_divergence_loss).parameters)


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, ForwardKL()), (0.4, JSD(0.4)), (1.0, ReverseKL())])
def test_trls_tail_bucket_is_the_tail_convention(beta: float, divergence: Any) -> None:
    """ServerDistillationTrainer with loss_add_tail, from the top 4 of a served teacher; its other way has no counterpart."""
    peer = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    x = tensors()
    logprobs, ids = F.linear(x["teacher_hidden"], x["teacher_weight"]).log_softmax(-1).topk(4)
    everywhere = torch.ones_like(ids, dtype=torch.bool)

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        student = (hidden @ weight.T).log_softmax(-1).gather(-1, ids)
        (p, mask), (q, _) = (peer._add_tail_bucket(each, everywhere) for each in (student, logprobs))
        return peer._jsd_divergence(p, q, beta, mask).sum() / N

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_sparse_kl(hidden, weight, ids, logprobs, convention="tail", options=LossOptions(divergence)).loss

    agree(ours, theirs, x["hidden"], x["weight"], bound=2e-5)


@pytest.mark.parametrize("name", ["ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"])
def test_torchtunes_losses(name: str) -> None:
    peer = pytest.importorskip("torchtune.modules.loss.kd_losses")
    student, teacher, labels = torch.randn(2, 8, V), torch.randn(2, 8, V), torch.randint(V, (2, 8))
    labels[0, :5] = -100
    for settings in (
        [{}] if name != "SymmetricKLLoss" else [{}, {"sym_kd_ratio": 1.0}, {"sym_kd_ratio": 0.0}, {"sym_kd_ratio": 0.2}]
    ):
        ours, theirs = getattr(our_torchtune, name)(**settings), getattr(peer, name)(**settings)
        flat = (teacher.view(-1, V), labels.view(-1))
        for normalize in (True, False):
            agree(
                lambda s: ours(s.view(-1, V), *flat, normalize=normalize),
                lambda s: theirs(s.view(-1, V), *flat, normalize=normalize),
                student,
            )
        chunked = name.replace("Loss", "WithChunkedOutputLoss")
        mine, its = (getattr(module, chunked)(num_output_chunks=4, **settings) for module in (our_torchtune, peer))
        agree(
            lambda s: mine(s.chunk(4, 1), teacher.chunk(4, 1), labels),
            lambda s: its(s.chunk(4, 1), teacher.chunk(4, 1), labels),
            student,
        )


def test_torchtunes_banned_classes() -> None:
    """Both sides' count for nothing, as theirs; one that the student alone bans is left out there and infinite here."""
    peer = pytest.importorskip("torchtune.modules.loss.kd_losses")
    student, teacher, labels = torch.randn(5, V), torch.randn(5, V), torch.zeros(5, dtype=torch.int64)
    student[:, 4], teacher[:, 4] = -torch.inf, -torch.inf
    for name in ("ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"):
        ours, theirs = getattr(our_torchtune, name)(), getattr(peer, name)()
        assert ours(student, teacher, labels).item() == pytest.approx(theirs(student, teacher, labels).item(), rel=1e-5)
    teacher[:, 4] = 1.0
    assert peer.ForwardKLLoss()(student, teacher, labels).isfinite()
    assert our_torchtune.ForwardKLLoss()(student, teacher, labels).item() == torch.inf


def test_bf16_logits() -> None:
    """TRL takes its log-softmaxes in bf16; torchtune and transformers in float32, as megapd_kernels: there the bound is tight."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    tune, hf = pytest.importorskip("torchtune.modules.loss.kd_losses"), pytest.importorskip("transformers.loss.loss_utils")
    student, teacher = torch.randn(2, 6, V).bfloat16(), torch.randn(2, 6, V).bfloat16()
    labels = torch.randint(V, (2, 6))
    labels[0, :3] = -100
    for beta in (0.0, 0.4, 1.0):
        agree(
            lambda s, beta=beta: our_trl.generalized_jsd_loss(s, teacher, labels, beta),
            lambda s, beta=beta: gkd.GKDTrainer.generalized_jsd_loss(s, teacher, labels, beta),
            student,
            bound=BOUND[torch.bfloat16],
        )
    flat = (teacher.view(-1, V), labels.view(-1))
    for name in ("ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"):
        ours, theirs = getattr(our_torchtune, name)(), getattr(tune, name)()
        agree(
            lambda s, ours=ours: ours(s.view(-1, V), *flat),
            lambda s, theirs=theirs: theirs(s.view(-1, V), *flat),
            student,
            bound=5e-3,
        )
    agree(
        lambda s: our_transformers.causal_lm_loss(s, labels, V),
        lambda s: hf.ForCausalLMLoss(s, labels, V),
        student,
        bound=5e-3,
    )


@pytest.mark.parametrize("items", [None, 17])
@pytest.mark.parametrize("shifted", [False, True])
def test_transformers_loss_function(items: int | None, shifted: bool) -> None:
    peer = pytest.importorskip("transformers.loss.loss_utils")
    labels = torch.randint(V, (2, 6))
    labels[1, 3:] = -100
    named: dict[str, Any] = {"num_items_in_batch": items, "shift_labels": labels.roll(-1, 1) if shifted else None}
    agree(
        lambda s: our_transformers.causal_lm_loss(s, labels, V, **named),
        lambda s: peer.ForCausalLMLoss(s, labels, V, **named),
        torch.randn(2, 6, V),
    )
    with pytest.raises(ValueError, match=r"^reduction: 'sum' has no counterpart"):
        our_transformers.causal_lm_loss(torch.randn(2, 6, V), labels, V, reduction="sum")

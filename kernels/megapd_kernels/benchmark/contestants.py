"""The losses that are compared: megapd's, and what is used elsewhere, all on the same arguments.

Every contestant takes an operation's tensors (`make_tensors`) and returns the mean over the tokens, differentiable in those
tensors that require a gradient; for topk_logits it returns (ids, logprobs), and nothing is differentiable.

torch            what one writes by hand: whole logits, in float32 from the softmax on, gradients by autograd
torch.compile    the same, compiled (`compiled`)
torchtune-like   whole logits cut into 8 pieces, the softmax of a piece at a time, autograd through all of them: the teacher's
                 entropy, a constant, is left out of the loss
liger-like       pieces of 1024 tokens, gradients of each by torch.func, dW summed: Liger's chunked distillation in plain torch
liger ...        liger-kernel's own classes, where that package is installed
trl ...          TRL's own functions, where that package is installed
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses import linear_cross_entropy as our_cross_entropy
from ..losses import linear_softmax_kl as our_linear_kl
from ..losses import linear_sparse_kl as our_sparse_kl
from ..losses import softmax_kl as our_softmax_kl
from ..options import LossOptions
from ..topk import topk_logits as our_topk

Contestant = Callable[..., Any]

OPERATIONS = ("softmax_kl", "linear_softmax_kl", "linear_cross_entropy", "linear_sparse_kl", "topk_logits")
TOP_K = 64
TORCHTUNE_CHUNKS = 8
LIGER_CHUNK = 1024  # tokens
# Standard deviation of the logits: a trained model's softmax is neither flat nor one-hot.
SPREAD = 2.0


def make_tensors(
    operation: str,
    tokens: int,
    vocabulary: int,
    student: int,
    teacher: int,
    dtype: torch.dtype,
    device: torch.device,
    k: int = TOP_K,
) -> tuple[Tensor, ...]:
    """An operation's arguments, the same for the same sizes; those that are differentiated require a gradient.

    softmax_kl             student logits [N, V], teacher logits [N, V]
    linear_softmax_kl      hidden [N, D], weight [V, D], teacher_hidden [N, E], teacher_weight [V, E]
    linear_cross_entropy   hidden, weight, labels [N]
    linear_sparse_kl       hidden, weight, ids [N, k], logprobs [N, k], log_rest [N]: a top k with the rest's mass
    topk_logits            teacher_hidden, teacher_weight
    """
    generator = torch.Generator(device).manual_seed(tokens + vocabulary)

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=dtype, device=device).mul_(scale)

    def head(width: int) -> tuple[Tensor, Tensor]:
        return normal(tokens, width), normal(vocabulary, width, SPREAD / math.sqrt(width))

    if operation == "softmax_kl":
        return normal(tokens, vocabulary, SPREAD).requires_grad_(), normal(tokens, vocabulary, SPREAD)
    if operation == "topk_logits":
        return head(teacher)
    hidden, weight = (tensor.requires_grad_() for tensor in head(student))
    if operation == "linear_softmax_kl":
        return hidden, weight, *head(teacher)
    if operation == "linear_cross_entropy":
        return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    if operation != "linear_sparse_kl":
        raise ValueError(f"operation: {operation!r} is not one of {', '.join(OPERATIONS)}")
    # Equal steps from a random start: k different ids, without sorting N x V numbers.
    first = torch.randint(vocabulary, (tokens, 1), generator=generator, device=device)
    ids = (first + torch.arange(k, device=device) * (vocabulary // k)) % vocabulary
    shares = torch.randn(tokens, k + 1, generator=generator, device=device).mul_(SPREAD).log_softmax(1)
    return hidden, weight, ids, shares[:, :k].contiguous(), shares[:, k].contiguous()


def compiled(contestant: Contestant) -> Contestant:
    """For the shapes of its first call; what was compiled before is dropped, so that no earlier shape makes this one dynamic."""
    torch._dynamo.reset()
    return torch.compile(contestant, dynamic=False)


# ------------------------------------------------------------------------------------------------------------ plain torch


def divergence(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Of logits [N, V]; jsd at beta = 1/2."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if kind == "forward_kl":
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    if kind == "reverse_kl":
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    if kind == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()
    if kind != "jsd":
        raise ValueError(f"divergence: {kind!r} is not one of forward_kl, reverse_kl, jsd, tvd")
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (
        F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
        + F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    )


def linear_divergence(kind: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    return divergence(kind, F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def linear_sparse_kl(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, log_rest: Tensor) -> Tensor:
    """Forward KL over the ids and one bucket for the rest."""
    log_p = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, ids)
    log_p_rest = torch.log1p(-log_p.exp().sum(-1))
    inside = (logprobs.exp() * (logprobs - log_p)).sum(-1)
    return (inside + log_rest.exp() * (log_rest - log_p_rest)).mean()


@torch.no_grad()
def topk_logits(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logprobs, ids = F.linear(hidden, weight).float().log_softmax(-1).topk(TOP_K, -1)
    return ids, logprobs


def plain(operation: str, kind: str) -> Contestant:
    found: dict[str, Contestant] = {
        "softmax_kl": partial(divergence, kind),
        "linear_softmax_kl": partial(linear_divergence, kind),
        "linear_cross_entropy": linear_cross_entropy,
        "linear_sparse_kl": linear_sparse_kl,
        "topk_logits": topk_logits,
    }
    return found[operation]


# ---------------------------------------------------------------------------------------------------------------- megapd


def loss_options(kind: str, **settings: Any) -> LossOptions:
    """kind: a divergence, or "" for losses that have none."""
    return LossOptions(kind or "forward_kl", **settings)


def megapd(operation: str, kind: str, *, in_place: bool = False, **settings: Any) -> Contestant:
    """settings: fields of LossOptions."""
    options = loss_options(kind, **settings)
    if operation == "topk_logits":
        return lambda hidden, weight: our_topk(hidden, weight, TOP_K)[:2]
    if operation == "softmax_kl":
        return lambda student, teacher: our_softmax_kl(student, teacher, options=options, in_place=in_place).loss
    if operation == "linear_softmax_kl":
        return lambda h, w, th, tw: our_linear_kl(h, w, th, tw, options=options).loss
    if operation == "linear_cross_entropy":
        return lambda h, w, labels: our_cross_entropy(h, w, labels, options=options).loss

    def sparse(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, log_rest: Tensor) -> Tensor:
        return our_sparse_kl(hidden, weight, ids, logprobs, teacher_log_rest=log_rest, convention="tail", options=options).loss

    return sparse


# ------------------------------------------------------------------------------------------- formulations of other projects


def torchtune_like(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Forward KL without the teacher's entropy; all logits stay, each piece's softmax is a node of one graph."""
    student = F.linear(hidden, weight).chunk(TORCHTUNE_CHUNKS)
    teacher = F.linear(teacher_hidden, teacher_weight).chunk(TORCHTUNE_CHUNKS)
    total = hidden.new_zeros((), dtype=torch.float32)
    for s, t in zip(student, teacher, strict=True):
        product = t.float().softmax(-1) * s.float().log_softmax(-1)
        total = total - product.masked_fill(s.isinf(), 0.0).sum()
    return total / hidden.shape[0]


class LigerLike(torch.autograd.Function):
    """Forward KL, its gradients formed in forward from pieces of LIGER_CHUNK tokens, and kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        tokens = hidden.shape[0]

        def loss(h: Tensor, w: Tensor, th: Tensor) -> Tensor:
            return linear_divergence("forward_kl", h, w, th, teacher_weight) * (h.shape[0] / tokens)

        step = torch.func.grad_and_value(loss, argnums=(0, 1))
        total, dw, dx = hidden.new_zeros((), dtype=torch.float32), torch.zeros_like(weight), []
        for h, th in zip(hidden.split(LIGER_CHUNK), teacher_hidden.split(LIGER_CHUNK), strict=True):  # type: ignore[no-untyped-call]
            (dh, dw_piece), value = step(h, weight, th)
            dx.append(dh)
            dw += dw_piece
            total += value
        ctx.save_for_backward(torch.cat(dx), dw)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return dx * upstream, dw * upstream, None, None


def liger_chunked(kind: str, *, compile_chunks: bool) -> Contestant:
    """liger-kernel's chunked distillation. Raises ImportError without that package."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_liger_beta(kind), compiled=compile_chunks, chunk_size=LIGER_CHUNK
    )

    def run(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        value: Tensor = loss(hidden, weight, teacher_hidden, teacher_weight, labels)
        return value

    return run


def liger_logits(kind: str, *, kl_div: bool = False) -> Contestant:
    """liger-kernel's divergences of (log-)probabilities in the logits' type, its fastest. Raises ImportError without it."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
    from liger_kernel.transformers.tvd import LigerTVDLoss

    if kind == "tvd":
        tvd = LigerTVDLoss()
        return lambda student, teacher: tvd(student.softmax(-1), teacher.softmax(-1))
    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True) if kl_div else LigerJSD(beta=_liger_beta(kind))
    return lambda student, teacher: loss(student.log_softmax(-1), teacher.log_softmax(-1))


def liger_fused_jsd(kind: str, accumulate: torch.dtype | None = None) -> Contestant:
    """liger-kernel's fused_linear_jsd; `accumulate`: the type of dW's sum. Raises ImportError without that package."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=_liger_beta(kind), accum_dtype=accumulate)
    return lambda hidden, weight, teacher_hidden, teacher_weight: loss(hidden, weight, teacher_hidden, teacher_weight, None)


def liger_fused_cross_entropy() -> Contestant:
    """liger-kernel's fused linear cross entropy. Raises ImportError without that package."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def trl_logits(kind: str, *, linear: bool = False) -> Contestant:
    """TRL's generalized_jsd_loss, of whole logits. Raises ImportError without that package."""
    from trl.experimental.gkd import GKDTrainer

    loss, beta = GKDTrainer.generalized_jsd_loss, _liger_beta(kind)
    if not linear:
        return lambda student, teacher: loss(student, teacher, beta=beta)
    return lambda h, w, th, tw: loss(F.linear(h, w), F.linear(th, tw), beta=beta)


def trl_chunked(kind: str) -> Contestant:
    """TRL's divergence of hidden states in chunks. Raises ImportError without that package."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def run(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        mask = torch.ones(1, len(hidden), dtype=torch.int64, device=hidden.device)
        heads = (weight, teacher_weight)
        loss: Tensor = _chunked_divergence_loss(hidden[None], teacher_hidden[None], *heads, mask, _liger_beta(kind))[0]
        return loss

    return run


def available(operation: str, kind: str, device: torch.device) -> dict[str, Callable[[], Contestant]]:
    """By name, megapd first and plain torch second; each is made when called for, so that a missing package fails alone."""
    found: dict[str, Callable[[], Contestant]] = {"megapd": partial(megapd, operation, kind)}
    found["torch"] = partial(plain, operation, kind)
    if operation == "topk_logits":
        return found
    if operation != "softmax_kl":
        found["megapd recompute"] = partial(megapd, operation, kind, recompute=True)
    found["torch.compile"] = lambda: compiled(plain(operation, kind))
    liger_has = kind in ("forward_kl", "reverse_kl", "jsd")
    if operation == "softmax_kl" and liger_has:
        found["trl"] = partial(trl_logits, kind)
        if device.type == "cuda":
            found["liger"] = partial(liger_logits, kind, kl_div=kind == "forward_kl")
    if operation == "linear_softmax_kl" and liger_has:
        found["trl"] = partial(trl_logits, kind, linear=True)
        found["trl chunked"] = partial(trl_chunked, kind)
        found["liger chunked"] = partial(liger_chunked, kind, compile_chunks=device.type == "cuda")
        if device.type == "cuda":
            found["liger fused_linear_jsd"] = partial(liger_fused_jsd, kind)
    if operation == "linear_cross_entropy":
        found["torch chunked"] = torch_linear_cross_entropy
        if device.type == "cuda":
            found["liger"] = liger_fused_cross_entropy
    return found


def torch_linear_cross_entropy() -> Contestant:
    """torch's own loss in chunks. Raises ImportError where this torch has none."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy in chunks")
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def _liger_beta(kind: str) -> float:
    """Liger's JSD is its KLs at the ends of beta."""
    return {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[kind]

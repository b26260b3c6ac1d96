"""Losses over vocabulary shards, on the ranks of a process group that test_shards.py starts: sharded against whole."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from megapd_kernels import (
    JSD,
    LK,
    ForwardKL,
    LossOptions,
    LossResult,
    ReverseKL,
    TokenOutputs,
    VocabularyShard,
    linear_distillation_loss,
    softmax_kl,
    topk_logits,
)

from .cases import BROKEN_INTERPRETER, DIVERGENCES, F64, SPARSE, Case, N, make_case, possible, relative, row_bytes

WORLD = 3
# Classes of each rank, unequal; 41 together.
PARTS = {2: [24, 17], 3: [19, 5, 17]}
V = 41
FORMS = ["none", "ids", "logits", "hidden", *SPARSE]
CHUNK = 7 * row_bytes(21)  # two chunks of rows, on two ranks and on three

_ALL: dict[str, Any] = {"alpha": 0.3, "student_temperature": 2.0, "per_token": True, "chunk_bytes": CHUNK}
EXTRA = {
    "sum": LossOptions(0.7 * ForwardKL() + 0.3 * ReverseKL() + 0.2 * JSD(0.01), **_ALL),
    "lk": LossOptions(LK(), top_k_agreement=3, **_ALL),
    "capped": LossOptions("reverse_kl", soft_cap=2.0, logit_scale=1.5, teacher_soft_cap=3.0, **_ALL),
}

Errors = dict[str, float]  # relative error of each number and gradient


class Split(NamedTuple):
    """This rank's part of the classes."""

    shard: VocabularyShard
    mine: slice

    def rows(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[self.mine]


def split(group: dist.ProcessGroup) -> Split:
    sizes = PARTS[dist.get_world_size(group)]
    bounds = [0, *itertools.accumulate(sizes)]
    rank = dist.get_rank(group)
    return Split(VocabularyShard.of(group, bounds[rank], V), slice(bounds[rank], bounds[rank + 1]))


def names(world: int) -> Iterator[tuple[str, Callable[[Split], Errors]]]:
    """Every case of that many ranks, in the order in which all of them run it. Two ranks leave some divergences to the three."""
    divergences = DIVERGENCES if world == WORLD else ["forward_kl", "jsd"]
    for form, divergence in itertools.product(FORMS, divergences):
        if not possible(divergence, form) or (form == "none" and divergence != "forward_kl"):
            continue
        plain = LossOptions(divergence, 1.0, 2.0, 0.3, beta=0.3, scale_t2=True, chunk_bytes=CHUNK)
        terms = dataclasses.replace(plain, label_smoothing=0.1, z_loss=0.05)
        yield f"{form} {divergence} smoothing and z-loss, recomputed", linear(form, dataclasses.replace(terms, recompute=True))
        at_one = dataclasses.replace(terms, student_temperature=1.0)
        yield f"{form} {divergence} smoothing and z-loss at temperature 1, float32", linear(form, at_one, dtype=torch.float32)
        # The interpreter is slow: each statistic's exchange once.
        if world == WORLD and not BROKEN_INTERPRETER and (form in ("none", "hidden") or (form == "tail" and divergence == "jsd")):
            apart = dataclasses.replace(terms, recompute=True)
            yield f"triton {form} {divergence} float32", in_triton(linear(form, apart, dtype=torch.float32, n=5))
        if form != "none":
            cold = dataclasses.replace(plain, student_temperature=0.6, alpha=0.0)
            yield f"{form} {divergence} without labels", linear(form, cold, labels=False)
        # Both sides ban the same classes; ids and labels lie elsewhere, and smoothing would be infinite.
        banned = dataclasses.replace(plain, z_loss=0.05)
        yield f"{form} {divergence} a rank with banned classes alone", linear(form, banned, banned=True)
    for form, divergence, teacher_temperature in itertools.product(("logits", "hidden"), divergences, (0.0, 0.5)):
        if possible(divergence, form, teacher_temperature):
            options = LossOptions(divergence, teacher_temperature, 2.0, 0.3, chunk_bytes=CHUNK)
            yield f"{form} {divergence} teacher at {teacher_temperature}", linear(form, options)
    for form, divergence in itertools.product(("none", "ids", "logits"), divergences):
        if possible(divergence, form) and (form != "none" or divergence == "forward_kl"):
            options = LossOptions(divergence, 0.5, 2.0, 0.3, label_smoothing=0.1, z_loss=0.05, chunk_bytes=CHUNK)
            in_place = divergence in ("jsd", "soft_cross_entropy")
            yield f"softmax_kl {form} {divergence}", logits(form, options, in_place=in_place)
            if world == WORLD and not BROKEN_INTERPRETER and form == "logits" and divergence in ("reverse_kl", "tvd"):
                case = in_triton(logits(form, options, in_place=in_place, dtype=torch.float32))
                yield f"triton softmax_kl {form} {divergence} float32", case
    for form, (name, options) in itertools.product(("none", "hidden", "tail"), EXTRA.items()):
        if form != "none" or name == "capped":
            yield f"outputs {form} {name}", linear(form, options)
            if world == WORLD and not BROKEN_INTERPRETER:
                narrow = dataclasses.replace(options, chunk_bytes=None)
                yield f"triton outputs {form} {name} float32", in_triton(linear(form, narrow, dtype=torch.float32, n=5))
    yield "dtensor hidden", dtensor_head
    for k, temperature, banned in itertools.product((1, 30, V), (1.0, 0.5), (False, True)):
        yield f"topk k={k} temperature={temperature} banned={banned}", topk(k, temperature, banned)
    yield "topk saturated", topk_saturated
    yield "ties", ties
    yield "empty", linear("hidden", LossOptions(alpha=0.5), n=0)
    yield "chunk of default size", linear("hidden", LossOptions("jsd", alpha=0.5))


def dtensor_head(part: Split) -> Errors:
    """Heads that say themselves how they are split, one class more on the first ranks than on the last."""
    case, options = make_case(v=V), LossOptions(alpha=0.3, per_token=True)
    wanted = case.loss("hidden", options, labels=case.labels)
    expected = torch.autograd.grad(wanted.loss, case.student)
    mesh = DeviceMesh.from_group(part.shard._group(), "cpu")

    def split_up(tensor: Tensor | None) -> DTensor:
        assert tensor is not None
        return distribute_tensor(tensor.detach(), mesh, [Shard(0)])

    hidden = distribute_tensor(case.hidden.detach(), mesh, [Replicate()]).requires_grad_()
    weight, bias = split_up(case.weight).requires_grad_(), split_up(case.bias).requires_grad_()
    result = linear_distillation_loss(
        hidden,
        weight,
        bias=bias,
        teacher_hidden=case.teacher_hidden,
        teacher_weight=split_up(case.teacher_weight),
        teacher_bias=split_up(case.teacher_bias),
        labels=case.labels,
        options=options,
    )
    found = torch.autograd.grad(result.loss, (hidden, weight, bias))
    errors = compare(result, wanted)
    for name, value, want in zip(("dX", "dW", "db"), found, expected, strict=True):
        assert isinstance(value, DTensor)
        errors[name] = relative(value.full_tensor(), want)
    return errors


def ban(case: Case, part: slice) -> None:
    """The classes of a part get no probability, from neither side."""
    assert case.bias is not None
    assert case.teacher_bias is not None
    with torch.no_grad():
        case.bias[part] = -math.inf
        case.teacher_bias[part] = -math.inf


def second(shard: VocabularyShard) -> slice:
    """The classes of the second rank."""
    first = PARTS[dist.get_world_size(shard._group())]
    return slice(first[0], first[0] + first[1])


def compare(result: LossResult, wanted: LossResult) -> Errors:
    errors = {
        name: relative(value, want) for name, value, want in zip(LossResult._fields[:4], result[:4], wanted[:4], strict=True)
    }
    for name, value, want in zip(TokenOutputs._fields, result.tokens or (), wanted.tokens or (), strict=False):
        if want.is_floating_point():
            errors[name] = ((value - want).norm() / want.norm().clamp(min=1.0)).item()
        else:
            errors[name] = 0.0 if torch.equal(value, want) else math.inf
    return errors


def in_triton(run: Callable[[Split], Errors]) -> Callable[[Split], Errors]:
    """The case by the Triton kernels, whole and sharded."""

    def with_kernels(part: Split) -> Errors:
        os.environ["MEGAPD_KERNELS"] = "triton"
        try:
            return run(part)
        finally:
            del os.environ["MEGAPD_KERNELS"]

    return with_kernels


def linear(
    form: str, options: LossOptions, *, banned: bool = False, labels: bool = True, dtype: torch.dtype = F64, n: int = N
) -> Callable[[Split], Errors]:
    def run(part: Split) -> Errors:
        case = make_case(n, V).to(dtype)
        if banned:
            ban(case, second(part.shard))
            case.labels = torch.where(case.labels < 0, case.labels, case.labels % PARTS[3][0])
        targets: dict[str, Any] = {"token_weights": case.token_weights, "options": options}
        if labels:
            targets["labels"] = case.labels
        teacher = case.teacher(form)
        wanted = case.linear(**teacher, **targets)
        upstream = torch.tensor(-3.0, dtype=dtype)
        expected = torch.autograd.grad(wanted.loss, case.student, upstream)

        hidden = case.hidden.detach().requires_grad_()
        weight, bias = (part.rows(t).detach().requires_grad_() for t in (case.weight, case.bias))  # type: ignore[union-attr]
        for name in ("teacher_weight", "teacher_bias"):
            if name in teacher:
                teacher[name] = part.rows(teacher[name])
        if "teacher_logits" in teacher:
            teacher["teacher_logits"] = teacher["teacher_logits"][:, part.mine]
        result = linear_distillation_loss(hidden, weight, bias=bias, **teacher, **targets, shard=part.shard)
        dx, dw, db = torch.autograd.grad(result.loss, (hidden, weight, bias), upstream)
        first = dx.clone()
        dist.broadcast(first, group=part.shard._group(), group_src=0)
        return {
            **compare(result, wanted),
            "dX": relative(dx, expected[0]),
            "dW": relative(dw, expected[1][part.mine]),
            "db": relative(db, expected[2][part.mine]),
            "dX of rank 0": 0.0 if torch.equal(first, dx) else math.inf,
            "a loss of nan or 0": 0.0 if wanted.loss.isfinite() and (wanted.loss > 0) == (n > 0) else math.inf,
        }

    return run


def logits(form: str, options: LossOptions, in_place: bool, dtype: torch.dtype = F64) -> Callable[[Split], Errors]:
    def run(part: Split) -> Errors:
        case = make_case(v=V).to(dtype)
        teacher = case.teacher(form)
        whole = F.linear(case.hidden, case.weight, case.bias).detach().requires_grad_()
        wanted = softmax_kl(whole, labels=case.labels, **teacher, options=options)
        (expected,) = torch.autograd.grad(wanted.loss, whole)
        own = whole.detach()[:, part.mine].clone().requires_grad_()
        if form == "logits":
            teacher["teacher_logits"] = teacher["teacher_logits"][:, part.mine]
        result = softmax_kl(own, labels=case.labels, **teacher, options=options, in_place=in_place, shard=part.shard)
        (gradient,) = torch.autograd.grad(result.loss, own)
        return {**compare(result, wanted), "gradient": relative(gradient, expected[:, part.mine])}

    return run


def topk(k: int, temperature: float, banned: bool) -> Callable[[Split], Errors]:
    def run(part: Split) -> Errors:
        case = make_case(v=V)
        if banned:
            ban(case, second(part.shard))
        wanted = topk_logits(case.hidden, case.weight, k, bias=case.bias, temperature=temperature)
        assert case.bias is not None
        weight, bias = part.rows(case.weight), part.rows(case.bias)
        result = topk_logits(case.hidden, weight, k, bias=bias, temperature=temperature, chunk_bytes=CHUNK, shard=part.shard)
        return top_errors(result, wanted)

    return run


def top_errors(result: Any, wanted: Any) -> Errors:
    """-inf on both sides is no error; where logprobs are -inf, any id of a banned class will do."""
    finite = wanted.logprobs.isfinite()
    return {
        "ids": 0.0 if torch.equal(result.ids[finite], wanted.ids[finite]) else math.inf,
        "distinct ids": 0.0 if (result.ids.sort(1).values.diff(dim=1) > 0).all() else math.inf,
        "logprobs": relative(result.logprobs.exp(), wanted.logprobs.exp()),
        "banned": 0.0 if torch.equal(result.logprobs.isfinite(), finite) else math.inf,
        "log_rest": relative(result.log_rest.nan_to_num(neginf=0.0), wanted.log_rest.nan_to_num(neginf=0.0)),
    }


def topk_saturated(part: Split) -> Errors:
    """A rest of e-200 is below what exp of float32 can hold."""
    logits = make_case(v=V).teacher_logits().float()
    logits[:, :2] += 200.0
    eye = torch.eye(V)
    wanted = topk_logits(logits.double(), eye.double(), 2)
    errors = top_errors(topk_logits(logits, eye[part.mine], 2, shard=part.shard), wanted)
    return {name: error / 1e6 for name, error in errors.items()}  # float32


def ties(part: Split) -> Errors:
    """The lowest class wins wherever it lies, in `correct`, for an argmax teacher and among the top k."""
    student = torch.zeros(V, V, dtype=F64, requires_grad=True)
    labels = torch.zeros(V, dtype=torch.int64)
    options = LossOptions(teacher_temperature=0.0)
    own = student[:, part.mine]
    result = softmax_kl(own, own.detach(), labels=labels, options=options, shard=part.shard)
    wanted = softmax_kl(student, student.detach(), labels=labels, options=options)
    top = topk_logits(student, torch.eye(V, dtype=F64)[part.mine], V, shard=part.shard)
    in_order = torch.equal(top.ids, torch.arange(V).expand(V, V))
    return {**compare(result, wanted), "all correct": abs(result.correct.item() - V), "ids": 0.0 if in_order else math.inf}


def main(rank: int, folder: str) -> None:
    """One rank: all cases on three ranks, then on the first two. Leaves {world: {case: errors}} in the folder."""
    torch.set_num_threads(1)
    init = Path(folder, "init").as_uri()
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    pair = dist.new_group([0, 1])
    found: dict[int, dict[str, Errors]] = {}
    for group in (dist.group.WORLD, pair):
        if group is None or dist.get_rank(group) < 0:
            continue
        part = split(group)
        world = dist.get_world_size(group)
        found[world] = {name: run(part) for name, run in names(world)}
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()

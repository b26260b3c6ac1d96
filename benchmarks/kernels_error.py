"""How far the losses are from float64: every option in every type, values and gradients, on a CPU.

    python benchmarks/kernels_error.py [--output benchmarks/results/kernels_error.json]

Hidden states and heads are rounded to the type; the reference computes in float64 from the same rounded numbers. A row an option
and type: relative norm of the difference of the loss and of the worst of the three gradients, the largest over five draws.
Gradients come back in the inputs' type, whose rounding is most of what is left: half a unit is 2e-3 of bfloat16, 2e-4 of float16.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megapd.files import write_atomic
from megapd_kernels import (
    JSD,
    AlphaBeta,
    ForwardKL,
    LossOptions,
    ReverseKL,
    SkewedReverseKL,
    distillation_loss,
    linear_distillation_loss,
)
from megapd_kernels.divergences import NAMES

N, V, D, E, K = 64, 2000, 32, 48, 16
DTYPES = ("float32", "bfloat16", "float16")
# Settings of LossOptions, and the form of the teacher.
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    **{name: ({"divergence": name}, "hidden") for name in NAMES},
    "jsd, beta 1e-4": ({"divergence": JSD(1e-4)}, "hidden"),
    "skewed_reverse_kl, skew 0.9": ({"divergence": SkewedReverseKL(0.9)}, "hidden"),
    "alpha_beta (0.5, 0.5)": ({"divergence": AlphaBeta(0.5, 0.5)}, "hidden"),
    "0.7 forward_kl + 0.3 reverse_kl": ({"divergence": 0.7 * ForwardKL() + 0.3 * ReverseKL()}, "hidden"),
    "teacher's logits in the type": ({}, "logits"),
    "temperatures 2, scale_t2": ({"student_temperature": 2.0, "teacher_temperature": 2.0, "scale_t2": True}, "hidden"),
    "alpha 0.5": ({"alpha": 0.5}, "hidden"),
    "labels alone": ({}, "none"),
    "label_smoothing 0.1": ({"label_smoothing": 0.1}, "none"),
    "z_loss 1e-2": ({"z_loss": 1e-2}, "none"),
    "soft_cap 2, both sides": ({"soft_cap": 2.0, "teacher_soft_cap": 2.0}, "hidden"),
    "logit_scale 0.5, both sides": ({"logit_scale": 0.5, "teacher_logit_scale": 0.5}, "hidden"),
    "teacher_top_p 0.9": ({"teacher_top_p": 0.9}, "hidden"),
    "student_top_k 16, reverse_kl": ({"student_top_k": K, "divergence": "reverse_kl"}, "hidden"),
    "reduction none": ({"reduction": "none"}, "hidden"),
    "recompute": ({"recompute": True}, "hidden"),
    **{f"top-k, {name}": ({}, name) for name in ("tail", "renormalised", "support")},
    "sampled": ({}, "sampled"),
    "argmax": ({}, "ids"),
}


def tensors(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    return {
        "hidden": randn(N, D),
        "weight": randn(V, D, scale=2 * D**-0.5),
        "bias": randn(V),
        "teacher_hidden": randn(N, E),
        "teacher_weight": randn(V, E, scale=2 * E**-0.5),
        "labels": torch.randint(V, (N,), generator=generator),
    }


def teacher_of(form: str, x: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(as the loss takes it, as the reference takes it)."""
    logits = x["teacher_hidden"].double() @ x["teacher_weight"].double().T
    if form == "hidden":
        return {name: x[name] for name in ("teacher_hidden", "teacher_weight")}, {"teacher_logits": logits}
    if form == "logits":
        rounded = logits.to(x["hidden"].dtype)
        return {"teacher_logits": rounded}, {"teacher_logits": rounded.double()}
    if form == "none":
        return {}, {}
    if form == "ids":
        return ({"teacher_ids": logits.argmax(1)},) * 2
    logprobs, ids = logits.log_softmax(1).topk(K, 1)
    if form == "sampled":
        ids = torch.multinomial(logits.softmax(1), K, replacement=True, generator=torch.Generator().manual_seed(0))
        logprobs = torch.full_like(ids, 1 / K, dtype=torch.float64).log()
    return ({"teacher_ids": ids, "teacher_logprobs": logprobs, "convention": form},) * 2


def error(settings: dict[str, Any], form: str, dtype: torch.dtype, seed: int) -> tuple[float, float]:
    x = tensors(dtype, seed)
    ours, theirs = teacher_of(form, x)
    options, labels = LossOptions(**settings), {"labels": x["labels"]}
    leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    hidden, weight, bias = leaves
    result = linear_distillation_loss(hidden, weight, bias=bias, **ours, **labels, options=options)
    wanted = distillation_loss(F.linear(*wide), **theirs, **labels, options=options)
    upstream = torch.ones_like(wanted.loss)
    found = torch.autograd.grad(result.loss, leaves, upstream.to(result.loss.dtype))
    expected = torch.autograd.grad(wanted.loss, wide, upstream)
    return relative(result.loss, wanted.loss), max(relative(g, e) for g, e in zip(found, expected, strict=True))


def relative(value: Tensor, wanted: Tensor) -> float:
    return float((value.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels_error.json"))
    arguments = parser.parse_args()
    rows = []
    print("| | " + " | ".join(f"{dtype}: loss | gradient" for dtype in DTYPES) + " |")
    print("|---" * (1 + 2 * len(DTYPES)) + "|")
    for name, (settings, form) in OPTIONS.items():
        cells = []
        for dtype in DTYPES:
            errors = [error(settings, form, getattr(torch, dtype), seed) for seed in range(5)]
            loss, gradient = max(e[0] for e in errors), max(e[1] for e in errors)
            rows.append({"option": name, "dtype": dtype, "loss": loss, "gradient": gradient})
            cells.append(f"{loss:.0e} | {gradient:.0e}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    about = {"date": date.today().isoformat(), "torch": torch.__version__, "shape": [N, V, D, E], "rows": rows}
    write_atomic(arguments.output, json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

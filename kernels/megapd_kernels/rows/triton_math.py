"""What the Triton kernels share: the online log-sum-exp, the shape of logits, the columns of row statistics, the launch shape.

Powers are of two: the hardware has no other, and the factor log2(e) / temperature is folded into one multiplication.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..divergences.triton_functions import LN2, LOG2E, expm1

# The running maximum's start: finite, so that maximum - start never is inf - inf; exp2 of anything minus it is not reached.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Logits below stand for no logit: -inf, or a class that another sum counts.
BANNED = tl.constexpr(-1e30)

# Rows of the statistics float32, C columns each, see base.py for M, L_T and L_1.
MAXIMUM = tl.constexpr(0)  # M
LOG_SUM = tl.constexpr(1)  # L_T
LOG_SUM_ONE = tl.constexpr(2)  # L_1
TEACHER_MAXIMUM = tl.constexpr(3)
TEACHER_LOG_SUM = tl.constexpr(4)
SUM = tl.constexpr(5)  # of the logits, for label smoothing
BEST = tl.constexpr(6)  # column of the largest logit; float32 holds integers up to 2^24
TEACHER_BEST = tl.constexpr(7)
ENTROPY = tl.constexpr(8)  # of the student's softmax at T
TEACHER_ENTROPY = tl.constexpr(9)
MOMENTS = tl.constexpr(10)  # from here on, two a divergence: the sums of its t and u, see ../divergences/base.py


def columns(divergences: int) -> int:
    """Of the statistics, with this many divergences."""
    first: int = MOMENTS.value
    return first + 2 * divergences


def launch_shape(classes: int, *, two_softmaxes: bool = False) -> tuple[int, dict[str, int]]:
    """(columns a program handles at a time, options of the compiler). 8 elements a thread: 16 bytes a load of 16-bit logits.

    The widest sweep holds 8 arrays of them; with a second softmax of the student the reverse KL spills, so that gets 4. Left
    alone, NVIDIA's assembler spills 8-32 bytes in 11 of 528 variants to fit 48 or 64 registers; allowed 128, it spills nothing
    (see kernels-report), and two programs still share a multiprocessor's 65,536.
    """
    block = min(1024 if two_softmaxes else 2048, triton.next_power_of_2(max(16, classes)))
    options = {"num_warps": max(1, min(8, block // 128 if two_softmaxes else block // 256))}
    return block, options if torch.version.hip else {**options, "maxnreg": 128}


@triton.jit
def online(x, maximum, total, factor):
    """One element more in each lane's sum of 2^((x - maximum) factor), with one power an element.

    Returns (new maximum, new sum, what the old sum was multiplied by, the element's own term).
    """
    gap = x - maximum
    grows = gap > 0
    # x = -inf: power 0. NaN: not larger, and its power is NaN, which stays in the sum.
    power = tl.exp2(-tl.abs(gap) * factor)
    kept = tl.where(grows, power, 1.0)
    term = tl.where(grows, 1.0, power)
    return tl.where(grows, x, maximum), total * kept + term, kept, term


@triton.jit
def merge_lanes(maximum, total, factor):
    """(maximum of the lanes, the row's sum relative to it, what each lane's sums are multiplied by)."""
    overall = tl.max(maximum, axis=0)
    kept = tl.exp2((maximum - overall) * factor)
    return overall, tl.sum(total * kept, axis=0), kept


@triton.jit
def store_student(
    statistics,
    stride,
    maximum,  # [BLOCK] lanes
    total,
    total_one,
    logits,
    best,
    factor,
    LABELS: tl.constexpr,
    APART: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Bring the lanes of a row together and store its statistics. Returns (M, log2 of the sums at T and at 1, lanes' factors)."""
    m, z, kept = merge_lanes(maximum, total, factor)
    log_sum = tl.log2(z)
    log_sum_one = log_sum
    if APART:
        _, z_one, _ = merge_lanes(maximum, total_one, LOG2E)
        log_sum_one = tl.log2(z_one)
    tl.store(statistics + MAXIMUM * stride, m)
    tl.store(statistics + LOG_SUM * stride, log_sum * LN2)
    tl.store(statistics + LOG_SUM_ONE * stride, log_sum_one * LN2)
    if LABELS:
        first = tl.min(tl.where(maximum == m, best, 2147483647), axis=0)
        tl.store(statistics + BEST * stride, first.to(tl.float32))
    if SMOOTH:
        tl.store(statistics + SUM * stride, tl.sum(logits, axis=0))
    return m, log_sum, log_sum_one, kept


@triton.jit
def load_student(statistics, stride):
    """(M, log2 of the sums at T and at 1) of a row."""
    log_sum = tl.load(statistics + LOG_SUM * stride) * LOG2E
    log_sum_one = tl.load(statistics + LOG_SUM_ONE * stride) * LOG2E
    return tl.load(statistics + MAXIMUM * stride), log_sum, log_sum_one


@triton.jit
def zero_row(gradient, classes, BLOCK: tl.constexpr):
    """The gradient of a row that does not count: whatever that holds, NaN too, is not read."""
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], gradient.dtype.element_ty)
    for start in range(0, classes, BLOCK):
        tl.store(gradient + start + columns, zeros, mask=start + columns < classes)


@triton.jit
def minus_target(g, columns, label, by_label, everywhere, LABELS: tl.constexpr, SMOOTH: tl.constexpr):
    """The gradient without its target: by_label at the label's column, and `everywhere`."""
    if SMOOTH:
        g -= everywhere
    if LABELS:
        g = tl.where(columns == label, g - by_label, g)
    return g


@triton.jit
def shaped(s, logit_scale, soft_cap, SHAPE: tl.constexpr):
    """The logit that counts of the logit as given: scaled, and for SHAPE 2 capped as cap tanh(s / cap); a banned one stays."""
    z = s
    if SHAPE > 0:
        z = s * logit_scale
        if SHAPE == 2:
            # tanh(x) = e / (e + 2), e = expm1(2 x); beyond 15 it is 1 in float32.
            e = expm1(2.0 * tl.minimum(tl.maximum(z / soft_cap, -15.0), 15.0))
            z = soft_cap * (e / (e + 2.0))
        z = tl.where(s < BANNED, s, z)
    return z


@triton.jit
def unshaped(g, z, logit_scale, soft_cap, SHAPE: tl.constexpr):
    """The gradient with respect to the logit as given, from that of the shaped one z."""
    if SHAPE > 0:
        slope = logit_scale
        if SHAPE == 2:
            slope = logit_scale * (1.0 - (z / soft_cap) * (z / soft_cap))
        g = tl.where(z < BANNED, 0.0, g * slope)
    return g


@triton.jit
def unit(total):
    return 1.0

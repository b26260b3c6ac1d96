"""Triton kernel: rows of the student's logits alone. Cross entropy, and the classes outside a sparse teacher's ids.

For each row, w its weight and c_1 = w (label_share + 2 z (M + L_1)), see rows.py:

    statistics  M, L_T = log sum exp((s - M) / T), L_1, sum s, the column of the largest logit
    gradient    labels alone:     G_j = c_1 e^(s_j - M - L_1) - [j = label] w_label - w_smooth
                sparse teachers:  G_j = outside e^((s_j - M)/T - L_T) + outside_one e^(s_j - M - L_1) - ..., the factors given

Saved: five float32 a row. Bytes moved an element, b those of a logit, g those of a gradient: b for the statistics, b + g for the
gradient; both in one launch where one process has all classes, the second in reverse order, so that its start is still in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..divergences.triton_functions import LN2, LOG2E
from .triton_math import (
    ENTROPY,
    LOWEST,
    load_student,
    minus_target,
    online,
    shaped,
    store_student,
    unshaped,
    zero_row,
)


@triton.jit
def student_rows(
    student,  # [C, V]
    gradient,  # [C, V]
    statistics,  # [columns, C]
    labels,  # [C], within this rank's columns or outside them
    weights,  # [C]
    label_weights,  # [C]
    outside,  # [C], outside_one [C]: factors of the two softmaxes; read if FACTORS
    outside_one,
    scale,  # 0-dim, times the gradient
    student_stride,
    gradient_stride,
    statistics_stride,
    classes,
    temperature,
    logit_scale,
    soft_cap,
    label_share,
    label_factor,  # of w at the label: label_share (1 - smoothing)
    smooth_factor,  # of w everywhere: label_share smoothing / V
    z_loss,
    STATISTICS: tl.constexpr,
    OUTPUTS: tl.constexpr,  # the argmax and the entropy
    GRADIENT: tl.constexpr,
    LABELS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    LABEL_WEIGHTS: tl.constexpr,
    SCALE: tl.constexpr,
    FACTORS: tl.constexpr,
    APART: tl.constexpr,  # a second softmax, at temperature 1
    SMOOTH: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    gradient += row * gradient_stride
    statistics += row
    columns = tl.arange(0, BLOCK)
    weight = 1.0
    if WEIGHTS:
        weight = tl.load(weights + row)
        if weight == 0:
            if GRADIENT:
                zero_row(gradient, classes, BLOCK)
            return
    factor = LOG2E / temperature

    if STATISTICS:
        maximum = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        total_one = tl.zeros([BLOCK], tl.float32)
        logits = tl.zeros([BLOCK], tl.float32)
        best = tl.zeros([BLOCK], tl.int32)
        for start in range(0, classes, BLOCK):
            inside = start + columns < classes
            s = tl.load(student + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            s = shaped(s, logit_scale, soft_cap, SHAPE)
            if LABELS or OUTPUTS:
                best = tl.where(s > maximum, start + columns, best)
            if SMOOTH:
                logits += tl.where(inside, s, 0.0)
            if APART:
                _, total_one, _, _ = online(s, maximum, total_one, LOG2E)
            maximum, total, _, _ = online(s, maximum, total, factor)
        m, log_sum, log_sum_one, _ = store_student(
            statistics, statistics_stride, maximum, total, total_one, logits, best, factor, LABELS or OUTPUTS, APART, SMOOTH
        )
        if OUTPUTS:
            entropy = tl.zeros([BLOCK], tl.float32)
            for start in range(0, classes, BLOCK):
                inside = start + columns < classes
                s = tl.load(student + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
                log2_p = (shaped(s, logit_scale, soft_cap, SHAPE) - m) * factor - log_sum
                p = tl.exp2(log2_p)
                entropy -= tl.where(p == 0, 0.0, p * log2_p)
            tl.store(statistics + ENTROPY * statistics_stride, tl.sum(entropy, axis=0) * LN2)
    else:
        m, log_sum, log_sum_one = load_student(statistics, statistics_stride)

    if GRADIENT:
        if FACTORS:
            c = tl.load(outside + row)
            c_one = 0.0
            if APART:
                c_one = tl.load(outside_one + row)
        else:
            c = weight * (label_share + 2.0 * z_loss * (m + log_sum_one * LN2))
            c_one = 0.0
        if LABEL_WEIGHTS:
            by_label = tl.load(label_weights + row)
            label_factor *= by_label
            if not FACTORS:
                c = weight * (label_share * by_label + 2.0 * z_loss * (m + log_sum_one * LN2))
        c_label = weight * label_factor
        c_smooth = weight * smooth_factor
        if SCALE:
            by = tl.load(scale)
            c *= by
            c_one *= by
            c_label *= by
            c_smooth *= by
        label = -1
        if LABELS:
            label = tl.load(labels + row).to(tl.int32)
        blocks = tl.cdiv(classes, BLOCK)
        for block in range(0, blocks):
            start = (blocks - 1 - block) * BLOCK
            inside = start + columns < classes
            s = tl.load(student + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            s = shaped(s, logit_scale, soft_cap, SHAPE)
            g = c * tl.exp2((s - m) * factor - log_sum)
            if APART:
                g += c_one * tl.exp2((s - m) * LOG2E - log_sum_one)
            g = minus_target(g, start + columns, label, c_label, c_smooth, LABELS, SMOOTH)
            g = unshaped(g, s, logit_scale, soft_cap, SHAPE)
            tl.store(gradient + start + columns, g.to(gradient.dtype.element_ty), mask=inside)

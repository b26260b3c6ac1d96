"""Triton kernel: rows of the student's logits against a dense teacher's.

With a = (s - M) / T, b = (t - M_t) / tau and L_T, L_t the log sums of their exponentials (base.py), log p = a - L_T and
log q = b - L_t. A divergence gives t and u of a class (../divergences/base.py), and with A = sum t, B = sum u

    D = value(A)        dD/da_j = value'(A) (u_j - p_j B)

and G as in base.py. Any number of divergences share the sweeps: one for the log sums, one for A and B, one for the gradient. A KL
alone takes two, as its sum accumulates online with the log sums, from a and b, and its B is known:

    forward_kl          E = sum q (b - a)        D = E - L_t + L_T        B = -1
    soft_cross_entropy  E = sum q (- a)          D = E + L_T              B = -1
    reverse_kl          E = sum p (a - b)        D = E - L_T + L_t        B = D

The last sweep runs in reverse order, so that its start is still in L2.

Saved: ten float32 a row and two a divergence. Bytes moved an element, b those of two logits, g those of a gradient: b a sweep,
+ g for the last; 10 for a KL of bf16 logits. Powers an element: two a sweep, one more for another softmax of the student.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..divergences.triton_functions import LN2, LOG2E
from .triton_math import (
    ENTROPY,
    LOWEST,
    MOMENTS,
    TEACHER_BEST,
    TEACHER_ENTROPY,
    TEACHER_LOG_SUM,
    TEACHER_MAXIMUM,
    load_student,
    merge_lanes,
    minus_target,
    online,
    shaped,
    store_student,
    unshaped,
    zero_row,
)

FORWARD_KL = tl.constexpr(1)
SOFT_CROSS_ENTROPY = tl.constexpr(2)
REVERSE_KL = tl.constexpr(3)


@triton.jit
def moved(x, by, mass):
    """The shift of a moment by `by` times its mass; lanes without mass hold no moment, whatever `by` is."""
    return x + tl.where(mass == 0, 0.0, mass * by)


@triton.jit
def kept_of(x, kept):
    """x times kept, and 0 for 0: an infinite term of a probability that underflows counts for nothing."""
    return tl.where(kept == 0, 0.0, kept * x)


@triton.jit
def load_logits(pointer, start, columns, inside, logit_scale, soft_cap, SHAPE: tl.constexpr):
    s = tl.load(pointer + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
    return shaped(s, logit_scale, soft_cap, SHAPE)


@triton.jit
def dense_rows(
    student,  # [C, V]
    teacher,  # [C, V]
    gradient,  # [C, V]
    statistics,  # [columns, C]
    labels,  # [C], within this rank's columns or outside them
    weights,  # [C]
    label_weights,  # [C]
    scale,  # 0-dim, times the gradient
    student_stride,
    teacher_stride,
    gradient_stride,
    statistics_stride,
    classes,
    temperature,
    teacher_temperature,
    logit_scale,
    soft_cap,
    teacher_scale,
    teacher_cap,
    shares,  # of w for each divergence's dD/da: its weight (1 - alpha) t2 / T
    first_parameters,  # of each divergence
    second_parameters,
    third_parameters,
    label_share,
    label_factor,  # of w at the label: label_share (1 - smoothing)
    smooth_factor,  # of w everywhere: label_share smoothing / V
    z_loss,
    TERMS: tl.constexpr,  # each divergence's t and u
    SLOPES: tl.constexpr,  # and value'
    ONLINE: tl.constexpr,  # one of the KLs alone, or 0
    STATISTICS: tl.constexpr,
    SUMS: tl.constexpr,  # sum t and u of what is not online (else they are read)
    OUTPUTS: tl.constexpr,  # the teacher's argmax and both entropies
    GRADIENT: tl.constexpr,
    LABELS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    LABEL_WEIGHTS: tl.constexpr,
    SCALE: tl.constexpr,
    SHARE: tl.constexpr,  # shares > 0: the gradient of an infinite divergence must not be multiplied by 0
    ONE: tl.constexpr,  # the softmax at temperature 1 has a gradient
    APART: tl.constexpr,  # and is not the divergence's
    SMOOTH: tl.constexpr,
    SHAPE: tl.constexpr,
    TEACHER_SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
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
    teacher_factor = LOG2E / teacher_temperature
    blocks = tl.cdiv(classes, BLOCK)

    if STATISTICS:
        maximum = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        teacher_maximum = tl.full([BLOCK], LOWEST, tl.float32)
        teacher_total = tl.zeros([BLOCK], tl.float32)
        moment = tl.zeros([BLOCK], tl.float32)
        total_one = tl.zeros([BLOCK], tl.float32)
        logits = tl.zeros([BLOCK], tl.float32)
        best = tl.zeros([BLOCK], tl.int32)
        teacher_best = tl.zeros([BLOCK], tl.int32)
        for start in range(0, classes, BLOCK):
            inside = start + columns < classes
            s = load_logits(student, start, columns, inside, logit_scale, soft_cap, SHAPE)
            t = load_logits(teacher, start, columns, inside, teacher_scale, teacher_cap, TEACHER_SHAPE)
            if LABELS or OUTPUTS:
                best = tl.where(s > maximum, start + columns, best)
            if OUTPUTS:
                teacher_best = tl.where(t > teacher_maximum, start + columns, teacher_best)
            if SMOOTH:
                logits += tl.where(inside, s, 0.0)
            if APART:
                _, total_one, _, _ = online(s, maximum, total_one, LOG2E)
            old, teacher_old = maximum, teacher_maximum
            mass, teacher_mass = total, teacher_total
            maximum, total, kept, p = online(s, maximum, total, factor)
            teacher_maximum, teacher_total, teacher_kept, q = online(t, teacher_maximum, teacher_total, teacher_factor)
            # Base 2 until the end. What a larger maximum takes off every earlier term comes off by the mass.
            a, b = (s - maximum) * factor, (t - teacher_maximum) * teacher_factor
            a_moved, b_moved = (old - maximum) * factor, (teacher_old - teacher_maximum) * teacher_factor
            if ONLINE == FORWARD_KL:
                moment = kept_of(moved(moment, b_moved - a_moved, teacher_mass), teacher_kept) + tl.where(
                    q == 0, 0.0, q * (b - a)
                )
            elif ONLINE == SOFT_CROSS_ENTROPY:
                moment = kept_of(moved(moment, -a_moved, teacher_mass), teacher_kept) + tl.where(q == 0, 0.0, q * -a)
            elif ONLINE == REVERSE_KL:
                moment = kept_of(moved(moment, a_moved - b_moved, mass), kept) + tl.where(p == 0, 0.0, p * (a - b))
        m, log_sum, log_sum_one, kept = store_student(
            statistics, statistics_stride, maximum, total, total_one, logits, best, factor, LABELS or OUTPUTS, APART, SMOOTH
        )
        m_t, z_t, teacher_kept = merge_lanes(teacher_maximum, teacher_total, teacher_factor)
        log_sum_t = tl.log2(z_t)
        tl.store(statistics + TEACHER_MAXIMUM * statistics_stride, m_t)
        tl.store(statistics + TEACHER_LOG_SUM * statistics_stride, log_sum_t * LN2)
        if OUTPUTS:
            first_best = tl.min(tl.where(teacher_maximum == m_t, teacher_best, 2147483647), axis=0)
            tl.store(statistics + TEACHER_BEST * statistics_stride, first_best.to(tl.float32))
        if ONLINE > 0:
            a_moved, b_moved = (maximum - m) * factor, (teacher_maximum - m_t) * teacher_factor
            if ONLINE == FORWARD_KL:
                e = tl.sum(kept_of(moved(moment, b_moved - a_moved, teacher_total), teacher_kept), axis=0) / z_t
            elif ONLINE == SOFT_CROSS_ENTROPY:
                e = tl.sum(kept_of(moved(moment, -a_moved, teacher_total), teacher_kept), axis=0) / z_t
            else:
                e = tl.sum(kept_of(moved(moment, a_moved - b_moved, total), kept), axis=0) / tl.exp2(log_sum)
            tl.store(statistics + MOMENTS * statistics_stride, e * LN2)
    else:
        m, log_sum, log_sum_one = load_student(statistics, statistics_stride)
        m_t = tl.load(statistics + TEACHER_MAXIMUM * statistics_stride)
        log_sum_t = tl.load(statistics + TEACHER_LOG_SUM * statistics_stride) * LOG2E
        if ONLINE > 0:
            e = tl.load(statistics + MOMENTS * statistics_stride) * LOG2E

    sums = ()  # (A, B) of each divergence
    if SUMS and (OUTPUTS or ONLINE == 0):
        first = (tl.zeros([BLOCK], tl.float32),) * len(TERMS)
        second = (tl.zeros([BLOCK], tl.float32),) * len(TERMS)
        entropy = tl.zeros([BLOCK], tl.float32)
        teacher_entropy = tl.zeros([BLOCK], tl.float32)
        for start in range(0, classes, BLOCK):
            inside = start + columns < classes
            s = load_logits(student, start, columns, inside, logit_scale, soft_cap, SHAPE)
            t = load_logits(teacher, start, columns, inside, teacher_scale, teacher_cap, TEACHER_SHAPE)
            log2_p, log2_q = (s - m) * factor - log_sum, (t - m_t) * teacher_factor - log_sum_t
            p, q = tl.exp2(log2_p), tl.exp2(log2_q)
            log_p, log_q = log2_p * LN2, log2_q * LN2
            if OUTPUTS:
                entropy -= tl.where(p == 0, 0.0, p * log_p)
                teacher_entropy -= tl.where(q == 0, 0.0, q * log_q)
            if ONLINE == 0:
                new_first, new_second = (), ()
                for i in tl.static_range(len(TERMS)):
                    term, slope = TERMS[i](log_p, log_q, p, q, first_parameters[i], second_parameters[i], third_parameters[i])
                    new_first += (first[i] + tl.where(inside, term, 0.0),)
                    new_second += (second[i] + tl.where(inside, slope, 0.0),)
                first, second = new_first, new_second
        if OUTPUTS:
            tl.store(statistics + ENTROPY * statistics_stride, tl.sum(entropy, axis=0))
            tl.store(statistics + TEACHER_ENTROPY * statistics_stride, tl.sum(teacher_entropy, axis=0))
        if ONLINE == 0:
            for i in tl.static_range(len(TERMS)):
                a_sum, b_sum = tl.sum(first[i], axis=0), tl.sum(second[i], axis=0)
                tl.store(statistics + (MOMENTS + 2 * i) * statistics_stride, a_sum)
                tl.store(statistics + (MOMENTS + 2 * i + 1) * statistics_stride, b_sum)
                sums += ((a_sum, b_sum),)
    elif ONLINE == 0:
        for i in tl.static_range(len(TERMS)):
            a_sum = tl.load(statistics + (MOMENTS + 2 * i) * statistics_stride)
            sums += ((a_sum, tl.load(statistics + (MOMENTS + 2 * i + 1) * statistics_stride)),)

    if GRADIENT:
        c_one = weight * (label_share + 2.0 * z_loss * (m + log_sum_one * LN2))
        if LABEL_WEIGHTS:
            by_label = tl.load(label_weights + row)
            c_one = weight * (label_share * by_label + 2.0 * z_loss * (m + log_sum_one * LN2))
            label_factor *= by_label
        c = weight
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
        # Per divergence: the factor of its slope, and the sum that comes off by p. 0 * A keeps a teacher's NaN.
        factors, centers = (), ()
        if SHARE:
            for i in tl.static_range(len(TERMS)):
                if ONLINE == 0:
                    factors += (c * shares[i] * SLOPES[i](sums[i][0]),)
                    centers += (sums[i][1] + 0.0 * sums[i][0],)
                else:
                    factors += (c * shares[i],)
                    if ONLINE == REVERSE_KL:
                        centers += (tl.maximum((e - log_sum + log_sum_t) * LN2, 0.0) + 0.0 * e,)
                    else:
                        centers += (-1.0,)
        for block in range(0, blocks):
            start = (blocks - 1 - block) * BLOCK
            inside = start + columns < classes
            s = load_logits(student, start, columns, inside, logit_scale, soft_cap, SHAPE)
            g = tl.zeros([BLOCK], tl.float32)
            log2_p = (s - m) * factor - log_sum
            p = tl.exp2(log2_p)
            if SHARE:
                t = load_logits(teacher, start, columns, inside, teacher_scale, teacher_cap, TEACHER_SHAPE)
                log2_q = (t - m_t) * teacher_factor - log_sum_t
                q = tl.exp2(log2_q)
                log_p, log_q = log2_p * LN2, log2_q * LN2
                for i in tl.static_range(len(TERMS)):
                    _, slope = TERMS[i](log_p, log_q, p, q, first_parameters[i], second_parameters[i], third_parameters[i])
                    g += factors[i] * (slope - p * centers[i])
            if ONE:
                if APART:
                    p = tl.exp2((s - m) * LOG2E - log_sum_one)
                g += c_one * p
            g = minus_target(g, start + columns, label, c_label, c_smooth, LABELS, SMOOTH)
            g = unshaped(g, s, logit_scale, soft_cap, SHAPE)
            tl.store(gradient + start + columns, g.to(gradient.dtype.element_ty), mask=inside)

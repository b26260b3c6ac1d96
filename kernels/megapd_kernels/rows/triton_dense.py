"""Triton kernel: rows of the student's logits against a dense teacher's.

With a = (s - M) / T, b = (t - M_t) / tau and L_T, L_t the log sums of their exponentials (base.py), log p = a - L_T and
log q = b - L_t:

    divergence          moments of a row                                   D                         dD/da_j
    forward_kl          E = sum q (b - a)                                  E - L_t + L_T             p - q
    soft_cross_entropy  E = sum q (- a)                                    E + L_T                   p - q
    reverse_kl          E = sum p (a - b)                                  E - L_T + L_t             p (log p - log q - D)
    jsd                 A = sum q log(m / q), B = sum p log(m / p)         -beta A - (1 - beta) B    (1 - beta) p (B - log(m / p))
    tvd                 A = sum |p - q|, B = sum p sign(p - q)             A / 2                     p (sign(p - q) - B) / 2

and G as in base.py. The KLs take two sweeps: E accumulates online with both log sums. JSD and TVD, whose terms need p and q
themselves, take three. The last runs in reverse order, so that its start is still in L2.

Saved: at most nine float32 a row. Bytes moved an element, b those of two logits, g those of a gradient: b a sweep, + g for the
last; 10 for a KL of bf16 logits. Powers an element: two a sweep, one more for another softmax of the student.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_math import (
    LN2,
    LOG2E,
    LOWEST,
    MOMENT,
    SECOND_MOMENT,
    TEACHER_LOG_SUM,
    TEACHER_MAXIMUM,
    expm1,
    load_student,
    log1p,
    merge_lanes,
    minus_target,
    online,
    store_student,
    zero_row,
)

FORWARD_KL = tl.constexpr(0)
SOFT_CROSS_ENTROPY = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
JSD = tl.constexpr(3)
TVD = tl.constexpr(4)
NUMBERS = {"forward_kl": 0, "soft_cross_entropy": 1, "reverse_kl": 2, "jsd": 3, "tvd": 4}


@triton.jit
def moved(x, by, mass):
    """The shift of a moment by `by` times its mass; lanes without mass hold no moment, whatever `by` is."""
    return x + tl.where(mass == 0, 0.0, mass * by)


@triton.jit
def kept_of(x, kept):
    """x times kept, and 0 for 0: an infinite term of a probability that underflows counts for nothing."""
    return tl.where(kept == 0, 0.0, kept * x)


@triton.jit
def jsd_logs(log2_p, log2_q, p, q, beta, log_beta, log_rest):
    """(log(m / q), log(m / p)), with the clamps of divergences.py."""
    d = tl.where((p == 0) & (q == 0), 0.0, (log2_p - log2_q) * LN2)
    d = tl.minimum(tl.maximum(d, -80.0), 80.0)
    m_over_q = tl.maximum(log1p((1.0 - beta) * expm1(d)), log_beta)
    m_over_p = tl.maximum(log1p(beta * expm1(-d)), log_rest)
    return m_over_q, m_over_p


@triton.jit
def sign_of(p, q):
    return tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0))


@triton.jit
def dense_rows(
    student,  # [C, V]
    teacher,  # [C, V]
    gradient,  # [C, V]
    statistics,  # [COLUMNS, C]
    labels,  # [C], within this rank's columns or outside them
    weights,  # [C]
    scale,  # 0-dim, times the gradient
    student_stride,
    teacher_stride,
    gradient_stride,
    statistics_stride,
    classes,
    temperature,
    teacher_temperature,
    share,  # of w for dD/da: (1 - alpha) t2 / T
    label_share,
    label_factor,  # of w at the label: label_share (1 - smoothing)
    smooth_factor,  # of w everywhere: label_share smoothing / V
    z_loss,
    beta,
    log_beta,
    log_rest,  # log(1 - beta)
    DIVERGENCE: tl.constexpr,
    STATISTICS: tl.constexpr,
    MOMENTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    LABELS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SCALE: tl.constexpr,
    SHARE: tl.constexpr,  # share > 0: the gradient of an infinite divergence must not be multiplied by 0
    ONE: tl.constexpr,  # the softmax at temperature 1 has a gradient
    APART: tl.constexpr,  # and is not the divergence's
    SMOOTH: tl.constexpr,
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
        for start in range(0, classes, BLOCK):
            inside = start + columns < classes
            s = tl.load(student + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            t = tl.load(teacher + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            if LABELS:
                best = tl.where(s > maximum, start + columns, best)
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
            if DIVERGENCE == FORWARD_KL:
                moment = kept_of(moved(moment, b_moved - a_moved, teacher_mass), teacher_kept) + tl.where(
                    q == 0, 0.0, q * (b - a)
                )
            elif DIVERGENCE == SOFT_CROSS_ENTROPY:
                moment = kept_of(moved(moment, -a_moved, teacher_mass), teacher_kept) + tl.where(q == 0, 0.0, q * -a)
            elif DIVERGENCE == REVERSE_KL:
                moment = kept_of(moved(moment, a_moved - b_moved, mass), kept) + tl.where(p == 0, 0.0, p * (a - b))
        m, log_sum, log_sum_one, kept = store_student(
            statistics, statistics_stride, maximum, total, total_one, logits, best, factor, LABELS, APART, SMOOTH
        )
        m_t, z_t, teacher_kept = merge_lanes(teacher_maximum, teacher_total, teacher_factor)
        a_moved, b_moved = (maximum - m) * factor, (teacher_maximum - m_t) * teacher_factor
        e = 0.0
        if DIVERGENCE == FORWARD_KL:
            e = tl.sum(kept_of(moved(moment, b_moved - a_moved, teacher_total), teacher_kept), axis=0) / z_t
        elif DIVERGENCE == SOFT_CROSS_ENTROPY:
            e = tl.sum(kept_of(moved(moment, -a_moved, teacher_total), teacher_kept), axis=0) / z_t
        elif DIVERGENCE == REVERSE_KL:
            e = tl.sum(kept_of(moved(moment, a_moved - b_moved, total), kept), axis=0) / tl.exp2(log_sum)
        log_sum_t = tl.log2(z_t)
        tl.store(statistics + TEACHER_MAXIMUM * statistics_stride, m_t)
        tl.store(statistics + TEACHER_LOG_SUM * statistics_stride, log_sum_t * LN2)
        tl.store(statistics + MOMENT * statistics_stride, e * LN2)
    else:
        m, log_sum, log_sum_one = load_student(statistics, statistics_stride)
        m_t = tl.load(statistics + TEACHER_MAXIMUM * statistics_stride)
        log_sum_t = tl.load(statistics + TEACHER_LOG_SUM * statistics_stride) * LOG2E
        e = tl.load(statistics + MOMENT * statistics_stride) * LOG2E

    center = 0.0
    if DIVERGENCE == JSD or DIVERGENCE == TVD:
        if MOMENTS:
            first_sum = tl.zeros([BLOCK], tl.float32)
            second_sum = tl.zeros([BLOCK], tl.float32)
            for start in range(0, classes, BLOCK):
                inside = start + columns < classes
                s = tl.load(student + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
                t = tl.load(teacher + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
                log2_p, log2_q = (s - m) * factor - log_sum, (t - m_t) * teacher_factor - log_sum_t
                p, q = tl.exp2(log2_p), tl.exp2(log2_q)
                if DIVERGENCE == JSD:
                    m_over_q, m_over_p = jsd_logs(log2_p, log2_q, p, q, beta, log_beta, log_rest)
                    first_sum += q * m_over_q
                    second_sum += p * m_over_p
                else:
                    first_sum += tl.abs(p - q)
                    second_sum += p * sign_of(p, q)
            a_sum, b_sum = tl.sum(first_sum, axis=0), tl.sum(second_sum, axis=0)
            tl.store(statistics + MOMENT * statistics_stride, a_sum)
            tl.store(statistics + SECOND_MOMENT * statistics_stride, b_sum)
        else:
            a_sum = tl.load(statistics + MOMENT * statistics_stride)
            b_sum = tl.load(statistics + SECOND_MOMENT * statistics_stride)
        # Their gradients leave q out: 0 * A keeps a teacher's NaN.
        center = b_sum + 0.0 * a_sum
    elif DIVERGENCE == REVERSE_KL:
        center = tl.maximum((e - log_sum + log_sum_t) * LN2, 0.0) + 0.0 * e

    if GRADIENT:
        c = weight * share
        c_one = weight * (label_share + 2.0 * z_loss * (m + log_sum_one * LN2))
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
        for block in range(0, blocks):
            start = (blocks - 1 - block) * BLOCK
            inside = start + columns < classes
            s = tl.load(student + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            g = tl.zeros([BLOCK], tl.float32)
            log2_p = (s - m) * factor - log_sum
            p = tl.exp2(log2_p)
            if SHARE:
                t = tl.load(teacher + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
                log2_q = (t - m_t) * teacher_factor - log_sum_t
                if DIVERGENCE == FORWARD_KL or DIVERGENCE == SOFT_CROSS_ENTROPY:
                    g = p - tl.exp2(log2_q)
                elif DIVERGENCE == REVERSE_KL:
                    g = tl.where(p == 0, 0.0, p * ((log2_p - log2_q) * LN2 - center))
                elif DIVERGENCE == JSD:
                    q = tl.exp2(log2_q)
                    _, m_over_p = jsd_logs(log2_p, log2_q, p, q, beta, log_beta, log_rest)
                    g = (1.0 - beta) * p * (center - m_over_p)
                else:
                    g = 0.5 * p * (sign_of(p, tl.exp2(log2_q)) - center)
                g *= c
            if ONE:
                if APART:
                    p = tl.exp2((s - m) * LOG2E - log_sum_one)
                g += c_one * p
            g = minus_target(g, start + columns, label, c_label, c_smooth, LABELS, SMOOTH)
            tl.store(gradient + start + columns, g.to(gradient.dtype.element_ty), mask=inside)

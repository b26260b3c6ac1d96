"""The divergences in Triton: (log_p, log_q, p, q, x, y, z) -> (t, u) of one class, see base.py. Logarithms may be -inf."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_functions import LOG2E, expm1, log1p, log_sum_share


@triton.jit
def ratio(log_p, log_q, p, q):
    """d = log p - log q within +-80, 0 where both probabilities are: what lies beyond, no sum sees."""
    d = tl.where((p == 0) & (q == 0), 0.0, log_p - log_q)
    return tl.minimum(tl.maximum(d, -80.0), 80.0)


@triton.jit
def sign_of(p, q):
    return tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0))


@triton.jit
def forward_kl(log_p, log_q, p, q, x, y, z):
    return tl.where(q == 0, 0.0, q * (log_q - log_p)), -q


@triton.jit
def soft_cross_entropy(log_p, log_q, p, q, x, y, z):
    return tl.where(q == 0, 0.0, -q * log_p), -q


@triton.jit
def reverse_kl(log_p, log_q, p, q, x, y, z):
    term = tl.where(p == 0, 0.0, p * (log_p - log_q))
    return term, term


@triton.jit
def jsd(log_p, log_q, p, q, x, y, z):
    """x = beta within [0.05, 0.95], where log1p(beta expm1(-d)) keeps the digits of 1 - beta."""
    d = ratio(log_p, log_q, p, q)
    m_over_q = log1p((1.0 - x) * expm1(d))
    m_over_p = log1p(x * expm1(-d))
    slope = (x - 1.0) * p * m_over_p
    return slope - x * q * m_over_q, slope


@triton.jit
def jsd_ends(log_p, log_q, p, q, x, y, z):
    """x = beta, any."""
    d = ratio(log_p, log_q, p, q)
    slope = (x - 1.0) * p * log_sum_share(d, x, 1.0 - x)
    return slope - x * q * log_sum_share(-d, 1.0 - x, x), slope


@triton.jit
def tvd(log_p, log_q, p, q, x, y, z):
    return 0.5 * tl.abs(p - q), 0.5 * p * sign_of(p, q)


@triton.jit
def lk(log_p, log_q, p, q, x, y, z):
    return tl.minimum(p, q), -0.5 * p * sign_of(p, q)


@triton.jit
def minus_reciprocal(total):
    return -1.0 / total


@triton.jit
def skewed_forward_kl(log_p, log_q, p, q, x, y, z):
    m_over_q = log_sum_share(-ratio(log_p, log_q, p, q), 1.0 - x, x)
    return -q * m_over_q, (x - 1.0) * p * expm1(-m_over_q)


@triton.jit
def skewed_reverse_kl(log_p, log_q, p, q, x, y, z):
    v = -log_sum_share(ratio(log_p, log_q, p, q), 1.0 - x, x)
    return p * v, p * (v - x * expm1(v))


@triton.jit
def alpha_beta(log_p, log_q, p, q, x, y, z):
    """x = alpha, y = beta."""
    both = x + y
    q_both, p_both = tl.exp2(both * LOG2E * log_q), tl.exp2(both * LOG2E * log_p)
    mixed = tl.exp2((x * log_q + y * log_p) * LOG2E)
    term = (x * q_both + y * p_both - both * mixed) / (x * y * both)
    d = tl.where(log_p == log_q, 0.0, log_p - log_q)
    size = tl.exp2((x * tl.maximum(log_p, log_q) + y * log_p) * LOG2E)
    return term, size * expm1(-x * tl.abs(d)) * tl.where(d > 0, -1.0, 1.0) / x

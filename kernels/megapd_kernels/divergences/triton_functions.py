"""Elementary functions that Triton lacks or rounds badly. Powers are of two: the hardware has no other."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def expm1(x):
    """exp(x) - 1 to 2e-7 relative: Taylor's series to x^8 for |x| < 1/2, where the difference would lose digits."""
    series = 1.0 + x * (1.0 / 8.0)
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) to 2e-7 relative: 2 artanh(x / (2 + x)) by its series for |x| < 1/2."""
    z = x / (2.0 + x)
    z2 = z * z
    series = 1.0 / 11.0 + z2 * (1.0 / 13.0)
    series = 1.0 / 9.0 + z2 * series
    series = 1.0 / 7.0 + z2 * series
    series = 1.0 / 5.0 + z2 * series
    series = 1.0 / 3.0 + z2 * series
    series = 1.0 + z2 * series
    return tl.where(tl.abs(x) < 0.5, 2.0 * z * series, tl.log2(1.0 + x) * LN2)


@triton.jit
def log_sum_share(d, share, rest):
    """log(rest + share e^-d), share + rest = 1, d within +-80: log1p keeps the digits near 0, the sum those of a small rest."""
    near = log1p(share * expm1(-d))
    return tl.where((tl.abs(d) < 0.5) | (share <= 0.5), near, tl.log2(rest + share * tl.exp2(-d * LOG2E)) * LN2)

"""Rotary positions: Su et al. 2021, in the order of GPT-NeoX's code.

Shape suffixes: B samples, H heads, L tokens, E width of a head, R features of it that turn.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, rotated: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cosine and sine [1 or B, 1, L, R] of positions [1 or B, L]: features i and i + R / 2 turn by position * theta^(-2 i / R),
    section 3.4.2. Angles are in fp32, whatever the dtype of the result."""
    exponents = torch.arange(0, rotated, 2, device=positions.device, dtype=torch.float32) / rotated
    angles = positions[:, None, :, None].float() * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[B, H, L, E], its first R features turned by their positions."""
    rotated = cosine.shape[-1]
    turned, rest = x[..., :rotated], x[..., rotated:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)


def within_documents(segments_BL: Tensor) -> Tensor:
    """The position of each token in its document [B, L] int64."""
    places = torch.arange(segments_BL.shape[1], device=segments_BL.device).expand_as(segments_BL)
    begins = torch.ones_like(segments_BL, dtype=torch.bool)
    begins[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values

"""Attention: which keys each query sees, and rotary positions. One function, `visible`, chooses how that is told:

    all keys, or all up to itself    no mask, which is what scaled dot product attention is fastest at
    all but a row's padding          a mask [B, 1, 1, L]; a causal query sees no padding, for that comes last
    documents, or near keys alone    a dense mask [B, 1, L, L]; with model.attention: flex, on a GPU, the blocks of 128 x 128 in
                                     which a query has something to see, for FlexAttention (Dong et al. 2024), which skips the
                                     others

Shape suffixes: B samples, L tokens a sample, H heads, E width of a head, R features of it that turn, N blocks of a
row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask | None"

BLOCK = 128  # FlexAttention's own size of a block
FLEX_DEVICES = ("cuda",)  # on a CPU it forms all scores, as slowly as a dense mask, or knows no backward
_PADDING = torch.iinfo(torch.int64).max  # the number of the document that a row's padding is


def visible(
    ids_BL: Tensor,
    segments_BL: Tensor | None,
    lengths_B: Tensor | None,
    *,
    causal: bool,
    reach: int | None = None,
    flex: bool = False,
) -> Mask:
    """Which keys each query of a batch sees, for `attend`: those of its document that are no padding, if causal none that is
    later, and with `reach` none that is more places away. Padding sees something too, so that no softmax is empty.

    segments, lengths: as in megapd.batch. flex: whether FlexAttention may do it.
    """
    batch, length = ids_BL.shape
    if reach is not None and length - 1 <= reach:
        reach = None
    if segments_BL is None and reach is None:
        return None if causal or lengths_B is None else ~padding_of(ids_BL, lengths_B)[:, None, None]
    one_BL = ids_BL.new_zeros(1, length) if segments_BL is None else segments_BL
    documents_BL = padding_apart(one_BL, lengths_B)
    if flex and ids_BL.device.type in FLEX_DEVICES:
        return block_mask(documents_BL.expand(batch, -1), causal=causal, reach=reach)
    return dense_mask(documents_BL, causal=causal, reach=reach)


def attend(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, mask: Mask, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the keys that `mask` shows; None: all, or if causal all up to the query."""
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=mask, is_causal=causal and mask is None)
    mixed_BHLE: Tensor = _flex(compiled=q_BHLE.is_cuda)(q_BHLE, k_BHLE, v_BHLE, block_mask=mask)
    return mixed_BHLE


def padding_of(ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
    """[B, L] bool, True where a token pads its row."""
    return torch.arange(ids_BL.shape[1], device=ids_BL.device) >= lengths_B[:, None]


def padding_apart(segments_BL: Tensor, lengths_B: Tensor | None) -> Tensor:
    """Segments [B, L] in which the padding of each row, where there is any, is a document of its own."""
    if lengths_B is None:
        return segments_BL
    return segments_BL.expand(len(lengths_B), -1).masked_fill(padding_of(segments_BL, lengths_B), _PADDING)


def dense_mask(documents_BL: Tensor, *, causal: bool, reach: int | None = None) -> Tensor:
    """[B, 1, L, L] bool: True where query (row) and key (column) are of one document, the key not later if causal, and at most
    `reach` places away."""
    mask_BLL: Tensor = documents_BL[:, :, None] == documents_BL[:, None, :]
    if causal:
        mask_BLL = mask_BLL.tril()
    if reach is not None:
        places = torch.arange(documents_BL.shape[1], device=documents_BL.device)
        mask_BLL = mask_BLL & ((places[:, None] - places).abs() <= reach)
    return mask_BLL[:, None]


def block_mask(documents_BL: Tensor, *, causal: bool, reach: int | None = None) -> BlockMask:
    """What `dense_mask` says, for FlexAttention, without forming it.

    Documents lie one after the other, so the lowest and the highest number of a block's documents tell which other blocks share
    one: a few small operations on [B, N, N], where torch's create_block_mask asks about every pair of tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = documents_BL.shape[1]
    blocks = -(-length // BLOCK)
    filled = torch.cat([documents_BL, documents_BL[:, -1:].expand(-1, blocks * BLOCK - length)], dim=1)
    low, high = filled.view(-1, blocks, BLOCK).aminmax(dim=2)
    some_BNN = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    single = low == high
    whole_BNN = single[:, :, None] & single[:, None, :] & (low[:, :, None] == low[:, None, :])
    if length % BLOCK:
        whole_BNN[:, :, -1] = whole_BNN[:, -1] = False
    numbers = torch.arange(blocks, device=documents_BL.device)
    later = numbers[:, None] - numbers
    if causal:
        some_BNN, whole_BNN = some_BNN & (later >= 0), whole_BNN & (later > 0)
    if reach is not None:  # the nearest places of two blocks, and the farthest
        apart = later.abs() * BLOCK
        some_BNN, whole_BNN = some_BNN & (apart - BLOCK + 1 <= reach), whole_BNN & (apart + BLOCK - 1 <= reach)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = documents_BL[batch, query] == documents_BL[batch, key]
        if causal:
            seen = seen & (key <= query)
        return seen if reach is None else seen & ((query - key).abs() <= reach)

    kept: Any = BlockMask.from_kv_blocks(
        *_listed(some_BNN & ~whole_BNN), *_listed(whole_BNN), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )
    return kept  # type: ignore[no-any-return]


def _listed(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has [B, 1, N], and which, those first [B, 1, N, N]."""
    order = torch.argsort(blocks_BNN.int(), dim=-1, descending=True, stable=True)
    return blocks_BNN.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _flex(*, compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention import flex_attention

    found: Callable[..., Any] = flex_attention.flex_attention
    return _compiled_flex() if compiled and not torch.compiler.is_compiling() else found


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(_flex(compiled=False))


# --------------------------------------------------------------------------------------------------------- rotary positions


def rotary_table(positions: Tensor, rotated: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cosine and sine [1 or B, 1, L, R] of positions [1 or B, L]: features i and i + R / 2 turn by position * theta^(-2 i / R),
    Su et al. 2021, section 3.4.2, in the order of GPT-NeoX's code. Angles are in fp32, whatever the dtype of the result."""
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

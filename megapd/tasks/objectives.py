"""What is predicted of rows of tokens: masked tokens, or the next one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megapd.config import SequenceConfig
from megapd.rng import Stream, below, bits, scale

_LOW_HALF = np.uint64(32)


class Rows(NamedTuple):
    """Rows of tokens without an objective, as metrics need them.

    ids       [B, L] int64
    lengths   [B] int64, tokens of each row; padded: whether any is shorter than L
    segments  [B, L] int64, or None
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    segments: NDArray[np.int64] | None

    @property
    def padded(self) -> bool:
        return bool((self.lengths < self.ids.shape[1]).any())


Targets = tuple[NDArray[np.int64], NDArray[np.int64]]  # positions [N] in the flattened rows, and their labels [N]


class Masking:
    """Masked prediction: each eligible position is selected with probability mask_rate; of the selected, mask_token_share become
    the mask token, random_token_share a token drawn from the ordinary ones, the rest stay.

    A position's draws depend on the seed, on what keys its row and on its place alone.
    """

    def __init__(self, task: SequenceConfig, token: int, ordinary: NDArray[np.int64]) -> None:
        self._task, self.token, self._ordinary = task, token, ordinary

    def __call__(
        self, ids: NDArray[np.int64], eligible: NDArray[np.bool_], rows: NDArray[np.int64], seed: int, *, heldout: bool
    ) -> Targets:
        """Overwrites `ids` [B, L] with its masked version; returns selected positions and the ids they had. rows: the index of
        each row's draws [B]. heldout: from other streams than training's."""
        select = Stream.SELECT_HELDOUT if heldout else Stream.SELECT_TRAIN
        replace = Stream.REPLACE_HELDOUT if heldout else Stream.REPLACE_TRAIN
        words = bits(seed, select, rows[:, None], np.arange(ids.shape[1]))
        positions = np.flatnonzero(below(words, self._task.mask_rate) & eligible)
        flat = ids.reshape(-1)
        labels = flat[positions]
        row, column = np.divmod(positions, ids.shape[1])
        # One word a selected position: its high half chooses the token, its low half what becomes of the position.
        words = bits(seed, replace, rows[row], column)
        action = words << _LOW_HALF
        masked = below(action, self._task.mask_token_share)
        randomised = below(action, min(1.0, self._task.mask_token_share + self._task.random_token_share)) & ~masked
        flat[positions[masked]] = self.token
        flat[positions[randomised]] = self._ordinary[scale(words[randomised], len(self._ordinary))]
        return positions, labels


def next_tokens(ids: NDArray[np.int64], predicts: NDArray[np.bool_]) -> Targets:
    """Of the places [B, L] that predict, none of them the last of a row: those, and the ids that follow them."""
    positions = np.flatnonzero(predicts)
    return positions, ids.reshape(-1)[positions + 1]

"""What every task offers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megapd.batch import Batch


class Task(Protocol):
    """Batches as pure functions of (configuration, step): ranks and micro-batches only choose which rows they ask for.

    vocab_size           input token ids are in range(vocab_size)
    classes              outputs of the head; labels are in range(classes)
    length               tokens a sample
    labelled_per_sample  expected labelled positions a sample
    data_digest          hexadecimal sha256 of all that batches are made from beside the configuration; a resumed run must agree
    vocabulary_digest    hexadecimal sha256 of what ids and classes mean; teacher and student must agree on it
    heldout_samples      how many held-out samples there are
    """

    vocab_size: int
    classes: int
    length: int
    labelled_per_sample: float
    vocabulary_digest: str
    data_digest: str
    heldout_samples: int

    def batch(self, step: int, rows: range) -> Batch:
        """Rows [rows.start, rows.stop) of the global batch of `step` (from 0); sample ids are step * global_batch + row."""
        ...

    def heldout(self, rows: range) -> Batch:
        """Held-out samples [rows.start, rows.stop), the same for every seed and step; sample ids are -1 - row."""
        ...


def training_samples(step: int, rows: range, global_batch: int) -> NDArray[np.int64]:
    """Sample ids [len(rows)] of some rows of a step's global batch."""
    assert step >= 0
    assert rows.step == 1
    assert 0 <= rows.start <= rows.stop <= global_batch, f"{rows} of a global batch of {global_batch}"
    return np.arange(rows.start, rows.stop, dtype=np.int64) + step * global_batch


def heldout_rows(rows: range, available: int) -> NDArray[np.int64]:
    """Row numbers [len(rows)] of held-out samples."""
    assert rows.step == 1
    assert 0 <= rows.start <= rows.stop <= available, f"{rows} of {available} held-out samples"
    return np.arange(rows.start, rows.stop, dtype=np.int64)

"""Tasks: (configuration, step) -> Batch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megapd.batch import Batch
from megapd.config import Config
from megapd.errors import UserError

WIDTH_STEP = 16  # few widths, and so few shapes to compile


class Task(Protocol):
    """Batches as pure functions of (configuration, step): ranks and micro-batches only choose which rows they ask for.

    vocab_size           input token ids are in range(vocab_size)
    classes              outputs of the head; labels are in range(classes)
    length               tokens a sample, at most; a task whose rows are shorter has tokens_per_sample, the expected number, too
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


def tokens_per_sample(task: Task) -> float:
    """Expected tokens a sample, without padding: what the task says of itself by this name, else its length."""
    return float(getattr(task, "tokens_per_sample", task.length))


def row_width(lengths: NDArray[np.int64], most: int) -> int:
    """How far rows of `lengths` are padded: to the longest, up to a multiple of WIDTH_STEP, and at most to `most`."""
    longest = int(lengths.max(initial=1))
    return min(most, -(-longest // WIDTH_STEP) * WIDTH_STEP)


def build_task(config: Config) -> Task:
    """The task of a run. Raises UserError where text has no fitting corpus, or a corpus no task that reads it."""
    if "corpus" in config.model_fields_set and "task" not in config.model_fields_set:
        what = "the configuration has a corpus, and no task that would read it"
        raise UserError(f"task: {what}; add task: {{kind: text, objective: mlm}} for BERT, or clm for GPT")
    task: Task = config.task.build(config.seed, config.training.global_batch, config.corpus.output)
    return task


def row_numbers(rows: range, available: int) -> NDArray[np.int64]:
    """Numbers [len(rows)] of rows of a global batch, or of held-out samples, of which `available` there are."""
    assert rows.step == 1
    assert 0 <= rows.start <= rows.stop <= available, f"{rows} of {available} rows"
    return np.arange(rows.start, rows.stop, dtype=np.int64)


def training_samples(step: int, rows: range, global_batch: int) -> NDArray[np.int64]:
    """Sample ids [len(rows)] of some rows of a step's global batch."""
    assert step >= 0
    return row_numbers(rows, global_batch) + step * global_batch


def to_batch(
    ids: NDArray[np.int64],
    segments: NDArray[np.int64] | None,
    positions: NDArray[np.int64],
    labels: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    lengths: NDArray[np.int64] | None = None,
) -> Batch:
    """The Batch of these arrays, on their memory."""
    documents, counted = (None if each is None else torch.from_numpy(each) for each in (segments, lengths))
    where, what, which = map(torch.from_numpy, (positions, labels, sample_ids))
    return Batch(torch.from_numpy(ids), documents, where, what, which, counted)

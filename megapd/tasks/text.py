"""Masked and next-token prediction over a prepared corpus; a sample is one block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megapd import config as settings
from megapd.batch import Batch
from megapd.errors import UserError
from megapd.rng import Stream, bits, permute
from megapd.tasks import row_numbers, row_width, to_batch, training_samples
from megapd.tasks.blocks import ROWS_FORMAT, Split, content_digest, read_meta, token_roles
from megapd.tasks.objectives import Masking, Rows, next_tokens

STYLES = {"mlm": "bert", "clm": "gpt"}
HELDOUT_SEED = 0  # the held-out masks are the same for every run, whatever its seed


class TextTask:
    """Sample s is block permute(s mod n) of epoch s div n, n the training blocks; each epoch has a permutation of its own. Of a
    corpus packed single, blocks are rows of several lengths.

    mlm  see Masking; special tokens are never selected. All positions stay visible to attention. Labels are the original ids at
         the selected positions, of which a row may have none.
    clm  positions 0 .. L-2 predict the next token; with document_mask, not where the next token begins another document.
    """

    def __init__(self, task: settings.TextConfig, folder: Path, seed: int, global_batch: int) -> None:
        """Raises UserError where `folder` holds no corpus, a damaged one, or one of the other objective's style."""
        meta = read_meta(folder)
        style, wanted = meta["tokenizer"]["style"], STYLES[task.objective]
        if style != wanted:
            needs = f"task.objective: {task.objective} needs a corpus of corpus.tokenizer.style {wanted}"
            raise UserError(f"{needs}, but {folder} has {style}; run `megapd prepare` with that style and another corpus.output")
        self._train, self._heldout = Split(folder, meta, "train"), Split(folder, meta, "heldout", shuffled=True)
        self._task, self._seed, self._global_batch = task, seed, global_batch
        self.vocab_size = self.classes = int(meta["tokenizer"]["vocab_size"])
        self.length = self._train.length
        self.vocabulary_digest: str = meta["tokenizer"]["digest"]
        self.data_digest = content_digest(meta)
        self.heldout_samples = len(self._heldout)
        special = np.zeros(self.vocab_size, dtype=np.bool_)
        special[list(meta["tokenizer"]["special"].values())] = True
        special[meta["tokenizer"].get("tokens", self.vocab_size) :] = True  # rows that pad the vocabulary stand for nothing
        self.special, self._masking = special, None
        if task.objective == "mlm":
            mask_token = token_roles(meta)["mask"]
            assert mask_token is not None, "style bert has a mask token"
            self._masking = Masking(task, mask_token, np.flatnonzero(~special))
        self._rows = meta["format"] == ROWS_FORMAT
        self.tokens_per_sample = self.length - meta["train"].get("padding", 0) / len(self._train)
        if task.objective == "mlm":
            special_tokens = meta["train"]["special_tokens"] / len(self._train)
            self.labelled_per_sample = task.mask_rate * (self.tokens_per_sample - special_tokens)
        else:
            boundaries = meta["train"]["boundaries"] / len(self._train) if task.document_mask else 0.0
            self.labelled_per_sample = self.tokens_per_sample - 1 - boundaries

    def batch(self, step: int, rows: range) -> Batch:
        samples = training_samples(step, rows, self._global_batch)
        epoch, within = np.divmod(samples, len(self._train))
        blocks = permute(within, len(self._train), bits(self._seed, Stream.ORDER, epoch))
        return self._build(self._train, blocks, samples, samples, heldout=False)

    def heldout(self, rows: range | NDArray[np.int64]) -> Batch:
        numbers = row_numbers(rows, self.heldout_samples) if isinstance(rows, range) else rows
        return self._build(self._heldout, numbers, -1 - numbers, numbers, heldout=True)

    def heldout_by_source(self, samples: int) -> dict[str, NDArray[np.int64]]:
        """The numbers of the first `samples` held-out samples, by the name of the source that they are of."""
        numbers = np.arange(samples)
        owners = self._heldout.source_of(numbers)
        return {name: numbers[owners == place] for place, (name, _) in enumerate(self._heldout.sources)}

    @property
    def mask_token(self) -> int | None:
        """None: nothing is masked."""
        return None if self._masking is None else self._masking.token

    def heldout_rows(self, rows: range) -> Rows:
        """Held-out samples as they are stored."""
        return self._read(self._heldout, row_numbers(rows, self.heldout_samples))

    def _read(self, source: Split, rows: NDArray[np.int64]) -> Rows:
        ids = source.ids(rows)
        if self._rows:  # a document each, so there is nothing else to keep apart
            lengths = np.count_nonzero(source.segments(rows) == 0, axis=1)
            return Rows(np.ascontiguousarray(ids[:, : row_width(lengths, self.length)]), lengths, None)
        segments = source.segments(rows) if self._task.document_mask else None
        return Rows(ids, np.full(len(ids), self.length), segments)

    def _build(
        self, source: Split, rows: NDArray[np.int64], sample_ids: NDArray[np.int64], draws: NDArray[np.int64], *, heldout: bool
    ) -> Batch:
        """rows: blocks of `source` [B]; draws: the index of each row's random numbers [B]."""
        ids, lengths, segments = self._read(source, rows)
        counted = np.arange(ids.shape[1]) < lengths[:, None] if self._rows else None
        if self._masking is not None:
            seed = HELDOUT_SEED if heldout else self._seed
            eligible = ~self.special[ids]
            if counted is not None:
                eligible &= counted
            positions, labels = self._masking(ids, eligible, draws, seed, heldout=heldout)
        else:
            predicts = np.zeros(ids.shape, dtype=np.bool_)
            predicts[:, :-1] = True if counted is None else counted[:, 1:]
            if segments is not None:
                predicts[:, :-1] &= segments[:, 1:] == segments[:, :-1]
            positions, labels = next_tokens(ids, predicts)
        return to_batch(ids, segments, positions, labels, sample_ids, lengths if self._rows else None)

"""Masked and next-token prediction over a prepared corpus; a sample is one block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megapd import config as settings
from megapd.batch import Batch
from megapd.errors import UserError
from megapd.rng import Stream, below, bits, permute, scale
from megapd.tasks import row_numbers, row_width, to_batch, training_samples
from megapd.tasks.blocks import ROWS_FORMAT, Split, content_digest, read_meta, token_roles

STYLES = {"mlm": "bert", "clm": "gpt"}
HELDOUT_SEED = 0  # the held-out masks are the same for every run, whatever its seed
_LOW_HALF = np.uint64(32)


class TextTask:
    """Sample s is block permute(s mod n) of epoch s div n, n the training blocks; each epoch has a permutation of its own. Of a
    corpus packed single, blocks are rows of several lengths.

    mlm  every ordinary position is selected with probability mask_rate; of the selected, mask_token_share become the mask token,
         random_token_share a token drawn from the ordinary ones, the rest stay. Special tokens are never selected. All
         positions stay visible to attention. Labels are the original ids at the selected positions, of which a row may have none.
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
        self._special, self._ordinary = special, np.flatnonzero(~special)
        self._mask_token = token_roles(meta)["mask"]
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
        return self._build(self._train, blocks, samples, samples, self._seed, Stream.SELECT_TRAIN, Stream.REPLACE_TRAIN)

    def heldout(self, rows: range | NDArray[np.int64]) -> Batch:
        numbers = row_numbers(rows, self.heldout_samples) if isinstance(rows, range) else rows
        streams = (Stream.SELECT_HELDOUT, Stream.REPLACE_HELDOUT)
        return self._build(self._heldout, numbers, -1 - numbers, numbers, HELDOUT_SEED, *streams)

    def heldout_by_source(self, samples: int) -> dict[str, NDArray[np.int64]]:
        """The numbers of the first `samples` held-out samples, by the name of the source that they are of."""
        numbers = np.arange(samples)
        owners = self._heldout.source_of(numbers)
        return {name: numbers[owners == place] for place, (name, _) in enumerate(self._heldout.sources)}

    def _build(
        self,
        source: Split,
        rows: NDArray[np.int64],
        sample_ids: NDArray[np.int64],
        draws: NDArray[np.int64],
        seed: int,
        select: Stream,
        replace: Stream,
    ) -> Batch:
        """rows: blocks of `source` [B]; draws: the index of each row's random numbers [B]."""
        ids = source.ids(rows)
        segments = source.segments(rows) if self._task.document_mask or self._rows else None
        lengths = None
        if self._rows and segments is not None:  # a document each, so there is nothing else to keep apart
            lengths, segments = np.count_nonzero(segments == 0, axis=1), None
            ids = np.ascontiguousarray(ids[:, : row_width(lengths, self.length)])
        if self._task.objective == "mlm":
            positions, labels = self._mask(ids, lengths, draws, seed, select, replace)
        else:
            positions, labels = self._shift(ids, segments, lengths)
        return to_batch(ids, segments, positions, labels, sample_ids, lengths)

    def _mask(
        self,
        ids: NDArray[np.int64],
        lengths: NDArray[np.int64] | None,
        draws: NDArray[np.int64],
        seed: int,
        select: Stream,
        replace: Stream,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Overwrites `ids` [B, L] with its masked version; returns selected positions [N] and the ids they had [N]."""
        places = np.arange(ids.shape[1])
        words = bits(seed, select, draws[:, None], places)
        selected = below(words, self._task.mask_rate) & ~self._special[ids]
        if lengths is not None:
            selected &= places < lengths[:, None]
        positions = np.flatnonzero(selected)
        flat = ids.reshape(-1)
        labels = flat[positions]
        row, column = np.divmod(positions, ids.shape[1])
        # One word a selected position: its high half chooses the token, its low half what becomes of the position.
        words = bits(seed, replace, draws[row], column)
        action = words << _LOW_HALF
        masked = below(action, self._task.mask_token_share)
        randomised = below(action, min(1.0, self._task.mask_token_share + self._task.random_token_share)) & ~masked
        assert self._mask_token is not None, "style bert has a mask token"
        flat[positions[masked]] = self._mask_token
        flat[positions[randomised]] = self._ordinary[scale(words[randomised], len(self._ordinary))]
        return positions, labels

    def _shift(
        self, ids: NDArray[np.int64], segments: NDArray[np.int64] | None, lengths: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        predicts = np.zeros(ids.shape, dtype=np.bool_)
        predicts[:, :-1] = True if segments is None else segments[:, 1:] == segments[:, :-1]
        if lengths is not None:
            predicts &= np.arange(ids.shape[1]) < lengths[:, None] - 1
        positions = np.flatnonzero(predicts)
        return positions, ids.reshape(-1)[positions + 1]

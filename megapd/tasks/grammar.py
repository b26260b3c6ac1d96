"""Masked and next-token prediction over the sentences of a context-free grammar; a sample is one sentence."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megapd import config as settings
from megapd.batch import Batch
from megapd.rng import Stream, bits, permute
from megapd.tasks import row_numbers, row_width, to_batch, training_samples
from megapd.tasks.grammars import TERMINALS, Draw, Sentences, named_grammar
from megapd.tasks.objectives import Masking, Rows, next_tokens


class GrammarTask:
    """Sample s is sentence s of the run's own stream of sentences, which never ends; or of task.sentences that all runs share,
    sentence permute(s mod n) of epoch s div n. Held-out sentences are of a stream of their own, with masks of their own.

    Ids: the terminals 1-3 as 0-2, then the token that opens each row, then the mask token. Rows are padded to the longest of the
    batch. With task.boundaries only tokens that end a symbol of one of those levels are predicted.
    """

    def __init__(self, task: settings.GrammarConfig, seed: int, global_batch: int) -> None:
        self.grammar = named_grammar(task.grammar, task.root)
        self._task, self._seed, self._global_batch = task, seed, global_batch
        self._opener = TERMINALS if task.bos else None
        masked = task.objective == "mlm"
        self.vocab_size = self.classes = TERMINALS + task.bos + masked
        self._masking = Masking(task, self.vocab_size - 1, np.arange(TERMINALS)) if masked else None
        self.length, self.tokens_per_sample = self.grammar.longest + task.bos, self.grammar.mean + task.bos
        # Where a symbol of some level ends one of the level below ends too, so the lowest level counts.
        predicted = self.grammar.nodes[min(task.boundaries) - 1] if task.boundaries else self.grammar.mean
        first = 0.0 if masked or task.bos or task.boundaries else 1.0  # without an opener nothing predicts the first token
        self.labelled_per_sample = (predicted - first) * (task.mask_rate if masked else 1.0)
        self.heldout_samples = task.heldout_samples
        words = {"terminals": TERMINALS, "bos": task.bos, "objective": task.objective}
        self.vocabulary_digest = _digest({**words, "grammar": task.grammar, "root": task.root})
        self.data_digest = _digest(task.model_dump(mode="json"))

    def batch(self, step: int, rows: range) -> Batch:
        samples = training_samples(step, rows, self._global_batch)
        return self._build(self.sentences(samples, trees=bool(self._task.boundaries)), samples, samples, heldout=False)

    def heldout(self, rows: range) -> Batch:
        numbers = row_numbers(rows, self.heldout_samples)
        return self._build(
            self.heldout_sentences(numbers, trees=bool(self._task.boundaries)), -1 - numbers, numbers, heldout=True
        )

    def sentences(self, samples: NDArray[np.int64], *, trees: bool) -> Sentences:
        """Those of training samples [B]."""
        seed, numbers = self._seed, samples
        if self._task.sentences is not None:
            epoch, within = np.divmod(samples, self._task.sentences)
            seed, numbers = self._task.seed, permute(within, self._task.sentences, bits(self._seed, Stream.ORDER, epoch))
        return self.grammar.grow(numbers, _draw(seed, Stream.GRAMMAR_TRAIN), trees=trees)

    def heldout_sentences(self, numbers: NDArray[np.int64], *, trees: bool) -> Sentences:
        """Those of held-out samples [B]: the same for every run with this task.seed."""
        return self.grammar.grow(numbers, _draw(self._task.seed, Stream.GRAMMAR_HELDOUT), trees=trees)

    @property
    def mask_token(self) -> int | None:
        """None: nothing is masked."""
        return None if self._masking is None else self._masking.token

    @property
    def special(self) -> NDArray[np.bool_]:
        """[vocab_size], which ids are no terminals."""
        return np.arange(self.vocab_size) >= TERMINALS

    @property
    def predicts_at(self) -> int:
        """Where in its sentence a token lies that a labelled position predicts, less the position's place in its row."""
        return int(self._masking is None) - int(self._opener is not None)

    def heldout_rows(self, rows: range) -> Rows:
        """Held-out samples without masks."""
        return self._opened(self.heldout_sentences(row_numbers(rows, self.heldout_samples), trees=False))

    def _opened(self, grown: Sentences) -> Rows:
        opened = int(self._opener is not None)
        lengths = grown.lengths + opened
        ids = np.zeros((len(lengths), row_width(lengths, self.length)), dtype=np.int64)
        ids[:, opened : opened + grown.ids.shape[1]] = grown.ids
        if self._opener is not None:
            ids[:, 0] = self._opener
        return Rows(ids, lengths, None)

    def _build(self, grown: Sentences, sample_ids: NDArray[np.int64], draws: NDArray[np.int64], *, heldout: bool) -> Batch:
        """draws: the index of each row's random numbers [B]."""
        ids, lengths, _ = self._opened(grown)
        opened = int(self._opener is not None)
        content = slice(opened, opened + grown.ids.shape[1])
        predicted = np.zeros(ids.shape, dtype=np.bool_)
        if grown.ends is None:
            predicted[:, content] = np.arange(grown.ids.shape[1]) < grown.lengths[:, None]
        else:
            predicted[:, content] = grown.ends[[level - 1 for level in self._task.boundaries]].any(axis=0)
        if self._masking is not None:
            seed = self._task.seed if heldout else self._seed
            positions, labels = self._masking(ids, predicted, draws, seed, heldout=heldout)
        else:
            predicts = np.zeros(ids.shape, dtype=np.bool_)
            predicts[:, :-1] = predicted[:, 1:]
            positions, labels = next_tokens(ids, predicts)
        return to_batch(ids, None, positions, labels, sample_ids, lengths)


def _draw(seed: int, stream: Stream) -> Draw:
    return lambda sentences, counters: bits(seed, stream, sentences, counters)


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

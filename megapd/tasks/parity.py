"""Sparse parity, and a binary tree of parities.

Coordinates are -1 / +1, written as token ids 0 / 1. Every sample is fresh: bits of 64-bit words of the counter-based generator.
One position a sample is labelled, the last.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megapd import config as settings
from megapd.batch import Batch
from megapd.rng import Stream, Words, bits
from megapd.tasks import row_numbers, to_batch, training_samples

HELDOUT_SAMPLES = 1 << 31  # drawn on demand, so any number would do


class _BitsTask(ABC):
    """Uniform bits [B, d]; the label depends on the products over `supports` [nodes, degree], disjoint sets of coordinates."""

    vocab_size = 2
    labelled_per_sample = 1.0
    heldout_samples = HELDOUT_SAMPLES

    def __init__(self, dimension: int, supports: NDArray[np.int64], task: dict[str, Any], seed: int, global_batch: int) -> None:
        self.length = dimension
        self.supports = supports
        self.vocabulary_digest = self.data_digest = hashlib.sha256(
            json.dumps({**task, "supports": supports.tolist()}).encode()
        ).hexdigest()
        self._task_seed, self._seed, self._global_batch = int(task["seed"]), seed, global_batch
        self._words = -(-dimension // 64)
        self._masks = np.zeros((supports.shape[0], self._words), dtype=np.uint64)
        for node, support in enumerate(supports):
            for coordinate in support.tolist():
                self._masks[node, coordinate // 64] |= np.uint64(1 << (coordinate % 64))

    def batch(self, step: int, rows: range) -> Batch:
        samples = training_samples(step, rows, self._global_batch)
        return self._build(bits(self._seed, Stream.PARITY_TRAIN, samples[:, None], np.arange(self._words)), samples)

    def heldout(self, rows: range) -> Batch:
        """Another stream, keyed by the task's seed: teacher and students are judged on the same samples.

        In low dimensions (2^d not far above the number of samples) the same inputs occur in training too.
        """
        numbers = row_numbers(rows, HELDOUT_SAMPLES)
        return self._build(bits(self._task_seed, Stream.PARITY_HELDOUT, numbers[:, None], np.arange(self._words)), -1 - numbers)

    def _build(self, words: Words, samples: NDArray[np.int64]) -> Batch:
        # Little-endian bytes, so that bit i of word w is coordinate 64 w + i on every machine.
        octets = words.astype("<u8", copy=False).view(np.uint8).reshape(len(words), 8 * self._words)
        ids = np.unpackbits(octets, axis=1, count=self.length, bitorder="little").astype(np.int64)
        positions = np.arange(1, len(words) + 1, dtype=np.int64) * self.length - 1
        return to_batch(ids, None, positions, self._label(self._products(words)), samples)

    def _products(self, words: Words) -> NDArray[np.int64]:
        """[B, nodes]: 1 where the product over the node's support is +1, else 0.

        The product is +1 iff the number of -1s, degree - ones, is even: iff the parity of the ones is that of the degree.
        """
        folded = words[:, 0, None] & self._masks[:, 0]
        for word in range(1, self._words):
            folded ^= words[:, word, None] & self._masks[:, word]
        for shift in (32, 16, 8, 4, 2, 1):
            folded ^= folded >> np.uint64(shift)
        odd = (folded & np.uint64(1)).astype(np.int64)
        even: NDArray[np.int64] = 1 ^ odd ^ (self.supports.shape[1] & 1)
        return even

    @abstractmethod
    def _label(self, products: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B] classes of [B, nodes] products."""


class ParityTask(_BitsTask):
    """x uniform in {-1, +1}^d, y = 1 iff the product over the hidden support of k coordinates is +1 (else 0)."""

    classes = 2

    def __init__(self, task: settings.ParityConfig, seed: int, global_batch: int) -> None:
        supports = draw_supports(task.dimension, task.degree, 1, task.seed)
        super().__init__(task.dimension, supports, task.model_dump(), seed, global_batch)

    def _label(self, products: NDArray[np.int64]) -> NDArray[np.int64]:
        return products[:, 0].copy()


class HierarchicalParityTask(_BitsTask):
    """A complete binary tree with a k-parity in every inner node; y = argmax over leaves of the sum of +-parities on its path.

    A node's parity counts + on paths that go right and - on paths that go left. Following every parity's sign from the root
    reaches a leaf whose sum is the depth; any other path disagrees with a sign somewhere, so that leaf is the only maximum.
    Nodes are numbered as in a heap (children of i: 2i + 1 left, 2i + 2 right), leaves from left to right.
    """

    def __init__(self, task: settings.HierarchicalParityConfig, seed: int, global_batch: int) -> None:
        self.classes = task.labels
        self._depth = task.labels.bit_length() - 1
        supports = draw_supports(task.dimension, task.degree, task.labels - 1, task.seed)
        super().__init__(task.dimension, supports, task.model_dump(), seed, global_batch)

    def _label(self, products: NDArray[np.int64]) -> NDArray[np.int64]:
        row = np.arange(len(products))
        node = np.zeros(len(products), dtype=np.int64)
        for _ in range(self._depth):
            node = 2 * node + 1 + products[row, node]
        return node - (self.classes - 1)


def draw_supports(dimension: int, degree: int, nodes: int, seed: int) -> NDArray[np.int64]:
    """Disjoint supports [nodes, degree], uniform among all, each in increasing order; a function of the task's seed alone."""
    order = np.argsort(bits(seed, Stream.SUPPORT, 0, np.arange(dimension)), kind="stable")
    return np.sort(order[: nodes * degree].reshape(nodes, degree), axis=1).astype(np.int64)

"""Documents to fixed blocks.

The tokens of a split are one stream: each document's ids, then the separator. Blocks are cut from it without regard to documents,
so no position is padding; in BERT's style each block opens with [CLS], and the rest is the stream's next length - 1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class PackCounts:
    """What went through a packer.

    documents, tokens   taken in; tokens with separators
    blocks              given out
    dropped_tokens      the tail that filled no block
    special_tokens      openers and separators in the blocks
    boundaries          neighbours within a block that belong to different documents
    """

    documents: int = 0
    tokens: int = 0
    blocks: int = 0
    dropped_tokens: int = 0
    special_tokens: int = 0
    boundaries: int = 0


class Packer:
    """Collects documents; `take` gives the blocks that are full.

    A block is ids [length] with segments [length], the number of each token's document within the block. A separator belongs
    to the document it ends, an opener to the block's first document.
    """

    def __init__(self, length: int, separator: int, opener: int | None) -> None:
        self._length, self._separator, self._opener = length, separator, opener
        self._content = length - (opener is not None)
        self._ids: list[NDArray[np.int32]] = []
        self._documents: list[NDArray[np.int64]] = []
        self.pending = 0  # tokens held
        self.counts = PackCounts()

    def add(self, documents: list[NDArray[np.int32]]) -> None:
        """Append documents' ids, without separators. Empty ones are left out."""
        documents = [document for document in documents if len(document)]
        if not documents:
            return
        sizes = np.array([len(document) + 1 for document in documents])
        stream = np.empty(int(sizes.sum()), dtype=np.int32)
        ends = np.cumsum(sizes)
        for document, end in zip(documents, ends.tolist(), strict=True):
            stream[end - 1 - len(document) : end - 1] = document
            stream[end - 1] = self._separator
        self._ids.append(stream)
        self._documents.append(np.repeat(np.arange(len(documents)) + self.counts.documents, sizes))
        self.pending += len(stream)
        self.counts.documents += len(documents)
        self.counts.tokens += len(stream)

    @property
    def ready(self) -> int:
        """Full blocks held."""
        return self.pending // self._content

    def take(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All full blocks: ids and segments, [blocks, length] each."""
        blocks = self.ready
        cut = blocks * self._content
        ids, documents = self._joined()
        self._ids, self._documents = [ids[cut:]], [documents[cut:]]
        self.pending -= cut
        ids, documents = ids[:cut].reshape(blocks, -1), documents[:cut].reshape(blocks, -1)
        if self._opener is not None:
            opener = np.full((blocks, 1), self._opener, dtype=np.int32)
            ids, documents = np.concatenate([opener, ids], axis=1), np.concatenate([documents[:, :1], documents], axis=1)
        self.counts.blocks += blocks
        self.counts.boundaries += int(np.count_nonzero(documents[:, 1:] != documents[:, :-1]))
        self.counts.special_tokens += int(np.count_nonzero(ids == self._separator)) + (blocks if self._opener is not None else 0)
        return ids, documents - documents[:, :1]

    def close(self) -> PackCounts:
        """Drop the tail; the final counts."""
        assert self.ready == 0, "take the full blocks first"
        self.counts.dropped_tokens = self.pending
        return self.counts

    def _joined(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        if not self._ids:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
        return np.concatenate(self._ids), np.concatenate(self._documents)

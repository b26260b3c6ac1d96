"""Reads a prepared corpus as a whole, against the digests in its meta.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megapd.errors import DataDamaged
from megapd.files import sha256_file
from megapd.tasks.blocks import AGAIN, Blocks, read_meta

ROWS = 4096  # read at once


def verify(folder: Path, told: Callable[[int], object] = lambda blocks: None) -> int:
    """The number of blocks in `folder`, once each was read and is as it was written. told: called with blocks read since last.

    Raises UserError, DataDamaged where a file is not what its digest says.
    """
    meta, found = read_meta(folder), 0
    vocabulary = meta["tokenizer"]["vocab_size"]
    for split in ("train", "heldout"):
        for shard in meta[split]["shards"]:
            path = folder / shard["file"]
            blocks = Blocks(path)
            for first in range(0, len(blocks), ROWS):
                rows = np.arange(first, min(first + ROWS, len(blocks)))
                if int(blocks.ids(rows).max()) >= vocabulary:
                    raise DataDamaged(f"{path}: an id beyond the vocabulary's {vocabulary}; {AGAIN}")
                blocks.segments(rows)
                told(len(rows))
            if sha256_file(path) != shard["sha256"]:
                raise DataDamaged(f"{path}: its sha256 is not the one in meta.json; {AGAIN}")
            found += len(blocks)
    return found

"""`megapd prepare` and `megapd corpus verify`: text of files or of a hub data set -> tokenizer -> packed blocks on disk."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from megapd.config import Config
from megapd.corpus import prepare, verify


def prepare_corpus(config: Config) -> int:
    print(prepare(config, progress=sys.stderr.isatty()))
    return 0


def verify_corpus(folder: Path) -> int:
    """`megapd corpus verify FOLDER`: a line if every block is as it was written; else what is wrong, exit code 2."""
    with tqdm(desc="reading", unit=" blocks", unit_scale=True, disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
        blocks = verify(folder, bar.update)
    print(f"{folder}: {blocks:,} blocks as they were written")
    return 0

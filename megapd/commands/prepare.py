"""`megapd prepare` and `megapd corpus verify`: text of files or of a hub data set -> tokenizer -> packed blocks on disk."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from megapd.commands.progress import Progress
from megapd.config import Config
from megapd.corpus import prepare, verify
from megapd.tasks.blocks import read_meta


def prepare_corpus(config: Config, like: str | None = None) -> int:
    """`megapd prepare CONFIG [--like TEACHER]`: bars on a terminal, else a line each ten seconds; at the end what was made.

    like: a teacher, as teacher.trajectory names them, whose tokenizer and number of ids are taken; "": the configuration's.
    """
    if like is not None:
        from megapd.commands.like import with_tokenizer_of  # it describes models, which takes torch

        config = with_tokenizer_of(config, like)
    progress = Progress("prepare")
    beside = sys.stderr.isatty()

    def told(what: str, done: int) -> None:
        progress.update(done, what)

    folder = prepare(config, progress=beside, told=(lambda what, done: None) if beside else told)
    meta = read_meta(folder)
    blocks = {split: meta[split]["blocks"] for split in ("train", "heldout")}
    tokens = sum(source["tokens"] for source in meta["sources"])
    made = f"{tokens:,} tokens of {len(meta['sources'])} sources: {blocks['train']:,} blocks, {blocks['heldout']:,} held out"
    progress.close(made)
    print(f"tokenizer {meta['tokenizer']['digest'][:12]}, {meta['tokenizer']['vocab_size']:,} ids", file=sys.stderr)
    print(folder)
    return 0


def verify_corpus(folder: Path) -> int:
    """`megapd corpus verify FOLDER`: a line if every block is as it was written; else what is wrong, exit code 2."""
    with tqdm(desc="reading", unit=" blocks", unit_scale=True, disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
        blocks = verify(folder, bar.update)
    print(f"{folder}: {blocks:,} blocks as they were written")
    return 0

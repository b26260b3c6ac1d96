"""Small synthetic text, and corpora prepared from it."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from numpy.typing import NDArray

from megapd.config import Config, load
from megapd.corpus import prepare
from megapd.corpus.pack import BlockWriter
from megapd.files import sealed
from megapd.tasks.blocks import FORMAT

SYLLABLES = ("ka", "lo", "mi", "ter", "un", "pra", "sen", "vo", "gul", "is", "est", "or")


def documents(count: int = 60, seed: int = 0) -> list[str]:
    """Texts of 1 to 6 paragraphs over a few hundred words, every one different."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(300)]
    texts = []
    for number in range(count):
        paragraphs = [" ".join(draw.choices(words, k=draw.randint(10, 60))) + "." for _ in range(draw.randint(1, 6))]
        texts.append(f"number {number}\n\n" + "\n\n".join(paragraphs))
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def settings(folder: Path, path: Path | str, style: str = "bert", *overrides: str) -> Config:
    """A text run over folder/corpus, prepared from `path`."""
    task, model, kind = ("mlm", "bert", "unigram") if style == "bert" else ("clm", "gpt", "bpe")
    return load(
        None,
        [
            f"--corpus.output={folder / 'corpus'}",
            f"--corpus.sources=[{{path: {path}}}]",
            f"--corpus.tokenizer={{kind: {kind}, style: {style}, vocab_size: 320}}",
            "--corpus.block_length=32",
            "--corpus.heldout_fraction=0.2",
            "--task.kind=text",
            f"--task.objective={task}",
            f"--model.kind={model}",
            "--training.global_batch=16",
            *overrides,
        ],
    )


def write_blocks(folder: Path, vocab_size: int, ids: NDArray, segments: NDArray, chunk: int = 1 << 20) -> BlockWriter:
    """A corpus of these blocks [B, L] in the training split, and of the first few of them in the held-out one."""
    folder.mkdir(parents=True, exist_ok=True)
    length = ids.shape[1]
    writers = []
    for split, rows in (("train", len(ids)), ("heldout", min(3, len(ids)))):
        with BlockWriter(folder / f"{split}.arrow", length, vocab_size) as writer:
            for first in range(0, rows, chunk):
                writer.append(ids[first : min(rows, first + chunk)], segments[first : min(rows, first + chunk)])
        writers.append(writer)
    (folder / "tokenizer.model").write_bytes(b"none")
    tokenizer = {"digest": hashlib.sha256(b"none").hexdigest(), "style": "gpt", "vocab_size": vocab_size, "special": {}}
    splits = {name: {"shards": [writer.shard]} for name, writer in zip(("train", "heldout"), writers, strict=True)}
    meta = {"format": FORMAT, "config": {"block_length": length}, "tokenizer": tokenizer, **splits}
    (folder / "meta.json").write_text(sealed(meta))
    return writers[0]


def prepared(folder: Path, style: str = "bert", *overrides: str) -> Config:
    config = settings(folder, write_jsonl(folder / "text.jsonl", documents()), style, *overrides)
    prepare(config, progress=False)
    return config

"""Small synthetic text, and corpora prepared from it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megapd.config import Config, load
from megapd.corpus import prepare

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


def prepared(folder: Path, style: str = "bert", *overrides: str) -> Config:
    config = settings(folder, write_jsonl(folder / "text.jsonl", documents()), style, *overrides)
    prepare(config, progress=False)
    return config

"""What the benchmark scripts share: a run's step times, and results with machine, versions and date."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import time
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapd.corpus.pack import BlockWriter
from megapd.files import sealed, write_atomic
from megapd.tasks.blocks import FORMAT, META, MODEL
from megapd.training import Callback, Run, StepResult


def random_corpus(folder: Path, *, blocks: int, length: int, vocabulary: int, style: str) -> None:
    """Random ids in the form of a prepared corpus, `blocks` a split; what they are matters to no timing."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if style == "bert" else ("<unk>", "<|endoftext|>")
    special = {name: number for number, name in enumerate(names)}
    splits = {}
    for split in ("train", "heldout"):
        with BlockWriter(folder / f"{split}.arrow", length, vocabulary) as writer:
            ids = random.integers(len(special), vocabulary, (blocks, length))
            writer.append(ids, np.zeros_like(ids))
        splits[split] = {"blocks": blocks, "shards": [writer.shard], "special_tokens": 0, "boundaries": 0}
    splits["heldout"]["sources"] = [("random", blocks)]
    (folder / MODEL).write_bytes(b"none")
    digest = hashlib.sha256(b"none").hexdigest()
    tokenizer = {"digest": digest, "style": style, "vocab_size": vocabulary, "special": special}
    meta = {"format": FORMAT, "config": {"block_length": length}, "tokenizer": tokenizer, **splits}
    write_atomic(folder / META, sealed(meta))


class StepTimes(Callback):
    """seconds: from the end of each update to the end of the next, for the steps 1, 2, ..."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def after_step(self, run: Run, result: StepResult) -> None:
        self._ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self._ends)]


def write_result(path: Path, question: str, arguments: Namespace, packages: tuple[str, ...], **values: Any) -> None:
    """One JSON file: the question, when and where it was asked, with which versions and settings, and the answer."""
    result = {
        "question": question,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        **values,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result, indent=1))

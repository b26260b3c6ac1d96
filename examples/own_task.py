"""A task of one's own: copy a word after a separator. A small GPT learns it, and a smaller one from its checkpoints.

    python examples/own_task.py [FOLDER]

Two classes make a task: a section of the configuration, registered under its name, and what it builds, whose batches are a pure
function of the settings, the seed and the step. A package would name the section as an entry point of the group megapd.tasks
instead of being imported, and train by `megapd train CONFIG`.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

import megapd
from megapd.batch import Batch
from megapd.config import TaskConfig
from megapd.registry import tasks


@tasks.register("copy")
class CopyConfig(TaskConfig):
    """`letters` random tokens, a separator, and the same tokens again."""

    builder = f"{__name__}:CopyTask"

    kind: Literal["copy"] = "copy"
    letters: int = Field(6, ge=1)
    alphabet: int = Field(8, ge=2)


class CopyTask:
    """Samples [B, 2 * letters] of a word, the separator, and the word without its last letter: each letter of the second word is
    predicted one position before it."""

    heldout_samples = 1024

    def __init__(self, settings: CopyConfig, seed: int, global_batch: int) -> None:
        self.settings, self.seed, self.global_batch = settings, seed, global_batch
        self.vocab_size = self.classes = settings.alphabet + 1  # the last id is the separator
        self.length, self.labelled_per_sample = 2 * settings.letters, float(settings.letters)
        self.vocabulary_digest = self.data_digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()

    def batch(self, step: int, rows: range) -> Batch:
        words = self._words(self.global_batch, self.seed, 1 + step)
        return self._build(words[rows.start : rows.stop], step * self.global_batch + np.arange(rows.start, rows.stop))

    def heldout(self, rows: range) -> Batch:
        words = self._words(self.heldout_samples, 0)
        return self._build(words[rows.start : rows.stop], -1 - np.arange(rows.start, rows.stop))

    def _words(self, count: int, *key: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng(key).integers(0, self.settings.alphabet, (count, self.settings.letters))

    def _build(self, words: np.ndarray[Any, Any], samples: np.ndarray[Any, Any]) -> Batch:
        separators = np.full((len(words), 1), self.settings.alphabet)
        ids = np.concatenate([words, separators, words[:, :-1]], axis=1)
        predicted = np.zeros(ids.shape, dtype=bool)
        predicted[:, self.settings.letters :] = True
        return Batch(
            ids=torch.from_numpy(ids),
            segments=None,
            positions=torch.from_numpy(np.flatnonzero(predicted)),
            labels=torch.from_numpy(words.reshape(-1)),
            sample_ids=torch.from_numpy(samples),
        )


COMMON = [
    "--task={kind: copy, letters: 4}",
    "--training={steps: 150, global_batch: 64}",
    "--optimizer.lr=0.005",
    "--evaluation={every: 50, samples: 512}",
    "--telemetry={every: 50, wandb: disabled, progress: false}",
]


def train(folder: Path, name: str, model: str, *settings: str) -> None:
    config = megapd.load(overrides=[*COMMON, f"--model={model}", *settings, f"--runs_dir={folder}", f"--name={name}"])
    result = megapd.train(config)
    print(f"{name:<8} {result.step} steps, held-out accuracy {result.metrics['eval/accuracy']:.3f}")


def main(folder: Path) -> None:
    train(folder, "teacher", "{kind: gpt, layers: 2, hidden: 64, heads: 4}", "--trajectory.every=50")
    taught = [f"--teacher.trajectory={folder / 'teacher' / 'trajectory'}", "--schedule={policy: matched, refresh: 50}"]
    train(folder, "student", "{kind: gpt, layers: 2, hidden: 32, heads: 2}", *taught)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))

"""Downstream tasks by log-likelihood: which of several continuations, or sentences, the model finds more probable.

A causal model reads each option once. A masked one has no probability of a text; it is scored by pseudo-log-likelihood (Salazar
et al. 2020): each token of the option is masked once, in a row of its own, and the logarithms of its probability are added.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megapd.batch import Batch
from megapd.config import Config, DownstreamConfig
from megapd.evaluation.questions import Question, read_questions
from megapd.tasks import Task, row_width, to_batch
from megapd.tasks.tokenizer import CorpusVocabulary, corpus_vocabulary
from megapd.world import World

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """What a forward reads of an option: ids, the places that predict, the ids to predict there, and which option it is of."""

    ids: NDArray[np.int64]
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    option: int


class DownstreamTask:
    """One of evaluation.tasks, ready to be scored.

    name       what metrics call it
    questions  how many there are
    """

    def __init__(self, section: DownstreamConfig, vocabulary: CorpusVocabulary, length: int) -> None:
        """length: tokens a row at most; what is before that is cut off. Raises UserError for a file that holds no questions."""
        self.name = section.name or section.path.stem
        questions = read_questions(section)
        self.questions = len(questions)
        self._answers = np.array([question.answer for question in questions])
        self._ends = np.cumsum([len(question.options) for question in questions])
        options = [option for question in questions for option in question.options]
        self._characters = np.array([max(1, len(continuation)) for _, continuation in options])
        encode = _masked_rows if vocabulary.style == "bert" else _causal_rows
        self._rows = encode(options, vocabulary, length)
        self._padding, self._longest = vocabulary.roles.separator, max(len(row.ids) for row in self._rows)
        if cut := sum(len(row.ids) == length for row in self._rows):
            log.warning(
                "evaluation.tasks: %s: %d of %d rows fill %d tokens and may be cut", self.name, cut, len(self._rows), length
            )

    def score(self, logprobs: Callable[[Batch], Tensor], world: World, micro_batch: int) -> dict[str, float]:
        """accuracy: the share of questions whose answer has the largest log-likelihood; accuracy_norm: the same a character of
        the option, as lm-eval's acc_norm. logprobs: of each label of a batch [N]. A collective: all ranks make as many
        forwards.
        """
        sums = torch.zeros(int(self._ends[-1]), dtype=torch.float64)
        for first in range(0, len(self._rows), micro_batch * world.size):
            begin = min(len(self._rows), first + world.rank * micro_batch)
            rows = self._rows[begin : min(len(self._rows), begin + micro_batch)]
            found = logprobs(self._batch(rows).to(world.device)).double().cpu()
            owners = torch.tensor([row.option for row in rows for _ in row.places], dtype=torch.int64)
            sums.index_add_(0, owners, found)
        if world.size > 1:
            on_device = sums.to(world.device)
            dist.all_reduce(on_device)
            sums = on_device.cpu()
        scores = sums.numpy()
        names = {"accuracy": scores, "accuracy_norm": scores / self._characters}
        return {f"{self.name}/{name}": self._accuracy(values) for name, values in names.items()}

    def _accuracy(self, scores: NDArray[np.float64]) -> float:
        chosen = [int(np.argmax(part)) for part in np.split(scores, self._ends[:-1])]
        return float(np.mean(np.array(chosen) == self._answers))

    def _batch(self, rows: Sequence[Row]) -> Batch:
        lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
        width = row_width(lengths, self._longest)
        ids = np.full((len(rows), width), self._padding, dtype=np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = row.ids
        nothing = np.empty(0, dtype=np.int64)
        positions = np.concatenate([nothing, *(number * width + row.places for number, row in enumerate(rows))])
        labels = np.concatenate([nothing, *(row.labels for row in rows)])
        return to_batch(ids, None, positions, labels, np.arange(len(rows)), lengths)


def open_downstream(config: Config, task: Task) -> list[DownstreamTask]:
    """Those of evaluation.tasks, in their order. Raises UserError for files that hold no questions, or a task without text."""
    if not config.evaluation.tasks:
        return []
    vocabulary = corpus_vocabulary(config, "evaluation.tasks")
    return [DownstreamTask(section, vocabulary, task.length) for section in config.evaluation.tasks]


def label_logprobs(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """log p of each label [N], fp32, of a learner's logits."""
    logits = model(batch, mode="logits").float()
    return logits.log_softmax(dim=-1).gather(1, batch.labels[:, None]).squeeze(1)


def _causal_rows(options: Sequence[tuple[str, str]], vocabulary: CorpusVocabulary, length: int) -> list[Row]:
    """One an option: context and continuation, encoded together; without a context the separator stands before, as before every
    document of the corpus."""
    # Blanks between the two belong to the continuation, whose first piece begins with one.
    stripped = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in options]
    whole = vocabulary.tokenizer.encode([context + continuation for context, continuation in stripped])
    contexts = vocabulary.tokenizer.encode([context for context, _ in stripped])
    rows = []
    for number, (ids, context) in enumerate(zip(whole, contexts, strict=True)):
        before = len(context)
        if before == 0:
            ids, before = np.concatenate([[vocabulary.roles.separator], ids]), 1
        begin = max(0, len(ids) - length)
        kept, first = ids[begin:].astype(np.int64), max(1, before - begin)
        rows.append(Row(kept, np.arange(first - 1, len(kept) - 1), kept[first:], number))
    return rows


def _masked_rows(options: Sequence[tuple[str, str]], vocabulary: CorpusVocabulary, length: int) -> list[Row]:
    """One a token of each option: [CLS] context continuation [SEP], that token masked."""
    roles, rows = vocabulary.roles, []
    assert roles.mask is not None
    whole = vocabulary.tokenizer.encode([context + continuation for context, continuation in options])
    contexts = vocabulary.tokenizer.encode([context for context, _ in options])
    opener = [] if roles.opener is None else [roles.opener]
    for number, (text, context) in enumerate(zip(whole, contexts, strict=True)):
        begin = max(0, len(text) - (length - len(opener) - 1))
        first = max(0, len(context) - begin)
        ids = np.concatenate([opener, text[begin:], [roles.separator]]).astype(np.int64)
        for place in range(len(opener) + first, len(ids) - 1):
            masked = ids.copy()
            masked[place] = roles.mask
            rows.append(Row(masked, np.array([place]), ids[place : place + 1], number))
    return rows


__all__ = ["DownstreamTask", "Question", "label_logprobs", "open_downstream"]

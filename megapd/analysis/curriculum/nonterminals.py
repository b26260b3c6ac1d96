"""Which symbols of the tree can be read off a model's hidden states: a linear probe whose attention knows positions alone.

After Allen-Zhu and Li (arXiv 2305.13673, section 4): with h_k the hidden states of a sentence, HEADS attention matrices A_r of
positions alone, A_r[i, k] = softmax_k(P_ri . P_rk), and matrices W_r, the logits of the symbol of each level at token i are
sum_r sum_k A_r[i, k] W_r h_k.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from megapd.analysis.curriculum.boundaries import TreeMetric
from megapd.analysis.curriculum.metric import Model
from megapd.models import Learner
from megapd.registry import metrics
from megapd.tasks import Task, to_batch

HEADS, WIDTH = 16, 64  # attention matrices; of a position's vector in each
EPOCHS, BATCH, RATE = 4, 64, 1e-2  # the paper's
ROWS = 64


@metrics.register("nonterminals")
class Nonterminals(TreeMetric):
    """nonterminal_L: accuracy of the symbol of level L at all tokens of sentences that the probe was not trained on."""

    convention = "a token's weights over the sentence sum to 1 (the released code's softmax runs over the other axis)"
    samples = 2048  # of which a quarter is held back; the paper trains on 10,240 and judges on 4,096

    def __init__(self, task: Task, samples: int) -> None:
        super().__init__(task, samples)
        self.settings |= {"heads": HEADS, "epochs": EPOCHS}

    def measure(self, model: Model) -> dict[str, float]:
        hidden, symbols, counted = self._states(model)
        levels = [level for level in range(symbols.shape[0]) if len(np.unique(symbols[level][counted])) > 1]
        targets, classes = _numbered(symbols[levels], counted)
        judged = max(1, self._samples // 4)
        probe = _Probe(hidden.shape[1], hidden.shape[2], sum(classes))
        with torch.enable_grad():
            _train(probe, hidden[judged:], targets[:, judged:], torch.from_numpy(counted[judged:]), classes)
        right = _accuracy(probe, hidden[:judged], targets[:, :judged], torch.from_numpy(counted[:judged]), classes)
        return {f"nonterminal_{level + 1}": value for level, value in zip(levels, right, strict=True)}

    def _states(self, model: Model) -> tuple[Tensor, NDArray[np.int64], NDArray[np.bool_]]:
        """Final hidden states [S, L, D], symbols [K, S, L] and which tokens count [S, L]."""
        numbers = np.arange(self._samples)
        grown = self._task.heldout_sentences(numbers, trees=True)
        assert grown.ancestors is not None
        opened, width = int(self._task.length > self._task.grammar.longest), grown.ids.shape[1]
        states = []
        for start in range(0, self._samples, ROWS):
            rows = self._task.heldout_rows(range(start, min(start + ROWS, self._samples)))
            count, length = rows.ids.shape
            positions = np.arange(count * length)
            batch = to_batch(rows.ids, None, positions, np.zeros_like(positions), np.arange(count), rows.lengths)
            # Of BERT and its kin, mode hidden is what its output layer reads, after a transform that is no part of the body.
            states_of = (
                model.body(batch.ids, lengths=batch.lengths) if isinstance(model, Learner) else model(batch, mode="hidden")
            )
            hidden = states_of.float().reshape(count, length, -1)[:, opened : opened + width]
            states.append(F.pad(hidden, (0, 0, 0, width - hidden.shape[1])))
        counted = np.arange(width) < grown.lengths[:, None]
        return torch.cat(states) * torch.from_numpy(counted)[..., None], grown.ancestors, counted


class _Probe(nn.Module):
    def __init__(self, length: int, width: int, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.positions = nn.Parameter(torch.randn(HEADS, length, WIDTH, generator=generator) * WIDTH**-0.5)
        self.weight = nn.Parameter(torch.randn(HEADS, width, classes, generator=generator) * (HEADS * width) ** -0.5)

    def forward(self, hidden: Tensor, counted: Tensor) -> Tensor:
        """[B, L, D], [B, L] -> logits [B, L, C] of all levels side by side."""
        scores = self.positions @ self.positions.transpose(1, 2)
        shown = scores[None].masked_fill(~counted[:, None, None, :], -torch.inf).softmax(-1)
        return torch.einsum("brik,bkd,rdc->bic", shown, hidden, self.weight)


def _numbered(symbols: NDArray[np.int64], counted: NDArray[np.bool_]) -> tuple[Tensor, list[int]]:
    """Symbols [K, S, L] as classes from 0 on each level, and how many each has."""
    targets, classes = np.zeros_like(symbols), []
    for level, own in enumerate(symbols):
        known = np.unique(own[counted])
        targets[level] = np.searchsorted(known, np.where(counted, own, known[0]))
        classes.append(len(known))
    return torch.from_numpy(targets), classes


def _train(probe: _Probe, hidden: Tensor, targets: Tensor, counted: Tensor, classes: list[int]) -> None:
    optimizer = torch.optim.Adam(probe.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        shuffled = torch.randperm(len(hidden), generator=order)
        for rows in (shuffled[start : start + BATCH] for start in range(0, len(hidden), BATCH)):
            parts = torch.split(probe(hidden[rows], counted[rows])[counted[rows]], classes, -1)
            wanted = targets[:, rows][:, counted[rows]]
            losses = [F.cross_entropy(part, own) for part, own in zip(parts, wanted, strict=True)]
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(losses)
            optimizer.step()


def _accuracy(probe: _Probe, hidden: Tensor, targets: Tensor, counted: Tensor, classes: list[int]) -> list[float]:
    right = torch.zeros(len(classes))
    for start in range(0, len(hidden), BATCH):
        rows = slice(start, start + BATCH)
        parts = torch.split(probe(hidden[rows], counted[rows])[counted[rows]], classes, -1)
        wanted = targets[:, rows][:, counted[rows]]
        right += torch.stack([(part.argmax(-1) == own).sum() for part, own in zip(parts, wanted, strict=True)])
    return (right / counted.sum()).tolist()

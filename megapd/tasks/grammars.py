"""The context-free grammars of Allen-Zhu and Li (arXiv 2305.13673): their rules, sentences and trees.

A symbol's rules are equally likely. Symbols lie on levels: terminals 1-3 on level 0, 7-9 on 1, 10-12 on 2, .. 22 on 6, and a rule
leads from one level to the next lower one. So a sentence grows level by level, all its symbols at once.

Letters: B sentences, W tokens of the longest, K levels above the terminals.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megapd.rng import Words, choose

TERMINALS = 3
_Value = TypeVar("_Value", bound=np.generic)
_NODES = 20  # bits of a node's number within its sentence and level, in the counter of its draw

Draw = Callable[[NDArray[np.int64], NDArray[np.int64]], Words]  # (sentence, counter) -> a random word each


class Sentences(NamedTuple):
    """Sentences, padded with 0 on the right.

    ids        [B, W] int64, terminals 1-3 as 0-2
    lengths    [B] int64
    ancestors  [K, B, W] int64, the symbol on each level, 1 first, that a token belongs to; None where nobody asked
    ends       [K, B, W] bool, whether that symbol ends with the token
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    ancestors: NDArray[np.int64] | None = None
    ends: NDArray[np.bool_] | None = None


class Grammar:
    """The rules of a grammar beneath a root symbol.

    depth      levels from the root to the terminals
    longest    tokens of its longest sentence; shortest likewise
    mean       expected tokens of a sentence; nodes: expected symbols of each level, 1 first
    """

    def __init__(self, rules: dict[int, list[list[int]]], root: int) -> None:
        self.rules, self.root = rules, root
        self.depth = level_of(root)
        size = 1 + max(rules)
        most = max(len(right) for right in rules.values())
        widest = max(len(right) for choices in rules.values() for right in choices)
        self._choices = np.zeros(size, dtype=np.int64)
        self._sizes = np.zeros((size, most), dtype=np.int64)
        self._right = np.zeros((size, most, widest), dtype=np.int64)
        for symbol, choices in rules.items():
            self._choices[symbol] = len(choices)
            for number, right in enumerate(choices):
                self._sizes[symbol, number], self._right[symbol, number, : len(right)] = len(right), right
        self.shortest, self.longest = self._extreme(root, min), self._extreme(root, max)
        self.nodes = tuple(self._expected(root, level) for level in range(1, self.depth + 1))
        self.mean = self._expected(root, 0)

    def grow(self, sentences: NDArray[np.int64], draw: Draw, *, trees: bool = False) -> Sentences:
        """The sentences of these numbers [B], each a function of its number and of `draw` alone."""
        count = len(sentences)
        rows, symbols = np.arange(count), np.full(count, self.root, dtype=np.int64)
        ancestors: list[NDArray[np.int64]] = []  # from the root down, as long as `symbols`
        ends: list[NDArray[np.bool_]] = []
        for depth in range(self.depth):
            words = draw(sentences[rows], _within(rows, count) + (depth << _NODES))
            chosen = choose(words, self._choices[symbols])
            sizes = self._sizes[symbols, chosen]
            right = self._right[symbols, chosen]
            if trees:
                last = np.zeros(int(sizes.sum()), dtype=np.bool_)
                last[np.cumsum(sizes) - 1] = True
                ends = [np.repeat(own, sizes) & last for own in [*ends, np.ones(len(symbols), dtype=np.bool_)]]
                ancestors = [np.repeat(own, sizes) for own in [*ancestors, symbols]]
            rows = np.repeat(rows, sizes)
            symbols = right[np.arange(right.shape[1]) < sizes[:, None]]
        lengths = np.bincount(rows, minlength=count)
        places = rows, _within(rows, count)
        ids = _spread(symbols - 1, places, lengths)
        if not trees:
            return Sentences(ids, lengths)
        return Sentences(
            ids,
            lengths,
            np.stack([_spread(own, places, lengths) for own in reversed(ancestors)]),
            np.stack([_spread(own, places, lengths) for own in reversed(ends)]),
        )

    def parse(self, ids: NDArray[np.int64]) -> tuple[int, NDArray[np.int64], NDArray[np.bool_]]:
        """Of a sentence [W]: how many trees it has; of the first of them, if any, ancestors [K, W] and ends [K, W]."""
        chart = self._chart(ids)
        width = len(ids)
        ancestors, ends = np.zeros((self.depth, width), dtype=np.int64), np.zeros((self.depth, width), dtype=np.bool_)
        found = chart[self.depth].get((0, self.root), {}).get(width)
        if found is None:
            return 0, ancestors, ends
        open_nodes = [(self.depth, 0, width, self.root)]
        while open_nodes:
            level, start, stop, symbol = open_nodes.pop()
            if level == 0:
                continue
            ancestors[level - 1, start:stop], ends[level - 1, stop - 1] = symbol, True
            _, parts = chart[level][start, symbol][stop]
            open_nodes += [(level - 1, *part) for part in parts]
        return found[0], ancestors, ends

    def _chart(self, ids: NDArray[np.int64]) -> list[dict[tuple[int, int], dict[int, _Spans]]]:
        """For each level: (start, symbol) -> stop -> (number of trees, the parts of the first)."""
        levels: list[dict[tuple[int, int], dict[int, _Spans]]] = [
            {(place, int(token) + 1): {place + 1: (1, [])} for place, token in enumerate(ids)}
        ]
        for level in range(1, self.depth + 1):
            below, here = levels[-1], {}
            for symbol, choices in self.rules.items():
                if level_of(symbol) != level:
                    continue
                for start in range(len(ids)):
                    stops: dict[int, _Spans] = {}
                    for right in choices:
                        for stop, (trees, parts) in _joined(below, start, right).items():
                            known = stops.get(stop)
                            stops[stop] = (trees, parts) if known is None else (known[0] + trees, known[1])
                    if stops:
                        here[start, symbol] = stops
            levels.append(here)
        return levels

    def _extreme(self, symbol: int, pick: Callable[..., int]) -> int:
        if symbol <= TERMINALS:
            return 1
        return pick(sum(self._extreme(part, pick) for part in right) for right in self.rules[symbol])

    def _expected(self, symbol: int, level: int) -> float:
        """Expected symbols of a level beneath a symbol, itself included."""
        if level_of(symbol) == level:
            return 1.0
        choices = self.rules[symbol]
        return sum(self._expected(part, level) for right in choices for part in right) / len(choices)


_Spans = tuple[int, list[tuple[int, int, int]]]


def level_of(symbol: int) -> int:
    """0 of a terminal, else 1 for the symbols 7-9, .. 6 for 22."""
    return 0 if symbol <= TERMINALS else (symbol - 4) // 3


@cache
def named_grammar(name: str, root: int) -> Grammar:
    rules = json.loads((resources.files("megapd.tasks") / "grammars.json").read_text())[name]
    beneath = [symbol for symbol in map(int, rules) if level_of(symbol) < level_of(root)]
    return Grammar({symbol: rules[str(symbol)] for symbol in (root, *beneath)}, root)


def _joined(below: dict[tuple[int, int], dict[int, _Spans]], start: int, right: list[int]) -> dict[int, _Spans]:
    """Where the symbols of `right`, one after the other from `start` on, can stop."""
    found: dict[int, _Spans] = {start: (1, [])}
    for symbol in right:
        following: dict[int, _Spans] = {}
        for begin, (trees, parts) in found.items():
            for stop, (more, _) in below.get((begin, symbol), {}).items():
                known = following.get(stop)
                whole = (trees * more, [*parts, (begin, stop, symbol)])
                following[stop] = whole if known is None else (known[0] + whole[0], known[1])
        found = following
    return found


def _within(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The place of each element among those of its row; rows increase."""
    sizes = np.bincount(rows, minlength=count)
    return np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _spread(
    values: NDArray[_Value], places: tuple[NDArray[np.int64], NDArray[np.int64]], lengths: NDArray[np.int64]
) -> NDArray[_Value]:
    """[B, W] of one value a token."""
    padded = np.zeros((len(lengths), int(lengths.max(initial=1))), dtype=values.dtype)
    padded[places] = values
    return padded

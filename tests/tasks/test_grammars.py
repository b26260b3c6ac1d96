"""The grammars: lengths, trees, the parser, an independent count of trees."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from megapd.rng import bits
from megapd.tasks.grammars import Grammar, level_of, named_grammar

# Tokens of whole sentences: fewest, most, mean, standard deviation; exact (arXiv 2305.13673's grammars).
LENGTHS = {
    "cfg3b": (138, 432, 275.6, 41.7),
    "cfg3b_released": (161, 432, 294.0, 44.3),
    "cfg3f": (64, 729, 249.9, 69.4),
    "cfg3g": (80, 729, 252.4, 53.0),
    "cfg3h": (97, 459, 236.4, 41.5),
    "cfg3i": (114, 564, 308.1, 46.0),
}


def draw(sentences, counters):
    return bits(3, 14, sentences, counters)


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name):
    grammar, count = named_grammar(name, 22), 4000
    shortest, longest, mean, deviation = LENGTHS[name]
    assert (grammar.shortest, grammar.longest) == (shortest, longest)
    assert grammar.mean == pytest.approx(mean, abs=0.05)
    lengths = np.concatenate([grammar.grow(np.arange(i, i + 500), draw).lengths for i in range(0, count, 500)])
    assert abs(lengths.mean() - mean) < 4.5 * deviation / count**0.5
    assert lengths.std() == pytest.approx(deviation, rel=4.5 / (2 * count) ** 0.5)
    assert shortest <= lengths.min() <= lengths.max() <= longest


def test_the_released_grammar_lacks_one_rule():
    rules, released = (named_grammar(name, 22).rules for name in ("cfg3b", "cfg3b_released"))
    assert {symbol for symbol in rules if rules[symbol] != released[symbol]} == {9}
    assert [right for right in rules[9] if right not in released[9]] == [[2, 1]]


def test_rules_are_equally_likely():
    """Of 3 symbols below 15, and of the trees beneath them."""
    grammar = named_grammar("cfg3b", 15)
    grown = grammar.grow(np.arange(20_000), draw, trees=True)
    assert grown.ancestors is not None
    assert grown.ends is not None
    first = grown.ancestors[1, :, 0]
    share = (first == 12).mean()
    assert abs(share - 0.5) < 4.5 * 0.5 / 20_000**0.5
    sevens = (grown.ends[0] & (grown.ancestors[0] == 7)).sum()
    long = (grown.ends[0] & (grown.ancestors[0] == 7) & (grown.ids == 2)).sum()  # 7 -> 3 1 or 1 2 3: the latter ends in 3
    assert abs(long / sevens - 0.5) < 4.5 * 0.5 / sevens**0.5


def test_a_sentence_is_a_function_of_its_number_alone():
    grammar = named_grammar("cfg3h", 22)
    whole = grammar.grow(np.arange(50), draw, trees=True)
    some = np.array([31, 7, 31])
    part = grammar.grow(some, draw, trees=True)
    width = part.ids.shape[1]
    assert np.array_equal(part.lengths, whole.lengths[some])
    assert np.array_equal(part.ids, whole.ids[some, :width])
    assert np.array_equal(part.ancestors, whole.ancestors[:, some, :width])
    assert np.array_equal(part.ends, whole.ends[:, some, :width])
    assert np.array_equal(grammar.grow(some, draw).ids, part.ids)
    assert grammar.grow(some[:0], draw, trees=True).ids.shape[0] == 0


@pytest.mark.parametrize(("name", "root"), [("cfg3b", 22), ("cfg3b", 17), ("cfg3b_released", 22), ("cfg3f", 22), ("cfg3i", 18)])
def test_trees_are_those_of_the_rules(name, root):
    """From the labels alone: the parts of each symbol are one of its rules, in order, and cover the sentence."""
    grammar = named_grammar(name, root)
    grown = grammar.grow(np.arange(5), draw, trees=True)
    for row, length in enumerate(grown.lengths.tolist()):
        ancestors, ends = grown.ancestors[:, row, :length], grown.ends[:, row, :length]
        symbols = [(place, place + 1, int(token) + 1) for place, token in enumerate(grown.ids[row, :length])]
        for level in range(grammar.depth):
            stops = (np.flatnonzero(ends[level]) + 1).tolist()
            above = [(a, b, int(ancestors[level, b - 1])) for a, b in zip([0, *stops], stops, strict=False)]
            for start, stop, symbol in above:
                assert (ancestors[level, start:stop] == symbol).all()
                assert [s for a, b, s in symbols if start <= a and b <= stop] in grammar.rules[symbol]
            symbols = above
        assert symbols == [(0, length, root)]


@pytest.mark.parametrize("name", LENGTHS)
def test_the_parser_finds_the_tree(name):
    """Where there is one alone; and a tree in any case."""
    grammar = named_grammar(name, 22)
    grown = grammar.grow(np.arange(12), draw, trees=True)
    alone = 0
    for row, length in enumerate(grown.lengths.tolist()):
        count, ancestors, ends = grammar.parse(grown.ids[row, :length])
        assert count >= 1
        if count == 1:
            alone += 1
            assert np.array_equal(ancestors, grown.ancestors[:, row, :length])
            assert np.array_equal(ends, grown.ends[:, row, :length])
    assert alone >= (12 if name.startswith("cfg3b") else 1)
    broken = grown.ids[0, : grown.lengths[0]].copy()
    broken[:] = 0
    assert grammar.parse(broken)[0] == 0


def trees_by_hand(grammar, ids):
    """Splits of every span, rule by rule: no chart by levels."""

    @cache
    def of(symbol, start, stop):
        if level_of(symbol) == 0:
            return int(stop == start + 1 and ids[start] + 1 == symbol)
        return sum(joined(tuple(right), start, stop) for right in grammar.rules[symbol])

    @cache
    def joined(right, start, stop):
        if len(right) == 1:
            return of(right[0], start, stop)
        return sum(of(right[0], start, middle) * joined(right[1:], middle, stop) for middle in range(start + 1, stop))

    return of(grammar.root, 0, len(ids))


@pytest.mark.parametrize(("name", "root"), [("cfg3f", 18), ("cfg3i", 18), ("cfg3g", 16), ("cfg3b", 16)])
def test_trees_are_counted(name, root):
    grammar = named_grammar(name, root)
    grown = grammar.grow(np.arange(8), draw)
    counts = []
    for row, length in enumerate(grown.lengths.tolist()):
        ids = grown.ids[row, :length]
        counts.append(trees_by_hand(grammar, tuple(ids.tolist())))
        assert grammar.parse(ids)[0] == counts[-1]
    assert max(counts) > 1 or name != "cfg3i"


def test_an_ambiguous_grammar():
    """7 -> 1 | 1 1 under 10 -> 7 7 | 7: 1 1 has three trees less those that do not fit."""
    grammar = Grammar({10: [[7, 7], [7]], 7: [[1], [1, 1]]}, 10)
    assert (grammar.shortest, grammar.longest, grammar.mean) == (1, 4, 2.25)
    assert [grammar.parse(np.zeros(n, dtype=np.int64))[0] for n in range(1, 6)] == [1, 2, 2, 1, 0]

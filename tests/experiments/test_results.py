"""Which point of a grid is a method's best, from made-up runs."""

from __future__ import annotations

import numpy as np

from megapd.experiments import results
from megapd.experiments.results import Result, choose, table
from megapd.experiments.spec import Cell, Sweep


def sweep(**changes):
    common = {"name": "x", "methods": {"a": {}, "b": {}}, "grid": {"optimizer.lr": [1, 2, 4]}, "student_seeds": (1, 2)}
    return Sweep(**{**common, **changes})


def run(method, lr, seed, values, failed=False):
    cell = Cell({}, f"{method}{lr}{seed}", None, method, 0, seed, (("optimizer.lr", lr),))
    return Result(cell, failed, np.arange(1, len(values) + 1) * 10, np.array(values))


def made(monkeypatch, own, curves):
    found = {}
    for (method, lr), rows in curves.items():
        runs = tuple(run(method, lr, seed, *row) for seed, row in enumerate(rows, start=1))
        found.setdefault(method, {})[(("optimizer.lr", lr),)] = runs
    monkeypatch.setattr(results, "collect", lambda _: found)
    return {each.method: each for each in choose(own)}


def test_by_the_metric_at_the_end(monkeypatch):
    curves = {("a", 1): [([0.5, 0.7],)] * 2, ("a", 2): [([0.5, 0.8],)] * 2, ("a", 4): [([0.9, 0.7],)] * 2}
    chosen = made(monkeypatch, sweep(methods={"a": {}}), curves)
    assert dict(chosen["a"].point) == {"optimizer.lr": 2}
    assert chosen["a"].edge == ""
    curves["a", 2] = [([0.5, 0.8],), ([0.5, 0.9], True)]  # one diverged
    chosen = made(monkeypatch, sweep(methods={"a": {}}), curves)
    assert dict(chosen["a"].point)["optimizer.lr"] in (1, 4)
    assert chosen["a"].edge == "optimizer.lr"
    losses = made(monkeypatch, sweep(methods={"a": {}}, metric="loss"), {("a", 1): [([2.0, 1.0],)], ("a", 2): [([2.0, 0.5],)]})
    assert dict(losses["a"].point) == {"optimizer.lr": 2}


def test_by_arrival_where_a_threshold_is_set(monkeypatch):
    late, early, never = ([0.5, 0.5, 1.0],), ([0.5, 0.95, 0.95],), ([0.5, 0.5, 0.5],)
    curves = {("a", 1): [late, late], ("a", 2): [early, early], ("a", 4): [early, never]}
    chosen = made(monkeypatch, sweep(methods={"a": {}}, threshold=0.9), curves)
    assert dict(chosen["a"].point) == {"optimizer.lr": 2}
    assert [result.reached(0.9, rising=True) for result in chosen["a"].results] == [20, 20]


def test_what_a_table_says(monkeypatch):
    early, never = ([0.5, 0.95],), ([0.5, 0.5],)
    curves = {("a", 1): [early, early], ("b", 1): [never, ([0.5, 0.6], True)]}
    own = sweep(threshold=0.9, grid={})
    found = {m: {(): tuple(run(m, 0, s, *row) for s, row in enumerate(rows, 1))} for (m, _), rows in curves.items()}
    monkeypatch.setattr(results, "collect", lambda _: found)
    told = table(own)
    assert "2 of 2" in told
    assert "never" in told
    assert "a - b: +0.4500 accuracy, 95 % between +0.4500 and +0.4500; at 0.9 first in 2 pairs, alike in 0, later in 0" in told
    assert "note: b: 1 runs diverged" in told
    assert "note: one teacher" in told
    found["b"][()] = tuple(run("b", 0, s, [0.5], True) for s in (1, 2))
    assert "no pair of seeds in which neither diverged" in table(own)

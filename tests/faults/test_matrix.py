"""Nothing that happens to a file of a run changes silently what is made of it; see matrix.py."""

import random

import pytest

from tests.faults import matrix

SAMPLE = 14


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return matrix.make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def rights(found):
    return matrix.rights(found)


def cells(found, readers=matrix.READERS, damages=matrix.DAMAGES):
    states = {reader: found.files("killed" if reader == "resume" else "whole") for reader in readers}
    return [(file, damage, reader) for reader, files in states.items() for file in files for damage in damages]


def faults(found, rights, chosen, seed=0):
    told = {(*cell, seed): matrix.cell(found, *cell, rights, seed) for cell in chosen}
    return {cell: what for cell, what in told.items() if what.startswith("FAULT")}


@pytest.mark.slow
def test_some_cells(found, rights):
    """The same with each start."""
    chosen = random.Random(0).sample(cells(found, ["resume", "evaluate"]), SAMPLE)
    assert faults(found, rights, chosen) == {}


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("damage", matrix.DAMAGES)
def test_all_cells(found, rights, damage):
    assert faults(found, rights, cells(found, damages=[damage])) == {}


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(1, 4))
def test_other_bits_and_lengths(found, rights, seed):
    chosen = cells(found, ["resume", "evaluate"], ["flipped bit", "truncated"])
    assert faults(found, rights, chosen, seed) == {}

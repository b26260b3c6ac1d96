"""Parity: labels against plain products, the support a function of the task's seed, content independent of how rows are split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megapd.config import load
from megapd.tasks import build_task
from megapd.tasks.parity import draw_supports

FLAT = ["--task.kind=parity"]
TREE = ["--task.kind=hierarchical_parity"]


def task(*overrides: str, base: list[str] = FLAT):
    return build_task(load(None, [*base, *overrides]))


def signs(batch) -> np.ndarray:
    return 2 * batch.ids.numpy() - 1


@pytest.mark.parametrize(("dimension", "degree"), [(1, 1), (50, 5), (50, 6), (64, 64), (65, 3), (200, 7)])
def test_labels_are_products(dimension, degree):
    parity = task(f"--task.dimension={dimension}", f"--task.degree={degree}")
    for batch in (parity.batch(3, range(256)), parity.heldout(range(256))):
        products = signs(batch)[:, parity.supports[0]].prod(axis=1)
        assert np.array_equal(batch.labels.numpy(), (products == 1).astype(int))
        assert batch.ids.shape == (256, dimension)
        assert batch.segments is None
        assert batch.positions.tolist() == [row * dimension + dimension - 1 for row in range(256)]
    assert parity.supports.shape == (1, degree)
    assert len(set(parity.supports[0].tolist())) == degree


@pytest.mark.parametrize(("dimension", "degree", "labels"), [(3, 1, 4), (100, 5, 8), (100, 4, 8), (130, 8, 16), (10, 2, 2)])
def test_hierarchical_labels_are_the_best_leaf(dimension, degree, labels):
    """The definition, leaf by leaf: sum over the path of the parity, counted + to the right and - to the left."""
    tree = task(f"--task.dimension={dimension}", f"--task.degree={degree}", f"--task.labels={labels}", base=TREE)
    batch = tree.batch(0, range(256))
    products = np.stack([signs(batch)[:, support].prod(axis=1) for support in tree.supports], axis=1)
    sums = np.zeros((256, labels), dtype=int)
    for leaf in range(labels):
        node = leaf + labels - 1
        while node:
            parent, right = (node - 1) // 2, node % 2 == 0
            sums[:, leaf] += products[:, parent] * (1 if right else -1)
            node = parent
    assert np.array_equal(batch.labels.numpy(), sums.argmax(axis=1))
    assert ((sums == sums.max(axis=1, keepdims=True)).sum(axis=1) == 1).all()
    assert len(set(tree.supports.ravel().tolist())) == (labels - 1) * degree
    assert tree.classes == labels
    assert np.bincount(batch.labels, minlength=labels).min() > 0


@pytest.mark.parametrize("base", [FLAT, TREE])
def test_content_does_not_depend_on_the_split(base):
    parity = task(base=base)
    whole = parity.batch(7, range(256))
    for size in (1, 37, 64):
        parts = [parity.batch(7, range(first, min(256, first + size))) for first in range(0, 256, size)]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert torch.equal(torch.cat([part.sample_ids for part in parts]), whole.sample_ids)
    assert whole.sample_ids.tolist() == [7 * 256 + row for row in range(256)]


def test_the_global_batch_only_cuts_the_stream():
    small, large = task("--training.global_batch=128"), task("--training.global_batch=256")
    assert torch.equal(
        torch.cat([small.batch(6, range(128)).ids, small.batch(7, range(128)).ids]), large.batch(3, range(256)).ids
    )


def test_seeds():
    teacher, student, other = task("--seed=1"), task("--seed=2"), task("--task.seed=5")
    assert teacher.vocabulary_digest == student.vocabulary_digest != other.vocabulary_digest
    assert np.array_equal(teacher.supports, student.supports)
    assert not np.array_equal(teacher.supports, other.supports)
    assert not torch.equal(teacher.batch(0, range(256)).ids, student.batch(0, range(256)).ids)
    assert torch.equal(teacher.heldout(range(256)).ids, student.heldout(range(256)).ids)
    assert teacher.batch(0, range(256)).digest == task("--seed=1").batch(0, range(256)).digest
    assert task("--task.degree=4").vocabulary_digest != teacher.vocabulary_digest


def test_samples_are_fresh_and_fair():
    parity = task()
    batches = [parity.batch(step, range(256)) for step in range(40)]
    rows = torch.cat([batch.ids for batch in batches] + [parity.heldout(range(2000)).ids])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert (rows.double().mean(dim=0) - 0.5).abs().max() < 4.5 * 0.5 / len(rows) ** 0.5
    labels = torch.cat([batch.labels for batch in batches]).double()
    assert abs(labels.mean() - 0.5) < 4.5 * 0.5 / len(labels) ** 0.5


def test_supports_are_uniform():
    supports = np.concatenate([draw_supports(10, 3, 1, seed) for seed in range(4000)])
    counts = np.bincount(supports.ravel(), minlength=10)
    assert abs(counts / 4000 - 0.3).max() < 4.5 * np.sqrt(0.3 * 0.7 / 4000)


@pytest.mark.parametrize("base", [FLAT, TREE])
def test_attributes_and_empty_ranges(base):
    parity = task(base=base)
    assert parity.vocab_size == 2
    assert parity.length == (50 if base is FLAT else 100)
    assert parity.labelled_per_sample == 1.0
    for batch in (parity.batch(0, range(5, 5)), parity.heldout(range(9, 9))):
        assert batch.ids.shape == (0, parity.length)
        assert batch.labelled == 0


def test_heldout_ids_are_apart_from_training_ids():
    assert task().heldout(range(2, 5)).sample_ids.tolist() == [-3, -4, -5]

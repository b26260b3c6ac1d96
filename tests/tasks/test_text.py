"""Text: epochs, masks and targets, each a pure function of (seed, step), whatever the split of the rows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from megapd.config import load
from megapd.errors import UserError
from megapd.tasks import build_task
from tests.corpus import corpora


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return corpora.prepared(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    return corpora.prepared(tmp_path_factory.mktemp("gpt"), "gpt")


def over(config, *overrides: str):
    """The task of a run over `config`'s corpus."""
    task = config.task
    return build_task(
        load(
            None,
            [
                "--task.kind=text",
                f"--task.objective={task.objective}",
                f"--task.corpus={config.corpus.output}",
                f"--model.kind={config.model.kind}",
                "--training.global_batch=16",
                *overrides,
            ],
        )
    )


def stored(task, batch) -> np.ndarray:
    """The batch's ids before masking."""
    ids = batch.ids.numpy().copy().reshape(-1)
    ids[batch.positions] = batch.labels.numpy()
    return ids.reshape(batch.ids.shape)


@pytest.mark.parametrize("style", ["bert", "gpt"])
@pytest.mark.parametrize("masked", ["true", "false"])
def test_content_does_not_depend_on_the_split(style, masked, request):
    task = over(request.getfixturevalue(style), f"--task.document_mask={masked}")
    for step in (0, 1, 1000):
        whole = task.batch(step, range(16))
        for size in (1, 5, 8):
            parts = [task.batch(step, range(first, min(16, first + size))) for first in range(0, 16, size)]
            offsets = [first * task.length for first in range(0, 16, size)]
            assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
            assert torch.equal(torch.cat([p.positions + o for p, o in zip(parts, offsets, strict=True)]), whole.positions)
            assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
            if masked == "true":
                assert torch.equal(torch.cat([part.segments for part in parts]), whole.segments)
            else:
                assert whole.segments is None
        assert whole.sample_ids.tolist() == list(range(step * 16, step * 16 + 16))


def test_each_epoch_sees_every_block_once_in_another_order(gpt):
    task = over(gpt)
    n = len(task._train)
    rows = [row.tobytes() for step in range(2 * n // 16 + 1) for row in task.batch(step, range(16)).ids.numpy()]
    everything = [row.tobytes() for row in task._train.ids(np.arange(n))]
    first, second = rows[:n], rows[n : 2 * n]
    assert sorted(first) == sorted(second) == sorted(everything)
    for a, b in ((first, second), (first, everything), (second, everything)):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 10  # Poisson of mean 1


def test_a_global_batch_of_several_epochs(bert):
    task = over(bert, "--training.global_batch=1000")
    n = len(task._train)
    assert n < 400
    batch = task.batch(2, range(1000))
    whole = [stored(task, over(bert).batch(step, range(16))) for step in range(125, 188)]
    assert np.array_equal(stored(task, batch), np.concatenate(whole)[:1000])


def test_mask_statistics(bert):
    task = over(bert, "--task.mask_rate=0.3", "--training.global_batch=1024")
    batches = [task.batch(step, range(1024)) for step in range(6)]
    special = list(range(5))
    ordinary = selected = 0
    became = {"mask": 0, "kept": 0, "other": 0}
    replacements = []
    for batch in batches:
        original = stored(task, batch)
        assert not np.isin(batch.labels, special).any()
        ordinary += (~np.isin(original, special)).sum()
        selected += batch.labelled
        now, label = batch.ids.reshape(-1)[batch.positions], batch.labels
        became["mask"] += int((now == 4).sum())
        became["kept"] += int((now == label).sum())
        became["other"] += int(((now != 4) & (now != label)).sum())
        replacements.append(now[(now != 4) & (now != label)].numpy())
        untouched = np.ones(batch.ids.numel(), dtype=bool)
        untouched[batch.positions] = False
        assert not (batch.ids.reshape(-1).numpy()[untouched] == 4).any()
    assert abs(selected / ordinary - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / ordinary)
    tolerance = 4.5 * np.sqrt(0.8 * 0.2 / selected)
    assert abs(became["mask"] / selected - 0.8) < tolerance
    assert abs(became["kept"] / selected - 0.1 - 0.1 / task.vocab_size) < tolerance
    drawn = np.bincount(np.concatenate(replacements), minlength=task.vocab_size)
    assert drawn[:5].sum() == 0
    expected = drawn.sum() / (task.vocab_size - 5)
    assert abs(drawn[5:] - expected).max() < 6 * np.sqrt(expected)
    assert abs(selected / (6 * 1024) - task.labelled_per_sample) < 0.1


@pytest.mark.parametrize(("mask", "random"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.9, 0.1)])
def test_shares_at_their_ends(bert, mask, random):
    task = over(bert, f"--task.mask_token_share={mask}", f"--task.random_token_share={random}")
    batch = task.batch(0, range(16))
    now = batch.ids.reshape(-1)[batch.positions]
    if mask == 1.0:
        assert (now == 4).all()
    if mask == 0.0:
        assert not (now == 4).any()
    if random == 1.0:
        assert (now != batch.labels).double().mean() > 0.9
    if mask + random == 0.0:
        assert torch.equal(now, batch.labels)


def test_masks_are_pure_and_differ_between_epochs_and_seeds(bert):
    """An epoch's worth of steps later the same block has other masks."""
    task = over(bert)
    n = len(task._train)
    wide = over(bert, f"--training.global_batch={n}")
    first, second = wide.batch(0, range(n)), wide.batch(1, range(n))
    assert first.digest == over(bert, f"--training.global_batch={n}").batch(0, range(n)).digest
    order = [np.lexsort(stored(wide, batch).T) for batch in (first, second)]
    a, b = (np.zeros((n, 32), dtype=bool) for _ in range(2))
    for table, batch, rows in ((a, first, order[0]), (b, second, order[1])):
        flat = np.zeros(n * 32, dtype=bool)
        flat[batch.positions] = True
        table[:] = flat.reshape(n, 32)[rows]
    both = (a & b).mean()
    assert abs(both - a.mean() * b.mean()) < 4.5 * np.sqrt(0.09 * 0.91 / a.size)
    other = over(bert, "--seed=1").batch(0, range(16))
    assert other.digest != task.batch(0, range(16)).digest


def test_heldout_is_fixed_and_apart(bert):
    task, other = over(bert), over(bert, "--seed=9")
    n = task.heldout_samples
    whole = task.heldout(range(n))
    assert whole.digest == other.heldout(range(n)).digest
    parts = torch.cat([task.heldout(range(0, 3)).ids, task.heldout(range(3, n)).ids])
    assert torch.equal(parts, whole.ids)
    assert whole.sample_ids.tolist() == [-1 - row for row in range(n)]
    training = {row.tobytes() for row in task._train.ids(np.arange(len(task._train)))}
    assert not training & {row.tobytes() for row in stored(task, whole)}


def test_next_tokens(gpt):
    task = over(gpt)
    batch = task.batch(0, range(16))
    ids = batch.ids.numpy()
    assert batch.labelled == 16 * 31 == 16 * task.labelled_per_sample
    assert np.array_equal(batch.labels.numpy().reshape(16, 31), ids[:, 1:])
    assert np.array_equal(batch.positions.numpy().reshape(16, 31) % 32, np.tile(np.arange(31), (16, 1)))


def test_next_tokens_stop_at_document_ends(gpt):
    task = over(gpt, "--task.document_mask=true")
    n, end = len(task._train), 1
    wide = over(gpt, "--task.document_mask=true", f"--training.global_batch={n}")
    batch = wide.batch(0, range(n))
    ids = batch.ids.numpy()
    expected = [r * 32 + c for r in range(n) for c in range(31) if ids[r, c] != end]
    assert batch.positions.tolist() == expected
    assert batch.labelled < 31 * n
    assert abs(batch.labelled / n - task.labelled_per_sample) < 1e-9
    assert np.array_equal(batch.segments.numpy()[:, 1:], np.cumsum(ids[:, :-1] == end, axis=1))
    assert (batch.segments[:, 0] == 0).all()


def test_empty_ranges_and_rows_without_labels(bert, gpt):
    for config in (bert, gpt):
        task = over(config, "--task.document_mask=true")
        for batch in (task.batch(0, range(4, 4)), task.heldout(range(0, 0))):
            assert batch.ids.shape == batch.segments.shape == (0, 32)
            assert batch.labelled == 0
    batch = over(bert, "--task.mask_rate=0.000001").batch(0, range(16))
    assert batch.labelled == 0
    assert batch.ids.shape == (16, 32)


def test_attributes(bert, gpt):
    for config in (bert, gpt):
        task = over(config)
        assert task.vocab_size == task.classes == 320
        assert task.length == 32
        assert len(task.vocabulary_digest) == 64


def refuse(config, *words: str, **settings: str) -> None:
    with pytest.raises(UserError) as caught:
        over(config, *(f"--{name.replace('__', '.')}={value}" for name, value in settings.items()))
    assert "\n" not in str(caught.value)
    for word in (*words, "megapd prepare"):
        assert word in str(caught.value)


def test_refusals(bert, gpt, tmp_path):
    refuse(bert, "task.corpus", str(tmp_path), task__corpus=str(tmp_path))
    refuse(bert, "task.objective", "bert", task__corpus=str(gpt.corpus.output))
    refuse(gpt, "task.objective", "gpt", task__corpus=str(bert.corpus.output))


@pytest.mark.parametrize(
    "damage", ["train.arrow", "heldout.checks", "tokenizer.model", "meta.json", "missing", "format", "swapped"]
)
def test_damaged_corpora(bert, tmp_path, damage):
    folder = tmp_path / "corpus"
    shutil.copytree(bert.corpus.output, folder)
    name = {"missing": "train.arrow", "format": "meta.json", "swapped": "train.arrow"}.get(damage, damage)
    file = folder / name
    if damage == "missing":
        file.unlink()
    elif damage == "format":
        tree = json.loads(file.read_text())
        del tree["digest"]
        file.write_text(json.dumps({**tree, "format": 1}))
    elif damage == "swapped":
        shutil.copy(folder / "heldout.arrow", file)
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refuse(bert, str(folder / name), task__corpus=str(folder))

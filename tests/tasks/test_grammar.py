"""The grammar task: batches, objectives, losses at the ends of symbols, finitely many sentences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megapd.config import load
from megapd.errors import UserError
from megapd.tasks import build_task

MODELS = {"mlm": "bert", "clm": "gpt"}


def task_of(objective="mlm", batch=16, seed=0, **settings):
    section = ", ".join(f"{key}: {value}" for key, value in {"root": 15, **settings}.items())
    arguments = [f"--task={{kind: grammar, objective: {objective}, {section}}}", f"--model.kind={MODELS[objective]}"]
    return build_task(load(None, [*arguments, f"--training.global_batch={batch}", f"--seed={seed}"]))


def stored(task, batch, masked=True):
    """Each row's tokens before masking."""
    ids = batch.ids.flatten()
    if masked:
        ids[batch.positions] = batch.labels
    return [row[:n].tolist() for row, n in zip(ids.view(batch.ids.shape), batch.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("bos", ["true", "false"])
@pytest.mark.parametrize("objective", MODELS)
def test_rows_are_sentences(objective, bos):
    task = task_of(objective, bos=bos)
    batch = task.batch(2, range(16))
    grown = task.sentences(np.arange(32, 48), trees=False)
    opener = [3] if bos == "true" else []
    wanted = [opener + row[:n].tolist() for row, n in zip(grown.ids, grown.lengths, strict=True)]
    assert stored(task, batch, objective == "mlm") == wanted
    assert task.length == 27 + len(opener)
    assert task.vocab_size == task.classes == 3 + len(opener) + (objective == "mlm")
    assert (batch.ids < task.vocab_size).all()


@pytest.mark.parametrize("objective", MODELS)
@pytest.mark.parametrize("boundaries", ["[]", "[1]", "[2, 3]"])
@pytest.mark.parametrize("bos", ["true", "false"])
def test_what_is_predicted(objective, boundaries, bos):
    """Every token but the opener, or those that end a symbol of the levels asked for; none of the padding."""
    task = task_of(objective, batch=4000, boundaries=boundaries, bos=bos)
    batch = task.batch(0, range(4000))
    grown = task.sentences(np.arange(4000), trees=True)
    levels = [int(level) - 1 for level in boundaries.strip("[]").split(",") if level.strip()]
    inside = np.arange(grown.ids.shape[1]) < grown.lengths[:, None]
    predicted = inside & (grown.ends[levels].any(0) if levels else True)
    opened = int(bos == "true")
    rows = np.repeat(np.arange(4000), batch.counts)
    places = batch.places - opened + (objective == "clm")
    if objective == "clm":
        if not opened:
            predicted[:, 0] = False
        found = np.zeros_like(predicted)
        found[rows, places] = True
        assert np.array_equal(found, predicted)
        assert batch.labels.tolist() == grown.ids[predicted].tolist()
    else:
        assert predicted[rows, places].all()
        assert batch.labels.tolist() == grown.ids[rows, places].tolist()
    deviation = (task.labelled_per_sample * 4000) ** 0.5
    assert abs(batch.labelled - 4000 * task.labelled_per_sample) < 4.5 * deviation


def test_masks():
    task = task_of(batch=2000)
    batch = task.batch(0, range(2000))
    now = batch.ids.flatten()[batch.positions]
    share = (now == 4).double().mean().item()
    assert abs(share - 0.8) < 4.5 * (0.16 / batch.labelled) ** 0.5
    kept = (now == batch.labels).double().mean().item()
    assert abs(kept - 0.1 - 0.1 / 3) < 4.5 * (0.12 / batch.labelled) ** 0.5
    untouched = torch.ones(batch.tokens, dtype=torch.bool)
    untouched[batch.positions] = False
    assert (batch.ids.flatten()[untouched] != 4).all()


@pytest.mark.parametrize("sentences", ["null", "40"])
def test_a_batch_is_a_function_of_the_step(sentences):
    task = task_of(sentences=sentences, boundaries="[1]")
    whole = task.batch(5, range(16))
    parts = [task_of(sentences=sentences, boundaries="[1]").batch(5, range(r, r + 1)) for r in range(16)]
    assert np.array_equal(np.concatenate([part.sample_digests for part in parts]), whole.sample_digests)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert task_of(seed=1, sentences=sentences).batch(5, range(16)).digest != whole.digest
    assert task.heldout(range(8)).digest == task_of(seed=1, sentences=sentences, boundaries="[1]").heldout(range(8)).digest
    assert task.batch(0, range(3, 3)).samples == 0


def test_finitely_many_sentences():
    """Each once an epoch, in another order, with other masks; the same of every seed."""
    task, other = task_of(batch=40, sentences=40, root=16), task_of(batch=40, sentences=40, root=16, seed=9)
    first, second, others = (stored(t, t.batch(step, range(40))) for t, step in ((task, 0), (task, 1), (other, 0)))
    assert sorted(first) == sorted(second) == sorted(others)
    assert len({tuple(row) for row in first}) > 35
    assert first != second
    place = second.index(first[0])
    masks = [t.positions[(t.positions // t.ids.shape[1]) == r] % t.ids.shape[1]
             for t, r in ((task.batch(0, range(40)), 0), (task.batch(1, range(40)), place))]  # fmt: skip
    assert masks[0].tolist() != masks[1].tolist()


def test_held_out_sentences_and_masks_are_not_those_of_training():
    task = task_of(batch=64, root=18, sentences=64)
    train, held = task.batch(0, range(64)), task.heldout(range(64))
    rows, others = ({tuple(row) for row in stored(task, batch)} for batch in (train, held))
    assert not rows & others
    assert held.sample_ids.tolist() == [-1 - row for row in range(64)]
    same = [set(batch.places[: batch.counts[0]].tolist()) for batch in (train, held)]
    assert same[0] != same[1]


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"task\.boundaries: root 15 has the levels 1 to 3, not 4"):
        task_of(boundaries="[4]")
    with pytest.raises(UserError, match=r"task\.objective mlm needs a bidirectional model"):
        load(None, ["--task={kind: grammar}", "--model.kind=gpt"])
    with pytest.raises(UserError, match="grammar"):
        load(None, ["--task={kind: grammar, grammar: cfg4}", "--model.kind=bert"])

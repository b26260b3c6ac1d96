import dataclasses

import pytest
import torch

from megapd.batch import Batch


def make(**changes):
    ids = torch.arange(12).reshape(3, 4)
    fields = {"ids": ids, "segments": None, "positions": torch.tensor([1, 5]), "labels": torch.tensor([7, 8])}
    return Batch(**{**fields, "sample_ids": torch.arange(3), **changes})


def test_counts():
    batch = make()
    assert (batch.samples, batch.tokens, batch.labelled) == (3, 12, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": torch.arange(12).reshape(4, 3)},
        {"ids": torch.arange(1, 13).reshape(3, 4)},
        {"positions": torch.tensor([1, 6])},
        {"segments": torch.zeros(3, 4, dtype=torch.int64)},
    ],
)
def test_the_digest_names_what_a_teacher_is_asked(changes):
    assert make().digest != make(**changes).digest


def test_the_digest_does_not_depend_on_labels_or_layout():
    reference = make()
    assert make(labels=torch.tensor([0, 0])).digest == reference.digest
    assert make(ids=reference.ids.T.contiguous().T).digest == reference.digest
    assert make(ids=reference.ids.to(torch.int32)).digest == reference.digest


def test_a_moved_batch_keeps_its_digest():
    batch = make()
    moved = batch.to("cpu")
    assert moved.digest == batch.digest
    assert all(torch.equal(getattr(moved, f), getattr(batch, f)) for f in ("ids", "positions", "labels", "sample_ids"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        moved.ids = None


def rows(*lengths, width, fill=0):
    """Rows of those lengths, padded to `width`; the first and the last token of each are labelled."""
    ids = torch.full((len(lengths), width), fill)
    for number, length in enumerate(lengths):
        ids[number, :length] = 10 * number + torch.arange(length)
    positions = torch.tensor([p for i, n in enumerate(lengths) for p in sorted({i * width, i * width + n - 1})])
    return Batch(ids, ids // 10, positions, ids.flatten()[positions], torch.arange(len(lengths)), torch.tensor(lengths))


def test_a_row_is_asked_about_alike_however_far_it_is_padded():
    alone = [rows(n, width=n) for n in (2, 5)]
    whole = [Batch(b.ids, b.segments, b.positions, b.labels, b.sample_ids) for b in alone]
    assert [b.digest for b in alone] == [b.digest for b in whole]
    assert rows(5, width=5).digest == rows(5, width=9, fill=7).digest
    assert rows(4, width=5).digest != rows(5, width=5).digest
    both = rows(2, 5, width=8)
    assert both.sample_digests[0] == alone[0].sample_digests[0]
    assert both.select(slice(0, 1)).digest == alone[0].digest


def test_rows_of_several_lengths_together():
    short, long = rows(2, 3, width=6), rows(5, 1, width=6)
    known = short.digest
    joined = Batch.concatenate([short, long])
    assert joined.lengths.tolist() == [2, 3, 5, 1]
    assert torch.equal(joined.ids.flatten()[joined.positions], joined.labels)
    assert joined.places.tolist() == [0, 1, 0, 2, 0, 4, 0]
    assert [joined.select(slice(0, 2)).digest, joined.select(slice(2, 4)).digest] == [known, long.digest]
    assert torch.equal(joined.to("cpu").lengths, joined.lengths)
    with pytest.raises(AssertionError):
        Batch.concatenate([short, Batch(long.ids, long.segments, long.positions, long.labels, long.sample_ids)])

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

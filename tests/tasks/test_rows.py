"""Text of a corpus with rows of several lengths: a document each, padded, and nothing is asked or learnt about padding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megapd.config import load
from megapd.corpus import prepare
from megapd.corpus.prepare import is_heldout
from megapd.errors import UserError
from megapd.tasks import build_task
from megapd.tasks.blocks import read_meta
from megapd.tokenization import open_tokenizer
from tests.corpus import corpora


@pytest.fixture(scope="module", params=["bert", "gpt"])
def config(request, tmp_path_factory):
    return corpora.prepared(tmp_path_factory.mktemp("rows"), request.param, "--corpus.packing=single")


def task_of(config, batch=16):
    section = f"--task={{kind: text, objective: {config.task.objective}, corpus: {config.corpus.output}}}"
    return build_task(load(None, [section, f"--model.kind={config.model.kind}", f"--training.global_batch={batch}"]))


def stored(batch, masked):
    """Each row's ids before masking, without its padding."""
    ids = batch.ids.flatten()
    if masked:
        ids[batch.positions] = batch.labels
    rows = ids.view(batch.ids.shape)
    return [row[:length].tolist() for row, length in zip(rows, batch.lengths.tolist(), strict=True)]


def test_rows_are_the_documents(config):
    """Those of the training split, in pieces, with the tokenizer's opener and separator; in some order."""
    meta = read_meta(config.corpus.output)
    assert meta["format"] == 4
    roles = meta["tokenizer"]["roles"]
    tokenizer = open_tokenizer(str(config.corpus.output))
    opened = [] if roles["opener"] is None else [roles["opener"]]
    wanted = []
    for text in corpora.documents():
        if not is_heldout(text, config.corpus.heldout_fraction, config.corpus.seed):
            left = [*tokenizer.encode([text])[0].tolist(), roles["separator"]]
            while left and left != [roles["separator"]]:
                wanted.append(opened + left[: 32 - len(opened)])
                left = left[32 - len(opened) :]
    n = meta["train"]["blocks"]
    batch = task_of(config, n).batch(0, range(n))
    rows = stored(batch, config.task.objective == "mlm")
    assert sorted(rows) == sorted(wanted)
    assert len(set(map(len, rows))) > 5
    assert batch.segments is None


def test_nothing_is_labelled_in_the_padding(config):
    n = read_meta(config.corpus.output)["train"]["blocks"]
    task = task_of(config, n)
    batch = task.batch(0, range(n))
    places, rows = batch.places, np.repeat(np.arange(n), batch.counts)
    assert (places < batch.lengths.numpy()[rows]).all()
    assert batch.lengths.double().mean().item() == pytest.approx(task.tokens_per_sample)
    if config.task.objective == "clm":
        assert batch.counts.tolist() == (batch.lengths - 1).tolist()
        assert torch.equal(batch.labels, batch.ids.flatten()[batch.positions + 1])
        assert batch.labelled == pytest.approx(n * task.labelled_per_sample)
    else:
        expected = n * task.labelled_per_sample
        assert abs(batch.labelled - expected) < 4.5 * expected**0.5


def test_a_sample_does_not_depend_on_its_neighbours(config):
    """Nor on the width that they give it."""
    task = task_of(config)
    batch = task.batch(3, range(16))
    for size in (1, 3, 8):
        parts = [task.batch(3, range(first, min(16, first + size))) for first in range(0, 16, size)]
        assert np.array_equal(np.concatenate([part.sample_digests for part in parts]), batch.sample_digests)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        assert np.array_equal(np.concatenate([part.places for part in parts]), batch.places)
        assert all(part.ids.shape[1] == min(32, -(-int(part.lengths.max()) // 16) * 16) for part in parts)
    assert {part.ids.shape[1] for part in (task.batch(3, range(r, r + 1)) for r in range(16))} == {16, 32}
    assert task.heldout(range(0)).ids.shape[0] == 0


def test_a_corpus_says_which_packing_it_has(config):
    other = config.model_copy(update={"corpus": config.corpus.model_copy(update={"packing": "concatenate"})})
    with pytest.raises(UserError, match=r"made with another corpus\.packing"):
        prepare(other, progress=False)
    meta = json.loads((config.corpus.output / "meta.json").read_text())
    assert meta["train"]["padding"] > 0

"""Packing and storing: every token found again in order, boundaries where documents meet, bounded batches on disk."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd.corpus import pack
from megapd.corpus.pack import BlockWriter, Packer, RowPacker
from megapd.tasks.blocks import Blocks
from tests.corpus.corpora import write_blocks

SEPARATOR, OPENER = 3, 2


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), max_size=40),
    length=st.integers(8, 20),
    opener=st.sampled_from([None, OPENER]),
    chunks=st.integers(1, 7),
)
def test_every_token_is_found_again(sizes, length, opener, chunks):
    documents = [np.arange(10 + i, 10 + i + size, dtype=np.int32) for i, size in enumerate(sizes)]
    packer = Packer(length, SEPARATOR, opener)
    taken = []
    for first in range(0, len(documents), chunks):
        packer.add(documents[first : first + chunks])
        if packer.ready:
            taken.append(packer.take())
    counts = packer.close()

    stream = [(i, token) for i, document in enumerate(documents) if len(document) for token in [*document.tolist(), SEPARATOR]]
    content = length - (opener is not None)
    blocks = len(stream) // content
    ids = np.concatenate([np.empty((0, length), dtype=np.int64), *(ids for ids, _ in taken)])
    segments = np.concatenate([np.empty((0, length), dtype=np.int64), *(segments for _, segments in taken)])
    assert ids.shape == segments.shape == (blocks, length)
    special = boundaries = 0
    for block in range(blocks):
        expected = stream[block * content : (block + 1) * content]
        if opener is not None:
            assert ids[block, 0] == opener
            special += 1
        assert ids[block, length - content :].tolist() == [token for _, token in expected]
        owners = [owner for owner, _ in expected]
        ranks = {owner: rank for rank, owner in enumerate(dict.fromkeys(owners))}
        expected_segments = [ranks[owner] for owner in owners]
        assert segments[block].tolist() == ([0] if opener is not None else []) + expected_segments
        special += [token for _, token in expected].count(SEPARATOR)
        boundaries += len(ranks) - 1
    assert counts.documents == sum(size > 0 for size in sizes)
    assert counts.tokens == len(stream)
    assert counts.blocks == blocks
    assert counts.dropped_tokens == len(stream) - blocks * content
    assert (counts.special_tokens, counts.boundaries) == (special, boundaries)


@pytest.mark.parametrize(("length", "vocab_size", "dtypes"), [(32, 300, "HB"), (256, 1 << 16, "HB"), (300, 70_000, "IH")])
@pytest.mark.parametrize("rows", [0, 1, 57])
def test_blocks_come_back_in_any_order(tmp_path, monkeypatch, length, vocab_size, dtypes, rows):
    monkeypatch.setattr(pack, "BATCH_BYTES", 10 * length * 6)  # 10 to 20 rows a batch
    draw = np.random.default_rng(0)
    ids = draw.integers(0, vocab_size, (rows, length))
    segments = draw.integers(0, length, (rows, length))
    path = tmp_path / "train.arrow"
    writer = write_blocks(tmp_path, vocab_size, ids, segments, chunk=25)
    assert writer.shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    blocks = Blocks(path)
    assert (len(blocks), blocks.length) == (rows, length)
    order = draw.integers(0, rows, 200) if rows else np.empty(0, dtype=np.int64)
    assert np.array_equal(blocks.ids(order), ids[order])
    assert np.array_equal(blocks.segments(order), segments[order])
    with pytest.raises(AssertionError):
        blocks.ids(np.array([rows]))
    with pytest.raises(AssertionError):
        blocks.ids(np.array([-1]))

    reader = pa.ipc.open_file(path)
    types = [reader.schema.field(name).type for name in ("ids", "segments")]
    assert [np.dtype(t.value_type.to_pandas_dtype()).char for t in types] == list(dtypes)
    assert all(t.list_size == length for t in types)
    assert all(reader.get_batch(i).num_rows <= 20 for i in range(reader.num_record_batches))
    assert (reader.num_record_batches > 2) == (rows == 57)


def test_reading_copies_nothing_but_the_rows(tmp_path):
    path = tmp_path / "train.arrow"
    ids = np.arange(50_000 * 32).reshape(-1, 32) % 5000
    write_blocks(tmp_path, 5000, ids, np.zeros_like(ids))
    before = pa.total_allocated_bytes()
    blocks = Blocks(path)
    assert np.array_equal(blocks.ids(np.array([49_999, 3])), ids[[49_999, 3]])
    assert pa.total_allocated_bytes() - before < 10_000


def test_a_writer_that_fails_leaves_no_readable_file(tmp_path):
    path = tmp_path / "b.arrow"

    def interrupted():
        with BlockWriter(path, 32, 300) as writer:
            writer.append(np.zeros((5, 32), dtype=int), np.zeros((5, 32), dtype=int))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(pa.ArrowInvalid):
        pa.ipc.open_file(path)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), max_size=20),
    length=st.integers(8, 20),
    opener=st.sampled_from([None, OPENER]),
    padding=st.sampled_from([0, SEPARATOR]),
    chunks=st.integers(1, 7),
)
def test_every_document_has_rows_of_its_own(sizes, length, opener, padding, chunks):
    documents = [np.arange(10 + i, 10 + i + size, dtype=np.int32) for i, size in enumerate(sizes)]
    packer = RowPacker(length, SEPARATOR, opener, padding)
    taken = []
    for first in range(0, len(documents), chunks):
        packer.add(documents[first : first + chunks])
        if packer.ready:
            taken.append(packer.take())
    counts = packer.close()

    ids = np.concatenate([np.empty((0, length), dtype=np.int64), *(ids for ids, _ in taken)])
    segments = np.concatenate([np.empty((0, length), dtype=np.int64), *(segments for _, segments in taken)])
    opened = [] if opener is None else [opener]
    rows = []
    for document in documents:
        left = [*document.tolist(), SEPARATOR] if len(document) else []
        while left and left != [SEPARATOR]:
            rows.append(opened + left[: length - len(opened)])
            left = left[length - len(opened) :]
    assert ids.tolist() == [row + [padding] * (length - len(row)) for row in rows]
    assert segments.tolist() == [[0] * len(row) + [1] * (length - len(row)) for row in rows]
    held = sum(map(len, rows))
    assert counts.documents == sum(size > 0 for size in sizes)
    assert counts.tokens == sum(size + 1 for size in sizes if size)
    assert counts.dropped_tokens == counts.tokens - (held - len(rows) * len(opened))
    assert (counts.blocks, counts.padding, counts.boundaries) == (len(rows), ids.size - held, 0)
    assert counts.special_tokens == sum(row.count(SEPARATOR) for row in rows) + len(rows) * len(opened)

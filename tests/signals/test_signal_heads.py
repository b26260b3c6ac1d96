"""Heads and their Arrow form: what is decoded is what was sent, and nothing else is ever decoded."""

import pyarrow as pa
import pytest
import torch

from megapd.errors import SignalDamaged, SignalMismatch
from megapd.signals import Head, decode_head, encode_head
from megapd.signals.arrow import HEAD_CHUNK_BYTES
from tests.signals.examples import (
    OTHER,
    TEACHER,
    Mutable,
    bits,
    through_stream,
)


def make_head(dtype=torch.float32, classes=7, width=4, bias=True):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, width, generator=generator).to(dtype)
    return Head(weight, torch.randn(classes, generator=generator).to(dtype) if bias else None)


def head_records(head):
    schema, records = encode_head(head, TEACHER)
    return schema, list(records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [1, 7])
def test_a_head_arrives_as_it_was_sent(dtype, bias, classes):
    head = make_head(dtype, classes, bias=bias)
    schema, records = head_records(head)
    decoded = decode_head(schema, [through_stream(record) for record in records], TEACHER)
    assert bits(decoded.weight) == bits(head.weight)
    assert bits(decoded.bias) == bits(head.bias)


def test_a_large_head_comes_in_pieces():
    head = make_head(classes=3 * HEAD_CHUNK_BYTES // (4 * 512) + 5, width=512)
    schema, records = head_records(head)
    assert [record.num_rows for record in records] == [HEAD_CHUNK_BYTES // 2048] * 3 + [5]
    decoded = decode_head(schema, records, TEACHER)
    assert torch.equal(decoded.weight, head.weight)
    assert torch.equal(decoded.bias, head.bias)
    for wrong in (records[:-1], records[1:], records[::-1], [*records, records[-1]], []):
        with pytest.raises(SignalDamaged):
            decode_head(schema, wrong, TEACHER)


def test_another_teachers_head_is_named():
    schema, records = head_records(make_head())
    with pytest.raises(SignalMismatch, match=f"{TEACHER}.*{OTHER}"):
        decode_head(schema, records, OTHER)


@pytest.mark.parametrize("bias", [True, False])
def test_a_flipped_bit_in_any_byte_of_a_head_is_found(bias):
    schema, [record] = head_records(make_head(bias=bias))
    mutable, flips = Mutable(record), 0
    for _, start, size in mutable.buffers:
        for position in range(start, start + size):
            mutable.data[position] ^= 1 << (position * 5 % 8)
            with pytest.raises(SignalDamaged):
                decode_head(schema, [mutable.record], TEACHER)
            mutable.data[position] ^= 1 << (position * 5 % 8)
            flips += 1
    assert flips == 4 * (7 * 4 + (7 if bias else 0))
    decode_head(schema, [mutable.record], TEACHER)


def test_a_malformed_head_is_damaged():
    schema, [record] = head_records(make_head())
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    weight, bias = record.columns
    integers = pa.FixedSizeListArray.from_arrays(pa.array(range(28), pa.int32()), 4)
    nulls = pa.FixedSizeListArray.from_arrays(pa.array([None] * 28, pa.float32()), 4)
    wider = pa.FixedSizeListArray.from_arrays(weight.flatten(), 2)
    tables = [
        ({"weight": weight}, metadata),  # without the bias that its checksum covers
        ({"weight": integers, "bias": bias}, metadata),
        ({"weight": nulls, "bias": bias}, metadata),
        ({"weight": wider.slice(0, 7), "bias": bias}, metadata),
        ({"weight": weight, "bias": pa.nulls(7, pa.float32())}, metadata),
        ({"bias": bias, "weight": weight}, metadata),
        ({"weight": bias, "bias": bias}, metadata),
        ({"weight": weight, "bias": bias}, {**metadata, "classes": "8"}),
        ({"weight": weight, "bias": bias}, {**metadata, "dtype": "fp64"}),
        ({"weight": weight, "bias": bias}, {**metadata, "dtype": "bf16"}),
        ({"weight": weight, "bias": bias}, {**metadata, "checksum": "0" * 16}),
        ({"weight": weight, "bias": bias}, {**metadata, "format": "megapd-head/0"}),
        ({"weight": weight, "bias": bias}, {}),
        ({}, metadata),
    ]
    for columns, about in tables:
        changed = pa.schema([pa.field(name, array.type) for name, array in columns.items()], about)
        with pytest.raises(SignalDamaged):
            decode_head(changed, [pa.RecordBatch.from_arrays(list(columns.values()), schema=changed)], TEACHER)
    for wrong in (record.rename_columns(["weight", "other"]), record.slice(0, 0)):
        with pytest.raises(SignalDamaged):
            decode_head(schema, [wrong], TEACHER)

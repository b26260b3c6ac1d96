"""Records that are not the signal that was sent: they are refused, and never decoded."""

import dataclasses
import random

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd.errors import SignalDamaged, SignalMismatch
from megapd.signals import Head, SignalSpec, as_sent, check_form, decode, encode, valid_rows
from megapd.signals.arrow import FORMAT
from tests.signals.examples import (
    CLASSES,
    OTHER,
    SPECS,
    TEACHER,
    Mutable,
    content,
    make_batch,
    make_signal,
)


@pytest.fixture(params=SPECS, ids=lambda spec: f"{spec.kind}-{spec.encoding}")
def sent(request):
    batch = make_batch([2, 0, 3, 1])
    signal = make_signal(request.param, batch)
    return batch, signal, encode(signal, batch, CLASSES)


def test_a_flipped_bit_in_any_byte_of_a_row_is_found(sent):
    batch, signal, record = sent
    mutable, flips = Mutable(record), 0
    for number, start, size in mutable.buffers:
        # The digests, which are compared, tell that they are not what is asked for; all else fails its checksum.
        expected = SignalMismatch if number < 2 else SignalDamaged
        for position in range(start, start + size):
            mutable.data[position] ^= 1 << (position * 5 % 8)
            with pytest.raises(expected):
                decode(mutable.record, signal.spec, TEACHER, batch, signal.head)
            mutable.data[position] ^= 1 << (position * 5 % 8)
            flips += 1
    assert flips >= 4 * (16 + 32 + 8)
    assert content(decode(mutable.record, signal.spec, TEACHER, batch, signal.head)) == content(as_sent(signal))


def test_rows_that_changed_places_are_refused(sent):
    batch, signal, record = sent
    swapped = record.take(pa.array([1, 0, 2, 3]))
    with pytest.raises(SignalMismatch, match=batch.digest):
        decode(swapped, signal.spec, TEACHER, batch, signal.head)


def test_a_row_under_another_samples_name_is_damaged(sent):
    """The checksum covers the digests: a row cannot pass for the answer to another question."""
    batch, signal, record = sent
    columns = [record.column("sample"), *(column.take(pa.array([0, 3, 2, 1])) for column in record.columns[1:])]
    record = pa.RecordBatch.from_arrays(columns, schema=record.schema)
    with pytest.raises(SignalDamaged):
        decode(record, signal.spec, TEACHER, batch, signal.head)
    assert valid_rows(record).tolist() == [True, False, True, False]


def test_another_teacher_is_named(sent):
    batch, signal, record = sent
    with pytest.raises(SignalMismatch, match=f"{TEACHER}.*{OTHER}"):
        decode(record, signal.spec, OTHER, batch, signal.head)
    with pytest.raises(SignalMismatch, match=f"{TEACHER}.*{OTHER}"):
        signal.check(OTHER, batch)


def test_other_samples_are_named(sent):
    batch, signal, record = sent
    other = make_batch([2, 0, 3, 1], seed=1)
    with pytest.raises(SignalMismatch, match=other.digest):
        decode(record, signal.spec, TEACHER, other, signal.head)
    with pytest.raises(SignalMismatch, match=f"{batch.digest}.*{other.digest}"):
        signal.check(TEACHER, other)
    with pytest.raises(SignalMismatch):
        decode(record.slice(0, 3), signal.spec, TEACHER, batch, signal.head)
    with pytest.raises(SignalMismatch, match="positions"):
        dataclasses.replace(signal, values=signal.values[1:]).check(TEACHER, batch)


def test_other_parameters_are_named(sent):
    batch, signal, record = sent
    for spec in SPECS:
        if spec != signal.spec:
            with pytest.raises(SignalMismatch) as error:
                decode(record, spec, TEACHER, batch, Head(torch.zeros(2, 2), None))
            assert signal.spec.parameters in str(error.value)
            assert spec.parameters in str(error.value)


def test_a_record_of_another_format_is_damaged(sent):
    batch, signal, record = sent
    parameters = signal.spec.parameters
    bad = [
        {"format": "megapd-signal/0", "parameters": parameters},
        {"parameters": parameters},
        {"format": FORMAT},
        {"format": FORMAT, "parameters": "{"},
        {"format": FORMAT, "parameters": "[" * 100_000},
        {"format": FORMAT, "parameters": b"\xff\xfe"},
        {},
    ]
    columns = [
        record.drop_columns("checksum"),
        record.append_column("more", record.column("checksum")),
        record.rename_columns(["teacher", "sample", *record.schema.names[2:]]),
        record.set_column(2, "checksum", record.column("checksum").cast(pa.float64(), safe=False)),
        record.set_column(0, "sample", pa.array([b"short"] * 4, pa.binary(5))),
        record.set_column(1, "teacher", pa.array([None] * 4, pa.binary(32))),
    ]
    changed = [record.replace_schema_metadata(metadata) for metadata in bad]
    changed += [other.replace_schema_metadata(record.schema.metadata) for other in columns]
    for other in changed:
        assert not check_form(other)
        with pytest.raises(SignalDamaged):
            decode(other, signal.spec, TEACHER, batch, signal.head)


def test_nulls_in_any_layer_are_damage(sent):
    batch, signal, record = sent
    column = record.column("values")
    offsets, inner = column.offsets, column.values
    mask = np.zeros(len(inner), dtype=bool)
    mask[2] = True
    if pa.types.is_fixed_size_list(inner.type):
        flat = inner.values
        deep = np.zeros(len(flat), dtype=bool)
        deep[3] = True
        nulls = [
            pa.FixedSizeListArray.from_arrays(flat, inner.type.list_size, mask=pa.array(mask)),
            pa.FixedSizeListArray.from_arrays(pa.array(flat.to_numpy(), mask=deep, type=flat.type), inner.type.list_size),
        ]
    else:
        nulls = [pa.array(inner.to_numpy(), mask=mask, type=inner.type)]
    arrays = [pa.LargeListArray.from_arrays(offsets, array) for array in nulls]
    arrays.append(pa.LargeListArray.from_arrays(offsets, inner, mask=pa.array([False, False, True, False])))
    for array in arrays:
        fields = list(record.schema)
        fields[3] = pa.field("values", array.type)
        changed = pa.RecordBatch.from_arrays(
            [*record.columns[:3], array, *record.columns[4:]], schema=pa.schema(fields, record.schema.metadata)
        )
        with pytest.raises(SignalDamaged):
            decode(changed, signal.spec, TEACHER, batch, signal.head)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[-1]], ids=lambda spec: spec.kind)
@pytest.mark.parametrize(
    "offsets",
    [[-1, 2, 2, 5, 6], [0, 2, 1, 5, 6], [0, 2, 2, 5, 1 << 40], [0, 3, 3, 5, 6], [0, 2, 2, 5, 5], [1, 2, 2, 5, 6]],
    ids=str,
)
def test_wrong_offsets_are_damage(spec, offsets):
    batch = make_batch([2, 0, 3, 1])
    mutable = Mutable(encode(make_signal(spec, batch), batch, CLASSES))
    start = next(start for number, start, size in mutable.buffers if number == 3)
    assert np.frombuffer(mutable.data, np.int64, 5, start).tolist() == [0, 2, 2, 5, 6]
    mutable.data[start : start + 40] = np.asarray(offsets, dtype=np.int64).tobytes()
    with pytest.raises(SignalDamaged):
        decode(mutable.record, spec, TEACHER, batch)


def test_lists_of_another_width_are_damage():
    batch = make_batch([2, 0, 2])
    spec = SignalSpec("dense")
    record = encode(make_signal(spec, batch, classes=6), batch, 6)
    flat = record.column("values").values.values
    for width in (3, 2, 12, 0):
        kind = pa.list_(pa.float32(), width)
        rows = pa.FixedSizeListArray.from_buffers(kind, 24 // width if width else 4, [None], children=[flat])
        scaled = pa.array([0, 2, 2, 4], pa.int64()) if width < 6 else pa.array([0, 1, 1, 2], pa.int64())
        column = pa.LargeListArray.from_arrays(scaled, rows)
        schema = record.schema.set(3, pa.field("values", column.type))
        with pytest.raises(SignalDamaged):
            decode(pa.RecordBatch.from_arrays([*record.columns[:3], column], schema=schema), spec, TEACHER, batch)


_TYPES = st.sampled_from(
    [
        *(pa.binary(16), pa.binary(32), pa.uint64(), pa.int8(), pa.string(), pa.null(), pa.list_(pa.uint32())),
        *(pa.large_list(pa.uint16()), pa.list_(pa.float32(), 3)),
        *(pa.large_list(pa.list_(pa.float32(), 3)), pa.large_list(pa.list_(pa.float32(), 0))),
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    names=st.lists(st.sampled_from(["sample", "teacher", "checksum", "values", "logprobs", "x"]), max_size=5),
    types=st.lists(_TYPES, min_size=5, max_size=5),
    spec=st.sampled_from(SPECS),
    rows=st.integers(0, 4),
)
def test_any_other_schema_is_damage(names, types, spec, rows):
    batch = make_batch([1] * rows)
    arrays = [pa.nulls(rows, kind) for _, kind in zip(names, types, strict=False)]
    metadata = {"format": FORMAT, "parameters": spec.parameters}
    schema = pa.schema([pa.field(name, array.type) for name, array in zip(names, arrays, strict=True)], metadata)
    record = pa.RecordBatch.from_arrays(arrays, schema=schema)
    with pytest.raises((SignalDamaged, SignalMismatch)):
        decode(record, spec, TEACHER, batch, Head(torch.zeros(2, 2), None))


def test_random_bytes_of_a_stream_never_crash():
    """What a network or a disk may hand over: each read gives the signal, an Arrow error, or a refusal."""
    batch = make_batch([2, 0, 3, 1])
    rng = random.Random(0)
    refused = 0
    for spec in SPECS:
        signal = make_signal(spec, batch)
        record = encode(signal, batch, CLASSES)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, record.schema) as writer:
            writer.write_batch(record)
        whole = sink.getvalue().to_pybytes()
        sent = content(as_sent(signal))
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.choice([1, 1, 4])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            try:
                found = decode(pa.ipc.open_stream(bytes(data)).read_next_batch(), spec, TEACHER, batch, signal.head)
            except (SignalDamaged, SignalMismatch, pa.ArrowException, OSError, StopIteration, KeyError, TypeError, ValueError):
                refused += 1
            else:
                assert content(found) == sent
    assert refused > 300

"""Signals and their Arrow form: what is decoded is what was sent, and nothing else is ever decoded."""

import dataclasses
import random

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd.batch import Batch
from megapd.signal import (
    DTYPES,
    FORMAT,
    HEAD_CHUNK_BYTES,
    Head,
    Signal,
    SignalDamaged,
    SignalMismatch,
    SignalSpec,
    as_sent,
    check_form,
    decode,
    decode_head,
    encode,
    encode_head,
    negotiate,
    quantize,
    valid_rows,
)

TEACHER, OTHER = "0123456789abcdef" * 4, "fe" * 32
LENGTH, CLASSES, WIDTH = 6, 11, 5
SPECS = [
    *(SignalSpec("dense", encoding) for encoding in ("fp32", "bf16", "fp16")),
    *(SignalSpec("hidden", encoding) for encoding in ("fp32", "bf16", "fp16", "int8")),
    *(SignalSpec("topk", encoding, k=3, temperature=0.5) for encoding in ("fp32", "bf16", "fp16")),
    SignalSpec("sampled", k=4, temperature=2.0, seed=7),
    SignalSpec("argmax"),
]


def make_batch(counts, seed=0, segments=False):
    """A batch whose samples have `counts` labelled positions."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randperm(LENGTH, generator=generator)[:count].sort().values + LENGTH * i for i, count in enumerate(counts)]
    positions = torch.cat([torch.empty(0, dtype=torch.int64), *places])
    ids = torch.randint(0, 50, (len(counts), LENGTH), generator=generator)
    return Batch(ids, ids // 25 if segments else None, positions, torch.zeros_like(positions), torch.arange(len(counts)))


def make_signal(spec, batch, seed=0, classes=CLASSES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    n, k = batch.labelled, spec.k
    shape = {"dense": (n, classes), "hidden": (n, WIDTH), "argmax": (n,)}.get(spec.kind, (n, k))
    if spec.kind in ("dense", "hidden"):
        values = torch.randn(shape, generator=generator).to(dtype)
    else:
        values = torch.randint(0, classes, shape, generator=generator)
    head = Head(torch.randn(classes, WIDTH, generator=generator), None) if spec.kind == "hidden" else None
    topk = spec.kind == "topk"
    logprobs = torch.randn(n, k, generator=generator) if topk else None
    return Signal(spec, TEACHER, batch.digest, values, head, logprobs, torch.randn(n, generator=generator) if topk else None)


def through_stream(record):
    """The record batch as another process reads it from an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, record.schema) as writer:
        writer.write_batch(record)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def bits(tensor):
    if tensor is None:
        return None
    same_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(same_size).numpy().tobytes()


def content(signal):
    tensors = (signal.values, signal.logprobs, signal.log_rest)
    return (signal.spec, signal.teacher, signal.samples, *map(bits, tensors))


# -------------------------------------------------------------------------------------------------------------- batches


def test_digests_of_samples_do_not_depend_on_their_batch():
    batch = make_batch([2, 0, 3, 1], segments=True)
    for start in range(4):
        for stop in range(start + 1, 5):
            part = batch.select(slice(start, stop))
            assert part.sample_digests.tobytes() == batch.sample_digests[start:stop].tobytes()
            assert part.counts.tolist() == batch.counts.tolist()[start:stop]
            assert part.sample_ids.tolist() == list(range(start, stop))
    assert len(set(batch.sample_digests.tolist())) == 4


def test_concatenate_is_the_inverse_of_select():
    batch = make_batch([2, 0, 3, 1], segments=True)
    parts = [batch.select(slice(0, 1)), batch.select(slice(1, 3)), batch.select(slice(3, 4))]
    whole = Batch.concatenate(parts)
    assert whole.digest == batch.digest
    for name in ("ids", "segments", "positions", "labels", "sample_ids"):
        assert torch.equal(getattr(whole, name), getattr(batch, name))


def test_every_part_of_what_is_asked_is_in_the_digest_of_a_sample():
    batch = make_batch([2, 1], segments=True)
    changed = [
        dataclasses.replace(batch, ids=batch.ids + torch.tensor([[1], [0]])),
        dataclasses.replace(batch, segments=batch.segments + torch.tensor([[1], [0]])),
        dataclasses.replace(batch, segments=None),
        dataclasses.replace(batch, positions=batch.positions[1:], labels=batch.labels[1:]),
    ]
    digests = [batch.sample_digests.tolist(), *(other.sample_digests.tolist() for other in changed)]
    assert len({pair[0] for pair in digests}) == 5
    assert digests[1][1] == digests[2][1] == digests[4][1] == digests[0][1]  # the second sample was left alone


def test_a_moved_batch_hashes_nothing_again():
    batch = make_batch([2, 1])
    known = batch.sample_digests
    assert batch.to("cpu").sample_digests is known


# ----------------------------------------------------------------------------------------------------- what is sent arrives


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.encoding}")
@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0], [2, 0, 3, 1], [0, 6], [4, 0]], ids=str)
def test_a_signal_arrives_as_it_was_sent(spec, counts):
    batch = make_batch(counts)
    signal = make_signal(spec, batch)
    record = through_stream(encode(signal, batch, CLASSES))
    assert record.num_rows == batch.samples
    assert check_form(record)
    assert valid_rows(record).all()
    decoded = decode(record, spec, TEACHER, batch, signal.head)
    assert content(decoded) == content(as_sent(signal))
    assert decoded.head is signal.head
    decoded.check(TEACHER, batch)


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    counts=st.lists(st.integers(0, LENGTH), max_size=6),
    classes=st.sampled_from([2, 300, 1 << 16, (1 << 16) + 1, 151_936]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_signal_arrives_as_it_was_sent(spec, counts, classes, dtype, seed):
    batch = make_batch(counts, seed)
    wide = classes if spec.kind not in ("dense", "hidden") else min(classes, 300)
    signal = make_signal(spec, batch, seed, wide, dtype)
    decoded = decode(through_stream(encode(signal, batch, classes)), spec, TEACHER, batch, signal.head)
    assert content(decoded) == content(as_sent(signal))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.encoding}")
def test_records_are_cut_and_joined_at_samples(spec):
    batch = make_batch([2, 0, 3, 1, 0])
    signal = make_signal(spec, batch)
    record = encode(signal, batch, CLASSES)
    sent, first = as_sent(signal), 0
    for start in range(5):
        for stop in range(start, 6):
            first, last = int(batch.counts[:start].sum()), int(batch.counts[:stop].sum())
            part = decode(record.slice(start, stop - start), spec, TEACHER, batch.select(slice(start, stop)), signal.head)
            assert bits(part.values) == bits(sent.values[first:last])
            if spec.kind == "topk":
                assert bits(part.logprobs) == bits(sent.logprobs[first:last])
                assert bits(part.log_rest) == bits(sent.log_rest[first:last])
    pieces = [record.slice(0, 2), record.slice(2, 1), record.slice(3, 2)]
    columns = [pa.concat_arrays([piece.column(name) for piece in pieces]) for name in record.schema.names]
    joined = pa.RecordBatch.from_arrays(columns, schema=record.schema)
    assert content(decode(joined, spec, TEACHER, batch, signal.head)) == content(sent)


def test_special_values_keep_their_bits():
    batch = make_batch([2, 1])
    values = torch.tensor([[float("nan"), -0.0, float("inf")], [1e-45, -float("inf"), 3.4e38], [0.0, 1.0, -1.0]])
    for encoding in ("fp32", "bf16", "fp16"):
        spec = SignalSpec("dense", encoding)
        signal = Signal(spec, TEACHER, batch.digest, values)
        decoded = decode(through_stream(encode(signal, batch, 3)), spec, TEACHER, batch)
        assert bits(decoded.values) == bits(values.to(DTYPES[encoding]))


def test_ids_of_the_last_class_fit():
    batch = make_batch([1])
    for classes, bytes_an_id in ((1 << 16, 2), ((1 << 16) + 1, 4), (1 << 32, 4)):
        signal = Signal(SignalSpec("argmax"), TEACHER, batch.digest, torch.tensor([classes - 1]))
        record = through_stream(encode(signal, batch, classes))
        assert record.column("values").values.type.bit_width == 8 * bytes_an_id
        assert decode(record, signal.spec, TEACHER, batch).values.tolist() == [classes - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_within_half_a_step_of_the_largest_value(dtype):
    values = (torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 400)[:, None]).to(dtype)
    values[0] = 0.0
    steps, scale = quantize(values, "int8")
    sent = steps.float() * scale[:, None]
    bound = values.float().abs().amax(-1, keepdim=True) / 127.0 / 2.0
    assert ((sent - values.float()).abs() <= bound * (1.0 + 1e-4)).all()
    assert (sent - values.float()).abs().max() > 0.0
    assert not sent[0].any()
    again, scale_again = quantize(sent, "int8")
    assert torch.equal(again.float() * scale_again[:, None], sent)  # a decoded signal may be sent again


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.encoding}")
@pytest.mark.parametrize("classes", [1000, 70_000])
def test_bytes_per_position_are_those_of_the_record(spec, classes):
    batch = make_batch([6, 5, 4])
    wide = classes if spec.kind != "dense" else 1000
    record = encode(make_signal(spec, batch, classes=wide), batch, wide)
    stored = sum(record.column(name).buffers()[-1].size for name in record.schema.names[3:])
    assert stored / batch.labelled == spec.bytes_per_position(wide, WIDTH)


# ---------------------------------------------------------------------------------------------------- what is wrong is refused


@pytest.fixture(params=SPECS, ids=lambda spec: f"{spec.kind}-{spec.encoding}")
def sent(request):
    batch = make_batch([2, 0, 3, 1])
    signal = make_signal(request.param, batch)
    return batch, signal, encode(signal, batch, CLASSES)


class Mutable:
    """A record batch as it lies in an Arrow stream, whose bytes can be changed under it."""

    def __init__(self, record):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, record.schema) as writer:
            writer.write_batch(record)
        self.data = bytearray(sink.getvalue())
        base = pa.py_buffer(self.data)
        self.record = pa.ipc.open_stream(base).read_next_batch()
        #: (column, first byte, bytes) of each buffer
        self.buffers = [
            (number, buffer.address - base.address, buffer.size)
            for number, column in enumerate(self.record.columns)
            for buffer in column.buffers()
            if buffer is not None
        ]


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


# --------------------------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.encoding}")
def test_parameters_name_the_spec(spec):
    parsed = SignalSpec.parse(spec.parameters)
    assert parsed == spec
    assert SignalSpec.parse(spec.parameters.encode()).parameters == spec.parameters


def test_parameters_hold_what_matters_alone():
    assert len({spec.parameters for spec in SPECS}) == len(SPECS)
    assert SignalSpec("argmax", "bf16", seed=3).parameters == SignalSpec("argmax").parameters
    assert SignalSpec("dense", seed=3).parameters == SignalSpec("dense").parameters
    assert SignalSpec("sampled", k=2, seed=1).parameters != SignalSpec("sampled", k=2, seed=2).parameters


@pytest.mark.parametrize(
    "parameters",
    ["", "{", "null", "[]", '"dense"', "7", "{}", '{"kind": "logits"}', '{"kind": []}', '{"kind": "dense", "more": 1}']
    + ['{"kind": "dense", "encoding": "fp64"}', '{"kind": "dense", "k": 3}', '{"kind": "topk", "k": 0}', '{"kind": "topk"}']
    + ['{"kind": "topk", "k": true}', '{"kind": "topk", "k": 1.5}', '{"kind": "topk", "k": -1}', '{"kind": "topk", "k": "3"}']
    + ['{"kind": "sampled", "k": 3, "seed": -1}', '{"kind": "sampled", "k": 3, "seed": null}', '{"kind": "topk", "k": 9999999}']
    + [f'{{"kind": "topk", "k": 3, "temperature": {value}}}' for value in ("0", "-1", "NaN", "Infinity", "true", '"1"')]
    + ['{"kind": "dense", "encoding": "int8"}', '{"kind": "topk", "k": 3, "encoding": "int8"}', "[" * 100_000, "9" * 5000],
    ids=lambda text: text[:60],
)
def test_nonsense_is_no_spec(parameters):
    with pytest.raises(ValueError):  # noqa: PT011 - json and the checks each have their words
        SignalSpec.parse(parameters)


def test_bytes_that_are_no_text_are_no_spec():
    with pytest.raises(ValueError):  # noqa: PT011
        SignalSpec.parse(b"\xff\xfe\xfd")


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"kind": "topk"}, "k:"),
        ({"kind": "argmax", "k": 2}, "k:"),
        ({"kind": "topk", "k": -1}, "k:"),
        ({"kind": "sampled", "k": 2, "temperature": 0.0}, "temperature:"),
        ({"kind": "topk", "k": 2, "temperature": float("nan")}, "temperature:"),
        ({"kind": "dense", "encoding": "int8"}, "encoding:"),
    ],
)
def test_impossible_specs_are_refused(fields, setting):
    with pytest.raises(ValueError, match=f"^{setting}"):
        SignalSpec(**fields)


def test_negotiation_takes_the_cheapest_exact_kind():
    for divergence in ("forward_kl", "soft_cross_entropy"):
        assert negotiate(30_000, 768, 0.0, divergence) == "argmax"
    for divergence in ("reverse_kl", "jsd", "tvd"):
        assert negotiate(30_000, 768, 0.0, divergence) == "hidden"
    assert negotiate(30_000, 768, 1.0, "forward_kl") == "hidden"
    assert negotiate(768, 768, 1.0, "forward_kl") == "dense"  # V <= D
    assert negotiate(769, 768, 1.0, "forward_kl") == "hidden"


@pytest.mark.parametrize(("classes", "width"), [(1000, 100), (50_304, 768), (30_522, 128)])
def test_negotiation_counts_the_head_once_a_rotation(classes, width):
    """Dense costs V a position; hidden D, and V * D once a rotation: equal at V * D / (V - D) positions."""
    even = classes * width / (classes - width)
    for positions in (0.5 * even, 0.99 * even, 1.01 * even, 2 * even):
        cheapest = "dense" if classes * positions <= width * positions + classes * width else "hidden"
        assert negotiate(classes, width, 1.0, "forward_kl", positions) == cheapest
    assert negotiate(classes, width, 1.0, "forward_kl", 0.99 * even) == "dense"
    assert negotiate(classes, width, 1.0, "forward_kl", 1.01 * even) == "hidden"


# --------------------------------------------------------------------------------------------------------------------- heads


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


def test_int8_keeps_what_is_not_finite():
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # as GPUs write it
    for special in (nan, torch.tensor([float("nan")]), torch.tensor([float("inf")]), torch.tensor([-float("inf")])):
        steps, scale = quantize(torch.cat([torch.ones(3), special])[None], "int8")
        assert not (steps.float() * scale[:, None]).isfinite().any()

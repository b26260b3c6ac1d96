"""Signals and their Arrow form: what is decoded is what was sent."""

import dataclasses

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd.batch import Batch
from megapd.signals import DTYPES, Head, Signal, SignalSpec, as_sent, check_form, decode, encode, negotiate, pack, valid_rows
from megapd.signals.signal import quantize
from tests.signals.examples import (
    CLASSES,
    LENGTH,
    SPECS,
    TEACHER,
    WIDTH,
    bits,
    content,
    make_batch,
    make_signal,
    through_stream,
)

# ----------------------------------------------------------------------------------------------------------------------- batches


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


# ---------------------------------------------------------------------------------------------------------- what is sent arrives


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("spec", "fields", "finite"),
    [
        (SignalSpec("dense"), {"values": [[0.0, -INF], [1.0, 2.0]]}, True),
        (SignalSpec("dense"), {"values": [[0.0, NAN], [1.0, 2.0]]}, False),
        (SignalSpec("dense"), {"values": [[0.0, INF], [1.0, 2.0]]}, False),
        (SignalSpec("dense"), {"values": [[-INF, -INF], [1.0, 2.0]]}, False),
        (SignalSpec("dense"), {"values": []}, True),
        (SignalSpec("hidden"), {"values": [[0.0, -INF]], "head": True}, False),
        (SignalSpec("hidden", "int8"), {"values": [[NAN, 1.0]], "head": True}, False),
        (SignalSpec("topk", k=1), {"values": [[1]], "logprobs": [[0.0]], "log_rest": [-INF]}, True),
        (SignalSpec("topk", k=1), {"values": [[1]], "logprobs": [[-1.0]], "log_rest": [NAN]}, False),
        (SignalSpec("topk", k=1), {"values": [[1]], "logprobs": [[NAN]], "log_rest": [-1.0]}, False),
        (SignalSpec("argmax"), {"values": [1, 0]}, True),
        (SignalSpec("argmax"), {"values": [1, 0], "doubt": 0.0}, True),
        (SignalSpec("argmax"), {"values": [1, 0], "doubt": NAN}, False),
    ],
)
def test_what_is_no_number_is_found_packed_or_not(spec, fields, finite):
    head = Head(torch.zeros(2, 2), None) if fields.pop("head", False) else None
    signal = Signal(spec, "0" * 64, "", head=head, **{name: torch.tensor(value) for name, value in fields.items()})
    assert signal.finite() == pack(signal).finite() == finite


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


def test_int8_keeps_what_is_not_finite():
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # as GPUs write it
    for special in (nan, torch.tensor([float("nan")]), torch.tensor([float("inf")]), torch.tensor([-float("inf")])):
        steps, scale = quantize(torch.cat([torch.ones(3), special])[None], "int8")
        assert not (steps.float() * scale[:, None]).isfinite().any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.encoding}")
@pytest.mark.parametrize("classes", [1000, 70_000])
def test_bytes_per_position_are_those_of_the_record(spec, classes):
    batch = make_batch([6, 5, 4])
    wide = classes if spec.kind != "dense" else 1000
    record = encode(make_signal(spec, batch, classes=wide), batch, wide)
    stored = sum(record.column(name).buffers()[-1].size for name in record.schema.names[3:])
    assert stored / batch.labelled == spec.bytes_per_position(wide, WIDTH)


# ------------------------------------------------------------------------------------------------------------------------- specs


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

"""Kinds of signals: one object each, the package's own and others registered the same way."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from megapd.config import load
from megapd.errors import SignalMismatch, UserError
from megapd.models import LossHead
from megapd.registry import signal_kinds
from megapd.schedule.plan import Plan
from megapd.signals import (
    Answer,
    Column,
    Head,
    Signal,
    SignalKind,
    SignalSpec,
    TeacherOutput,
    as_sent,
    decode,
    definition_of,
    encode,
    negotiate,
)
from megapd.tasks import build_task
from megapd.teacher.cache import SignalCache
from megapd.teacher.setup import signal_spec
from megapd.trajectory import Checkpoint
from megapd_kernels import LossOptions
from tests.signals.examples import CLASSES, SPECS, TEACHER, WIDTH, content, make_batch, make_signal, through_stream

# blake2b of the records' checksums, which cover parameters, digests and columns: what is recorded must be read for ever.
RECORDED = {
    '{"encoding": "fp32", "kind": "dense"}': "fe3caa2e243126b7",
    '{"encoding": "bf16", "kind": "dense"}': "cd5f0fd3c3db1bfd",
    '{"encoding": "fp16", "kind": "dense"}': "ddb7299c7b6d17f2",
    '{"encoding": "fp32", "kind": "hidden"}': "103378822014b6d2",
    '{"encoding": "bf16", "kind": "hidden"}': "59bb40637630e877",
    '{"encoding": "fp16", "kind": "hidden"}': "21e2d823698a9bbc",
    '{"encoding": "int8", "kind": "hidden"}': "06472de49c37ae73",
    '{"encoding": "fp32", "k": 3, "kind": "topk", "temperature": 0.5}': "d416fa808576f0fc",
    '{"encoding": "bf16", "k": 3, "kind": "topk", "temperature": 0.5}': "8b0b01c4712879f6",
    '{"encoding": "fp16", "k": 3, "kind": "topk", "temperature": 0.5}': "5265cd18d016dabb",
    '{"k": 4, "kind": "sampled", "seed": 7, "temperature": 2.0}': "d159d719c9ab5eea",
    '{"kind": "argmax"}': "a6a8d9b77d922904",
}


class Coarse(SignalKind):
    """A kind from outside: the teacher's logits to the nearest half."""

    uses = ("encoding",)
    encodings = ("bf16",)

    def columns(self, spec):
        return (Column("values", "encoded", "classes"),)

    def answer(self, spec, batch, output):
        return Answer(2.0 * torch.cat([output.logits(rows) for rows in output.chunks()]).round() / 2.0)

    def targets(self, answer, head):
        return {"teacher_logits": answer.values.float()}

    def exact(self, teacher_temperature, divergence):
        return divergence == "tvd"

    def values_per_position(self, classes, width, positions_per_rotation):
        return classes / 4


@pytest.fixture
def coarse():
    assert signal_kinds.register("coarse")(Coarse) is Coarse
    yield SignalSpec("coarse", "bf16")
    del signal_kinds._entries["coarse"]
    definition_of.cache_clear()


def test_records_stay_as_they_were_written():
    batch = make_batch([2, 0, 3, 1])
    found = {}
    for spec in SPECS:
        record = encode(make_signal(spec, batch), batch, CLASSES)
        found[spec.parameters] = hashlib.blake2b(record.column("checksum").to_numpy().tobytes(), digest_size=8).hexdigest()
    assert found == RECORDED


def test_a_kind_from_outside_is_answered_carried_kept_and_learned_from(coarse, tmp_path):
    batch, generator = make_batch([2, 0, 3, 1]), torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.labelled, WIDTH, generator=generator)
    head = Head(torch.randn(CLASSES, WIDTH, generator=generator), None)
    answer = coarse.answer(batch, TeacherOutput(hidden, head, chunk_bytes=100))
    assert torch.equal(answer.values, 2.0 * (hidden @ head.weight.T).round() / 2.0)

    assert SignalSpec.parse(coarse.parameters) == coarse
    assert coarse.parameters == '{"encoding": "bf16", "kind": "coarse"}'
    assert coarse.bytes_per_position(CLASSES, WIDTH) == 2 * CLASSES
    signal = Signal(coarse, TEACHER, batch.digest, *answer)
    record = through_stream(encode(signal, batch, CLASSES))
    assert content(decode(record, coarse, TEACHER, batch)) == content(as_sent(signal))
    with pytest.raises(SignalMismatch):
        decode(record, SignalSpec("dense", "bf16"), TEACHER, batch)

    for _ in range(2):  # recorded, then read by another process
        cache = SignalCache(tmp_path)
        cache.record(signal, batch, CLASSES)
        assert content(cache.lookup(TEACHER, coarse, batch)) == content(as_sent(signal))
        cache.close()

    student = LossHead(WIDTH, CLASSES, bias=False, options=LossOptions())
    torch.nn.init.normal_(student.weight, generator=generator)
    found = student(hidden, batch.labels, as_sent(signal)).loss
    expected = F.kl_div(
        F.log_softmax(hidden @ student.weight.T, -1),
        F.log_softmax(answer.values, -1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_kind_from_outside_is_negotiated(coarse):
    assert negotiate(CLASSES, WIDTH, 1.0, "tvd") == "coarse"
    assert negotiate(CLASSES, WIDTH, 1.0, "jsd") == "hidden"


def test_a_kind_from_outside_is_a_setting(coarse):
    settings = ["--teacher.trajectory=x", "--schedule.policy=one_shot", "--teacher.precision=bf16"]
    config = load(None, [*settings, "--teacher.signal=coarse"])
    theirs = {"hugging_face": {"vocab_size": CLASSES, "hidden_size": WIDTH}}
    checkpoint = Checkpoint(10, Path("nowhere"), TEACHER, "", theirs, {}, {})
    found = signal_spec(config, build_task(config), Plan("one_shot", 100, ((0, 10),)), checkpoint)
    assert found == coarse
    with pytest.raises(UserError, match=r"teacher\.signal: Input should be 'auto', 'dense', .*'coarse'"):
        load(None, [*settings, "--teacher.signal=coarsest"])


def test_what_a_kind_does_not_have_is_refused(coarse):
    with pytest.raises(ValueError, match=r"^encoding: .*coarse"):
        SignalSpec("coarse", "fp32")
    with pytest.raises(ValueError, match=r"^k: 2 with kind coarse, which has none"):
        SignalSpec("coarse", "bf16", k=2)
    with pytest.raises(UserError, match="Coarse is signal kind 'coarse' already"):
        signal_kinds.register("coarse")(Coarse)
    with pytest.raises(UserError, match=r"^unknown signal kind 'coarsest'; the nearest is 'coarse'"):
        SignalSpec("coarsest")

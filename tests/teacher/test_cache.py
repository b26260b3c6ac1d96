"""The disk cache: what was recorded comes back bit for bit, whatever asks for it, and nothing else ever does."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from megapd.schedule.plan import Plan
from megapd.signals import SignalSpec, as_sent
from megapd.teacher.cache import CachedStream
from megapd.teacher.cache.parts import Index
from tests.teacher.caching import (
    CLASSES,
    GLOBAL,
    PLAN,
    SPECS,
    STEPS,
    Source,
    Steps,
    answer,
    batch_at,
    bits,
    digest,
    make_cache,
    parts,
    recorded,
    replay,
    tiles,
    walk,
)

# ------------------------------------------------------------------------------------------------------------------------ replay


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.encoding}")
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_replay_is_bitwise_the_run_that_recorded(tmp_path, spec, ahead):
    taught = recorded(tmp_path, spec)
    stream = replay(tmp_path, spec)
    again = walk(stream, ahead=ahead)
    for step, expected in taught.items():
        assert [bits(signal) for signal in again[step]] == [bits(signal) for signal in expected]
        raw = [as_sent(answer(spec, PLAN.checkpoint_at(step), batch)) for batch in tiles(step, 3)]
        assert [bits(signal) for signal in again[step]] == [bits(signal) for signal in raw]
    assert stream.counts == {"hits": STEPS * GLOBAL, "misses": 0, "recorded": 0, "damaged": 0}
    stream.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_source_is_not_asked_for_what_is_there(tmp_path, ahead):
    spec = SPECS[2]
    recorded(tmp_path, spec)
    source = Source(spec)
    stream = replay(tmp_path, spec, source=source)
    walk(stream, ahead=ahead)
    assert (source.asked, source.requested, source.rotations) == ([], [], [])
    assert stream.teacher(7).step == 30
    assert source.rotations == []
    stream.close()


def test_a_source_is_asked_for_what_is_missing_alone(tmp_path):
    spec = SPECS[0]
    known = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), Source(spec), classes=CLASSES)
    walk(known, steps=range(0, 5))
    known.close()
    source = Source(spec)
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), source, classes=CLASSES)
    taken = walk(stream, ahead=2)
    lacking = [(step, [batch.digest for batch in tiles(step, 3)]) for step in range(5, STEPS)]
    assert source.asked == lacking
    assert source.requested == lacking
    assert [bits(signal) for signal in taken[6]] == [bits(answer(spec, 30, batch)) for batch in tiles(6, 3)]
    stream.close()
    assert stream.counts == {"hits": 5 * GLOBAL, "misses": 3 * GLOBAL, "recorded": 3 * GLOBAL, "damaged": 0}
    walk(replay(tmp_path, spec))


@pytest.mark.parametrize("micro", [1, 2, 6])
@pytest.mark.parametrize("ranks", [1, 2])
def test_other_micro_batches_and_ranks_find_the_same_rows(tmp_path, micro, ranks):
    spec = SPECS[3]
    recorded(tmp_path, spec, micro=3)
    if GLOBAL % (micro * ranks):
        ranks = 3
    for rank in range(ranks):
        stream = replay(tmp_path, spec)
        taken = walk(stream, micro, rank=rank, ranks=ranks)
        for step, signals in taken.items():
            expected = [as_sent(answer(spec, PLAN.checkpoint_at(step), batch)) for batch in tiles(step, micro, rank, ranks)]
            assert [bits(signal) for signal in signals] == [bits(signal) for signal in expected]


def test_rows_of_many_parts_are_put_together(tmp_path):
    """Every part holds one micro-batch of one rank; a batch of all rows takes from six of them, not in their order."""
    spec = SPECS[4]
    cache = make_cache(tmp_path, part_bytes=1)
    for start in (4, 1, 0, 5, 3, 2):
        batch = batch_at(0, range(start, start + 1))
        cache.record(answer(spec, 10, batch), batch, CLASSES)
    cache.close()
    assert len(parts(tmp_path)) == 6
    whole = batch_at(0, range(6))
    assert bits(make_cache(tmp_path).lookup(digest(10), spec, whole)) == bits(as_sent(answer(spec, 10, whole)))
    shuffled = batch_at(0, [3, 3, 0, 5])
    assert bits(make_cache(tmp_path).lookup(digest(10), spec, shuffled)) == bits(as_sent(answer(spec, 10, shuffled)))


def test_rows_that_lie_together_are_read_without_a_copy(tmp_path):
    spec = SignalSpec("dense")
    recorded(tmp_path, spec, micro=3)
    before = pa.total_allocated_bytes()
    found = make_cache(tmp_path).lookup(digest(10), spec, batch_at(1, range(6)))
    maps = Path("/proc/self/maps").read_text()
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps.splitlines() if "part-" in line]
    assert any(low <= found.values.data_ptr() < high for low, high in ranges)
    assert pa.total_allocated_bytes() - before < 1 << 16


def test_a_changed_schedule_uses_what_still_holds(tmp_path):
    spec = SPECS[0]
    recorded(tmp_path, spec)
    later = Plan("explicit", STEPS, ((0, 10), (5, 20), (6, 30)))  # steps 3 and 4 change their teacher, 5 to 7 keep it
    source = Source(spec, later)
    stream = CachedStream(make_cache(tmp_path), later, spec, Steps(), source, classes=CLASSES)
    taken = walk(stream)
    assert [step for step, _ in source.asked] == [3, 4]
    for step, signals in taken.items():
        expected = [answer(spec, later.checkpoint_at(step), batch) for batch in tiles(step, 3)]
        assert [bits(signal) for signal in signals] == [bits(signal) for signal in expected]
    stream.close()
    for plan in (PLAN, later):
        walk(replay(tmp_path, spec, plan))


def test_other_parameters_are_other_signals(tmp_path):
    recorded(tmp_path, SPECS[4])
    for other in (SPECS[0], SignalSpec("topk", "bf16", k=2), SignalSpec("topk", "bf16", k=3, temperature=2.0)):
        assert make_cache(tmp_path).lookup(digest(10), other, batch_at(0, range(3))) is None
    recorded(tmp_path, SPECS[0])
    walk(replay(tmp_path, SPECS[4]))
    walk(replay(tmp_path, SPECS[0]))


def test_rows_that_were_there_stay_as_they_are(tmp_path):
    """A batch of which some rows were recorded in another tiling, with other rounding: a replay reads what taught."""
    spec = SPECS[0]
    cache = make_cache(tmp_path)
    early = batch_at(0, range(1, 3))
    cache.record(answer(spec, 10, early, noise=1e-3), early, CLASSES)
    cache.flush()
    whole = batch_at(0, range(6))
    assert cache.lookup(digest(10), spec, whole) is None
    given = cache.record(answer(spec, 10, whole), whole, CLASSES)
    cache.close()
    first, last = int(whole.counts[:1].sum()), int(whole.counts[:3].sum())
    assert torch.equal(given.values[first:last], answer(spec, 10, early, noise=1e-3).values)
    assert torch.equal(given.values[last:], answer(spec, 10, whole).values[last:])
    assert bits(make_cache(tmp_path).lookup(digest(10), spec, whole)) == bits(given)
    assert cache.counts["recorded"] == 6


def test_what_is_not_written_yet_is_found(tmp_path):
    cache, batch = make_cache(tmp_path), batch_at(0, range(6))
    cache.record(answer(SPECS[0], 10, batch), batch, CLASSES)
    part = batch_at(0, range(2, 4))
    assert bits(cache.lookup(digest(10), SPECS[0], part)) == bits(answer(SPECS[0], 10, part))
    again = cache.record(answer(SPECS[0], 10, batch, noise=1.0), batch, CLASSES)
    assert bits(again) == bits(answer(SPECS[0], 10, batch))
    cache.close()
    assert cache.counts["recorded"] == 6


def test_the_signals_memory_may_be_used_again(tmp_path):
    """A carrier overwrites its buffers while the part is still pending."""
    cache, batch = make_cache(tmp_path), batch_at(0, range(6))
    given = answer(SPECS[2], 10, batch)
    cache.record(given, batch, CLASSES)
    given.values.zero_()
    given.head.weight.zero_()
    cache.close()
    assert bits(make_cache(tmp_path).lookup(digest(10), SPECS[2], batch)) == bits(as_sent(answer(SPECS[2], 10, batch)))


def test_parts_are_closed_by_size_age_and_teacher(tmp_path):
    cache = make_cache(tmp_path / "size", part_bytes=800)
    for step in range(3):
        for batch in tiles(step, 1):
            cache.record(answer(SPECS[0], 10, batch), batch, CLASSES)
    cache.close()
    assert 2 <= len(parts(tmp_path / "size")) <= 9
    cache = make_cache(tmp_path / "age", flush_seconds=0.0)
    for batch in tiles(0, 2):
        cache.record(answer(SPECS[0], 10, batch), batch, CLASSES)
    cache.close()
    assert len(parts(tmp_path / "age")) == 3
    cache = make_cache(tmp_path / "teacher")
    for teacher in (10, 20, 20, 10):
        batch = batch_at(teacher + len(parts(tmp_path)), range(2))
        cache.record(answer(SPECS[0], teacher, batch), batch, CLASSES)
    cache.close()
    assert {part.parent.parent.name for part in parts(tmp_path / "teacher")} == {digest(10), digest(20)}
    assert not list(tmp_path.rglob("*.tmp-*"))


# --------------------------------------------------------------------------------------------------------------------- the index


def test_the_index_finds_what_was_added_first():
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (3000, 16), dtype=np.uint8)
    samples[:, :14] = 0  # many alike, and with zeros at either end
    samples[::3, 15] = 0
    digests = samples.reshape(-1).view("S16")
    index = Index(Path("nowhere"), digest(1), SPECS[0])
    places = {}
    for number, chunk in enumerate(np.split(digests, [100, 101, 1500])):
        index.add([(f"part-{number}", chunk)])
        for row, sample in enumerate(chunk.tolist()):
            places.setdefault(sample, (number, row))
    part, row = index.find(digests)
    assert list(zip(part.tolist(), row.tolist(), strict=True)) == [places[sample] for sample in digests.tolist()]
    missing = digests.copy().view(np.uint8).reshape(-1, 16)
    missing[:, 3] = 9
    assert (index.find(missing.reshape(-1).view("S16"))[0] == -1).all()
    index.drop("part-0")
    part, _ = index.find(digests)
    assert 0 not in part.tolist()
    assert set(part[1500:].tolist()) <= {1, 2, 3}

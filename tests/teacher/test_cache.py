"""The disk cache: what was recorded comes back bit for bit, whatever asks for it, and nothing else ever does."""

import logging
import multiprocessing
import os
import random
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from megapd.batch import Batch
from megapd.config import load
from megapd.errors import TeacherLost, UserError
from megapd.schedule.policies import Plan
from megapd.signal import Head, Signal, SignalSpec, as_sent
from megapd.tasks import build_task
from megapd.teacher.cache import SignalCache
from megapd.teacher.cached import CachedStream
from megapd.teacher.parts import Index, read_records
from megapd.teacher.record import record
from megapd.trajectory import Checkpoint

STEPS, GLOBAL = 8, 6
CLASSES, WIDTH = 9, 4
PLAN = Plan("explicit", STEPS, (0, 3, 6), (10, 20, 30))
SPECS = [
    SignalSpec("dense"),
    SignalSpec("dense", "bf16"),
    SignalSpec("hidden", "fp16"),
    SignalSpec("hidden", "int8"),
    SignalSpec("topk", "bf16", k=3),
    SignalSpec("sampled", k=4, seed=1),
    SignalSpec("argmax"),
]


def digest(step):
    return f"{step:064x}"


class Steps:
    """A trajectory of checkpoints that hold no weights."""

    def __init__(self, written=(10, 20, 30)):
        self.steps = written

    def written(self, step):
        return step in self.steps

    def checkpoint(self, step):
        if step not in self.steps:
            raise UserError(f"no checkpoint of step {step}")
        return Checkpoint(step, Path("nowhere"), digest(step), "", {}, {}, {})


class Source:
    """A stream of a small model's signals, which counts what it is asked."""

    def __init__(self, spec, plan=PLAN):
        self.spec, self.plan = spec, plan
        self.asked, self.requested, self.rotations = [], [], []
        self.closed = False

    def ready(self, step):
        return True

    def teacher(self, step):
        self.rotations.append(self.plan.checkpoint_at(step))
        return Steps().checkpoint(self.rotations[-1])

    def request(self, step, batches):
        self.requested.append((step, [batch.digest for batch in batches]))

    def signals(self, step, batches):
        checkpoint = self.teacher(step)
        self.asked.append((step, [batch.digest for batch in batches]))
        return (answer(self.spec, checkpoint.step, batch) for batch in batches)

    def close(self):
        self.closed = True


def answer(spec, teacher_step, batch, noise=0.0):
    """A signal that depends on the teacher and the tokens of each sample, as a model's does; noise: of another tiling."""
    generator = torch.Generator().manual_seed(teacher_step)
    table = torch.randn(64, WIDTH, generator=generator)
    weight = torch.randn(CLASSES, WIDTH, generator=generator)
    rows = batch.positions // batch.ids.shape[1]
    hidden = table[batch.ids.flatten()[batch.positions] % 64] + table[batch.ids[:, 0] % 64][rows] + noise
    # Elementwise: a matrix product may round differently for another number of rows.
    logits = (hidden.double()[:, None, :] * weight.double()).sum(-1).float()
    fields = {}
    if spec.kind == "dense":
        values = logits
    elif spec.kind == "hidden":
        values, fields = hidden, {"head": Head(weight, None)}
    elif spec.kind == "argmax":
        values = logits.argmax(-1)
    elif spec.kind == "topk":
        top = logits.log_softmax(-1).topk(spec.k)
        values, fields = top.indices, {"logprobs": top.values, "log_rest": (1 - top.values.exp().sum(-1)).log()}
    else:
        values = torch.stack([logits.argmax(-1)] * spec.k, -1)
    return Signal(spec, digest(teacher_step), batch.digest, values, **fields)


def batch_at(step, rows):
    """The rows of a step's global batch: pure functions of (step, row), with 0 to 4 labelled positions each."""
    ids, places = [], []
    for number, row in enumerate(rows):
        generator = torch.Generator().manual_seed(step * GLOBAL + row)
        ids.append(torch.randint(0, 1000, (5,), generator=generator))
        count = int(torch.randint(0, 5, (1,), generator=generator))
        places.append(torch.randperm(5, generator=generator)[:count].sort().values + 5 * number)
    positions = torch.cat(places)
    samples = torch.tensor([step * GLOBAL + row for row in rows])
    return Batch(torch.stack(ids), None, positions, torch.zeros_like(positions), samples)


def tiles(step, micro, rank=0, ranks=1):
    return [batch_at(step, range(start, start + micro)) for start in range(rank * micro, GLOBAL, ranks * micro)]


def make_cache(folder, **settings):
    return SignalCache(folder, **{"refresh_seconds": 0.0, **settings})


def walk(stream, micro=3, steps=range(STEPS), ahead=0, **tiling):
    """All signals of some steps, by step, as a loop takes them."""
    batches = {step: tiles(step, micro, **tiling) for step in steps}
    taken = {}
    for step in steps:
        for upcoming in range(step, step + ahead + 1):
            if upcoming in batches and upcoming not in getattr(stream, "known", set()):
                stream.known = {*getattr(stream, "known", set()), upcoming}
                stream.request(upcoming, batches[upcoming])
        taken[step] = list(stream.signals(step, batches[step]))
    return taken


def bits(signal):
    tensors = [signal.values, signal.logprobs, signal.log_rest, None if signal.head is None else signal.head.weight]
    return (signal.teacher, signal.samples, *((t.dtype, tuple(t.shape), t.tolist()) for t in tensors if t is not None))


def recorded(folder, spec, micro=3, **settings):
    """Record the whole plan; what the recording run was taught by."""
    source = Source(spec)
    stream = CachedStream(make_cache(folder, **settings), PLAN, spec, Steps(), source, record=True, classes=CLASSES)
    taken = walk(stream, micro)
    stream.close()
    assert source.closed
    return taken


def replay(folder, spec, plan=PLAN, source=None, **settings):
    return CachedStream(make_cache(folder, **settings), plan, spec, Steps(), source, record=False)


def parts(folder):
    return sorted(folder.glob("*/*/part-*.arrow"))


# ------------------------------------------------------------------------------------------------------------------ replay


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
    known = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), Source(spec), record=True, classes=CLASSES)
    walk(known, steps=range(0, 5))
    known.close()
    source = Source(spec)
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), source, record=True, classes=CLASSES)
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
    later = Plan("explicit", STEPS, (0, 5, 6), (10, 20, 30))  # steps 3 and 4 change their teacher, 5 to 7 keep it
    source = Source(spec, later)
    stream = CachedStream(make_cache(tmp_path), later, spec, Steps(), source, record=True, classes=CLASSES)
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


# ----------------------------------------------------------------------------------------------------------------- the index


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
    index.drop(0)
    part, _ = index.find(digests)
    assert 0 not in part.tolist()
    assert set(part[1500:].tolist()) <= {1, 2, 3}


# -------------------------------------------------------------------------------------------------------------- the stream


def test_a_miss_without_a_source_names_the_fix_by_the_call_itself(tmp_path):
    spec = SPECS[0]
    cache = make_cache(tmp_path)
    part = batch_at(4, range(2))
    cache.record(answer(spec, 20, part), part, CLASSES)
    other = batch_at(4, range(6))
    cache.record(answer(SPECS[6], 20, other), other, CLASSES)
    cache.close()
    stream = replay(tmp_path, spec)
    with pytest.raises(UserError, match=r"teacher\.cache: .* lacks 4 of the 6 samples of step 4.*megapd record CONFIG") as error:
        stream.signals(4, tiles(4, 3))
    assert "argmax" in str(error.value)  # what it holds instead
    stream.request(5, tiles(5, 3))
    with pytest.raises(UserError, match="lacks 6 of the 6"):
        stream.signals(5, tiles(5, 3))
    with pytest.raises(UserError, match="lacks 6 of the 6"):
        replay(tmp_path / "no-such-folder", spec).signals(0, tiles(0, 2))


def test_what_goes_wrong_in_a_request_is_told_by_signals(tmp_path, monkeypatch):
    stream = replay(tmp_path, SPECS[0], source=Source(SPECS[0]))
    monkeypatch.setattr(stream._cache, "lookup", lambda *_: 1 / 0)
    stream.request(0, tiles(0, 3))
    with pytest.raises(ZeroDivisionError):
        stream.signals(0, tiles(0, 3))


def test_what_the_source_raises_comes_by_the_call(tmp_path):
    class Lost(Source):
        def signals(self, step, batches):
            raise TeacherLost("no replica")

    stream = replay(tmp_path, SPECS[0], source=Lost(SPECS[0]))
    with pytest.raises(TeacherLost):
        stream.signals(0, tiles(0, 3))


def test_ranks_that_answer_each_other_ask_together(tmp_path):
    """A sharded teacher's forward is a collective: a rank that has all rows still takes part, and goes on with its own."""
    spec = SPECS[0]
    recorded(tmp_path, spec)
    source = Source(spec)
    stream = CachedStream(
        make_cache(tmp_path), PLAN, spec, Steps(), source, record=True, classes=CLASSES, agree=lambda asked: [True, *asked[1:]]
    )
    taken = list(stream.signals(2, tiles(2, 3)))
    assert source.asked == [(2, [tiles(2, 3)[0].digest])]
    assert [bits(signal) for signal in taken] == [bits(answer(spec, 10, batch)) for batch in tiles(2, 3)]


def test_a_checkpoint_that_is_still_to_come_is_asked_of_the_source(tmp_path):
    spec, source = SPECS[0], Source(SPECS[0])
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps((10,)), source, record=True, classes=CLASSES)
    stream.request(4, tiles(4, 3))
    assert [step for step, _ in source.requested] == [4]
    assert stream.counts["misses"] == 0
    stream._trajectory = Steps()
    assert [bits(s) for s in stream.signals(4, tiles(4, 3))] == [bits(answer(spec, 20, batch)) for batch in tiles(4, 3)]
    stream.close()


def test_a_source_without_a_trajectory_names_its_teachers(tmp_path):
    spec = SPECS[2]
    taught = recorded(tmp_path, spec)
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, None, Source(spec), record=False)
    again = walk(stream, ahead=2)
    assert [bits(s) for step in range(STEPS) for s in again[step]] == [bits(s) for step in range(STEPS) for s in taught[step]]


def test_hidden_states_share_one_head_a_teacher(tmp_path):
    spec = SPECS[2]
    recorded(tmp_path, spec)
    taken = walk(replay(tmp_path, spec))
    heads = [{id(signal.head) for step in steps for signal in taken[step]} for steps in (range(0, 3), range(3, 6), range(6, 8))]
    assert [len(ids) for ids in heads] == [1, 1, 1]
    assert len(set.union(*heads)) == 3


def test_hidden_states_without_their_head_are_missing(tmp_path):
    spec = SPECS[2]
    recorded(tmp_path, spec)
    for head in tmp_path.glob("*/*/head.arrow"):
        head.unlink()
    cache, batch = make_cache(tmp_path), batch_at(0, range(3))
    assert cache.lookup(digest(10), spec, batch) is None
    assert cache.lookup(digest(10), spec, batch, answer(spec, 10, batch).head) is not None
    with pytest.raises(UserError, match="head"):
        replay(tmp_path, spec).signals(0, tiles(0, 3))
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), Source(spec), record=True, classes=CLASSES)
    walk(stream)
    stream.close()
    assert len(list(tmp_path.glob("*/*/head.arrow"))) == 3
    walk(replay(tmp_path, spec))


# -------------------------------------------------------------------------------------------------------------------- damage


def one_part(folder, spec, samples=6):
    """A cache of one part, its path, and the whole batch that it answers."""
    cache, batch = make_cache(folder), batch_at(0, range(samples))
    cache.record(answer(spec, 10, batch), batch, CLASSES)
    cache.close()
    [path] = parts(folder)
    return path, batch


def check_damaged(cache, folder, spec, batch, expected, caplog):
    """Every sample comes back as it was recorded, or is missing; a part found damaged is set aside, whole."""
    caplog.clear()
    singles = [batch.select(slice(row, row + 1)) for row in range(batch.samples)]
    found = [cache.lookup(digest(10), spec, single) for single in singles]
    for signal, right in zip(found, expected, strict=True):
        assert signal is None or bits(signal) == bits(right)
    damaged = list(folder.rglob("damaged-part-*"))
    assert cache.counts["damaged"] == len(damaged) == sum("damaged" in text for text in caplog.messages)
    assert all(path.name.removeprefix("damaged-") in caplog.text for path in damaged)
    missing = [number for number, signal in enumerate(found) if signal is None]
    if damaged:
        assert not parts(folder)
        assert all(cache.lookup(digest(10), spec, single) is None for single in singles)  # nor are its good rows used any more
    return missing, len(damaged)


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[3], SPECS[4], SPECS[6]], ids=lambda spec: f"{spec.kind}-{spec.encoding}")
def test_flipped_bits_are_never_read(tmp_path, spec, caplog):
    """One bit, anywhere in the file. All that matters is noticed: in the rows by their checksums, in a sample's digest since it
    is not found, elsewhere by the reader; a bit that changes nothing, in padding, may stay."""
    path, batch = one_part(tmp_path, spec)
    whole = path.read_bytes()
    expected = [as_sent(answer(spec, 10, batch.select(slice(row, row + 1)))) for row in range(6)]
    rng = random.Random(0)
    noticed = 0
    for position in sorted(rng.sample(range(len(whole)), 120)):
        data = bytearray(whole)
        data[position] ^= 1 << rng.randrange(8)
        for left in tmp_path.rglob("*part-*"):
            left.unlink()
        path.write_bytes(data)
        missing, damaged = check_damaged(make_cache(tmp_path), tmp_path, spec, batch, expected, caplog)
        noticed += bool(missing or damaged)
    assert noticed >= 40


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4]], ids=lambda spec: spec.kind)
def test_every_bit_of_the_rows_is_guarded(tmp_path, spec, caplog):
    path, batch = one_part(tmp_path, spec)
    whole = path.read_bytes()
    expected = [answer(spec, 10, batch.select(slice(row, row + 1))) for row in range(6)]
    expected = [as_sent(signal) for signal in expected]
    _, [rows] = read_records(path)
    base = Path("/proc/self/maps").read_text().splitlines()
    start = next(int(line.split("-")[0], 16) for line in base if path.name in line)
    buffers = [
        (buffer.address - start, buffer.size) for column in rows.columns for buffer in column.buffers() if buffer is not None
    ]
    rng = random.Random(1)
    for offset, size in buffers:
        for position in rng.sample(range(offset, offset + size), min(size, 8)):
            data = bytearray(whole)
            data[position] ^= 1 << rng.randrange(8)
            for left in tmp_path.rglob("*part-*"):
                left.unlink()
            path.write_bytes(data)
            missing, _ = check_damaged(make_cache(tmp_path), tmp_path, spec, batch, expected, caplog)
            assert missing, f"byte {position}"


def test_truncated_and_foreign_files_are_set_aside(tmp_path, caplog):
    spec = SPECS[4]
    path, batch = one_part(tmp_path, spec)
    whole = path.read_bytes()
    expected = [as_sent(answer(spec, 10, batch.select(slice(row, row + 1)))) for row in range(6)]
    rng = random.Random(2)
    contents = [whole[:length] for length in (0, 1, 8, len(whole) - 1, *rng.sample(range(len(whole)), 30))]
    contents += [b"no arrow file at all", bytes(len(whole)), whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)]
    contents += [rng.randbytes(len(whole)), whole + b"x"]
    for content in contents:
        for left in tmp_path.rglob("*part-*"):
            left.unlink()
        path.write_bytes(content)
        missing, damaged = check_damaged(make_cache(tmp_path), tmp_path, spec, batch, expected, caplog)
        assert (len(missing), damaged) == (6, 1)


def test_a_part_in_another_teachers_folder_is_not_used(tmp_path, caplog):
    path, batch = one_part(tmp_path, SPECS[0])
    other = tmp_path / digest(20) / path.parent.name
    other.mkdir(parents=True)
    os.link(path, other / path.name)
    cache = make_cache(tmp_path)
    assert cache.lookup(digest(20), SPECS[0], batch) is None
    assert "another teacher" in caplog.text
    assert cache.lookup(digest(10), SPECS[0], batch) is not None


def test_damage_among_several_parts_costs_that_part_alone(tmp_path, caplog):
    """Found while rows of both are put together; the stream asks for the damaged part's samples again, and records them."""
    spec = SPECS[0]
    recorded(tmp_path, spec, part_bytes=1)  # a part each micro-batch
    [hurt, *_] = [path for path in parts(tmp_path) if path.parent.parent.name == digest(20)]
    _, [rows] = read_records(hurt)
    data = bytearray(hurt.read_bytes())
    flat = rows.column("values").values.values
    place = data.find(flat.to_numpy().tobytes())
    assert place > 0
    data[place] ^= 1
    hurt.write_bytes(data)
    source = Source(spec)
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), source, record=True, classes=CLASSES)
    taken = walk(stream, micro=6)
    assert [step for step, _ in source.asked] == [3]
    assert [bits(signal) for signal in taken[3]] == [bits(answer(spec, 20, batch_at(3, range(6))))]
    stream.close()
    assert stream.counts["damaged"] == 1
    assert stream.counts["recorded"] == 3
    assert caplog.text.count(hurt.name) == 2  # one warning, with the name it has now
    walk(replay(tmp_path, spec))


def test_a_damaged_head_is_set_aside_and_recorded_again(tmp_path, caplog):
    spec = SPECS[2]
    recorded(tmp_path, spec)
    for number, head in enumerate(sorted(tmp_path.glob("*/*/head.arrow"))):
        data = bytearray(head.read_bytes())
        if number == 0:
            data = data[:100]
        else:
            weight = answer(spec, 10 * (number + 1), batch_at(0, range(1))).head.weight
            data[data.find(weight.numpy().tobytes())] ^= 1
        head.write_bytes(data)
    source = Source(spec)
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), source, record=True, classes=CLASSES)
    taken = walk(stream)
    stream.close()
    assert [step for step, _ in source.asked] == [0, 3, 6]  # once each: then the head is there again
    assert stream.counts["damaged"] == 3
    assert len(list(tmp_path.rglob("damaged-head.arrow"))) == 3
    expected = {step: [as_sent(answer(spec, PLAN.checkpoint_at(step), b)) for b in tiles(step, 3)] for step in range(STEPS)}
    for again in (taken, walk(replay(tmp_path, spec))):
        assert [bits(s) for step in expected for s in again[step]] == [bits(s) for step in expected for s in expected[step]]


def test_a_head_of_any_other_bytes_is_never_read(tmp_path):
    path, batch = one_part(tmp_path, SPECS[2])
    head = path.parent / "head.arrow"
    whole, right = head.read_bytes(), answer(SPECS[2], 10, batch).head.weight
    rng = random.Random(3)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        for left in tmp_path.rglob("*head*"):
            left.unlink()
        head.write_bytes(data)
        found = make_cache(tmp_path).head(digest(10), SPECS[2])
        assert found is None or torch.equal(found.weight, right)
        refused += found is None
    assert refused > 100


def test_a_part_that_another_process_set_aside_is_missing(tmp_path, caplog):
    path, batch = one_part(tmp_path, SPECS[0])
    cache = make_cache(tmp_path)
    assert cache.present(digest(10), SPECS[0], batch).all()
    path.rename(path.with_name(f"damaged-{path.name}"))
    cache._open.clear()
    assert cache.lookup(digest(10), SPECS[0], batch) is None
    assert cache.counts["damaged"] == 0
    assert not caplog.messages


# --------------------------------------------------------------------------------------------------- what cannot be written


def test_a_folder_that_cannot_be_made_stops_recording_alone(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    source = Source(SPECS[2])
    stream = CachedStream(
        make_cache(blocked / "cache", part_bytes=1), PLAN, SPECS[2], Steps(), source, record=True, classes=CLASSES
    )
    taken = walk(stream, ahead=1)
    stream.close()
    for step, signals in taken.items():
        expected = [as_sent(answer(SPECS[2], PLAN.checkpoint_at(step), batch)) for batch in tiles(step, 3)]
        assert [bits(signal) for signal in signals] == [bits(signal) for signal in expected]
    written = [text for text in caplog.messages if "cannot be written" in text]
    assert len(written) == 1
    assert str(blocked / "cache") in written[0]
    assert stream.counts["recorded"] == 0


def start(function, *arguments):
    """Run a function in a process of its own: forked, since to import torch again takes seconds."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def fill_disk(folder):
    """The system refuses to let any file grow beyond 1,500 bytes, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    messages = []
    log = logging.getLogger("megapd.teacher.cache")
    log.handle = lambda line: messages.append(line.getMessage())
    taken = recorded(folder, SPECS[0])
    assert len(taken) == STEPS
    assert sum("cannot be written" in text for text in messages) == 1
    assert not parts(folder)
    assert not list(folder.rglob("*.tmp-*"))


def test_a_full_disk_stops_recording_alone(tmp_path):
    process = start(fill_disk, tmp_path)
    process.join(60)
    assert process.exitcode == 0


# ------------------------------------------------------------------------------------------------------------------ processes


def write_share(folder, rank, ranks):
    """What one rank of a recording run does, and then a look at the other's rows."""
    spec = SPECS[2]
    cache = make_cache(folder, part_bytes=2000)
    stream = CachedStream(cache, PLAN, spec, Steps(), Source(spec), record=True, classes=CLASSES)
    for _ in range(2):
        walk(stream, micro=1, rank=rank, ranks=ranks)
    cache.flush()
    others = {step: tiles(step, GLOBAL) for step in range(STEPS)}
    deadline = time.monotonic() + 60
    while not all(cache.lookup(digest(PLAN.checkpoint_at(s)), spec, b) for s in others for b in others[s]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert cache.counts["recorded"] == STEPS * GLOBAL // ranks
    stream.close()


def test_two_processes_write_at_once_and_see_each_other(tmp_path):
    processes = [start(write_share, tmp_path, rank, 2) for rank in range(2)]
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0]
    taken = walk(replay(tmp_path, SPECS[2]), micro=6)
    for step, signals in taken.items():
        expected = [as_sent(answer(SPECS[2], PLAN.checkpoint_at(step), batch)) for batch in tiles(step, 6)]
        assert [bits(signal) for signal in signals] == [bits(signal) for signal in expected]


def write_forever(folder):
    cache = make_cache(folder, part_bytes=4000)
    for step in range(10**9):
        for batch in tiles(step, 3):
            cache.record(answer(SPECS[0], 10, batch), batch, CLASSES)


def test_a_kill_while_writing_leaves_a_usable_cache(tmp_path, caplog):
    process = start(write_forever, tmp_path)
    deadline = time.monotonic() + 60
    while len(parts(tmp_path)) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join(60)
    assert process.exitcode == -9
    cache = make_cache(tmp_path)
    found = step = 0
    missing = False
    while not missing:  # the rows before the first that is missing: what was pending or being written
        for batch in tiles(step, 3):
            signal = cache.lookup(digest(10), SPECS[0], batch)
            missing = missing or signal is None
            if signal is not None:
                assert bits(signal) == bits(answer(SPECS[0], 10, batch))
                found += batch.samples
        step += 1
    held = sum(read_records(path)[1][0].num_rows for path in parts(tmp_path))
    assert held - 3 < found <= held
    assert held > 100
    assert cache.counts["damaged"] == 0
    assert not caplog.messages


def test_leftovers_of_a_crash_are_removed_once_they_are_old(tmp_path):
    path, batch = one_part(tmp_path, SPECS[0])
    old, young = (path.with_name(f"{path.name}.tmp-{number}-x") for number in (1, 2))
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (time.time() - 1e5, time.time() - 1e5))
    assert make_cache(tmp_path).lookup(digest(10), SPECS[0], batch) is not None
    assert young.exists()
    assert not old.exists()


# --------------------------------------------------------------------------------------------------------------- megapd record


@pytest.fixture(scope="module")
def config():
    sizes = [f"--training.steps={STEPS}", f"--training.global_batch={GLOBAL}", "--telemetry.progress=false"]
    model = ["--task.kind=parity", "--task.dimension=20", "--task.degree=2", "--teacher.trajectory=x", "--teacher.depth=2"]
    return load(None, [*sizes, *model, "--schedule.policy=one_shot", "--training.micro_batch=3"])


@pytest.fixture(scope="module")
def task(config):
    return build_task(config)


def record_all(config, task, folder, source, rank=0, ranks=1, **settings):
    return record(config, task, PLAN, Steps(), source, make_cache(folder, **settings), rank, ranks, classes=CLASSES)


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[2]], ids=lambda spec: spec.kind)
def test_record_walks_the_schedule_and_then_only_what_is_missing(tmp_path, config, task, spec):
    source = Source(spec)
    summary = record_all(config, task, tmp_path, source)
    assert (summary.samples, summary.recorded, summary.found) == (STEPS * GLOBAL, STEPS * GLOBAL, 0)
    assert source.closed
    assert source.rotations == sorted(source.rotations)
    assert [step for step, _ in source.asked] == [step for step, _ in source.requested] == list(range(STEPS))
    assert summary.positions == sum(task.batch(step, range(GLOBAL)).labelled for step in range(STEPS))
    files = [*parts(tmp_path), *tmp_path.glob("*/*/head.arrow")]
    assert summary.bytes == sum(path.stat().st_size for path in files)
    assert summary.bytes_per_position == summary.bytes / summary.positions > spec.bytes_per_position(CLASSES, WIDTH)
    assert summary.seconds > 0

    again = Source(spec)
    summary = record_all(config, task, tmp_path, again)
    assert (again.asked, again.requested) == ([], [])
    assert (summary.found, summary.recorded, summary.bytes, summary.bytes_per_position) == (STEPS * GLOBAL, 0, 0, 0.0)

    for lost in parts(tmp_path)[:1]:
        lost.unlink()
    summary = record_all(config, task, tmp_path, Source(spec))
    assert 0 < summary.recorded == summary.samples - summary.found < summary.samples
    stream = replay(tmp_path, spec)
    for step in range(STEPS):
        batch = task.batch(step, range(GLOBAL))
        [signal] = stream.signals(step, [batch])
        assert bits(signal) == bits(as_sent(answer(spec, PLAN.checkpoint_at(step), batch)))


def test_recording_divides_among_ranks(tmp_path, config, task):
    spec = SPECS[0]
    summaries = [record_all(config, task, tmp_path, Source(spec), rank, 2) for rank in range(2)]
    assert [summary.recorded for summary in summaries] == [STEPS * GLOBAL // 2] * 2
    for step in range(STEPS):
        list(replay(tmp_path, spec).signals(step, [task.batch(step, range(GLOBAL))]))
    with pytest.raises(UserError, match=r"training\.global_batch: 6 .* 4 ranks"):
        record_all(config, task, tmp_path, Source(spec), 0, 4)


def test_an_interrupted_record_keeps_what_it_had(tmp_path, config, task):
    class Interrupted(Source):
        def signals(self, step, batches):
            if step == 5:
                raise KeyboardInterrupt
            return super().signals(step, batches)

    with pytest.raises(KeyboardInterrupt):
        record_all(config, task, tmp_path, Interrupted(SPECS[0]))
    source = Source(SPECS[0])
    record_all(config, task, tmp_path, source)
    assert [step for step, _ in source.asked] == [5, 6, 7]


def test_record_says_so_where_it_cannot_write(tmp_path, config, task):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"teacher\.cache: .*cannot be written"):
        record_all(config, task, tmp_path / "file" / "cache", Source(SPECS[0]), part_bytes=1)

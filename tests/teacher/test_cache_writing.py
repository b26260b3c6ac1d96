"""Those who write into the disk cache: `megapd record`, several processes at once, and where nothing can be written."""

import logging
import os
import re
import resource
import time

import pytest
import torch

from megapd.commands.record import progress, record
from megapd.config import load
from megapd.errors import UserError
from megapd.signals import as_sent
from megapd.tasks import build_task
from megapd.teacher.cache import CachedStream
from megapd.teacher.cache.parts import read_records
from megapd.world import World
from tests.teacher.caching import (
    CLASSES,
    GLOBAL,
    PLAN,
    SPECS,
    STEPS,
    WIDTH,
    Source,
    Steps,
    answer,
    bits,
    digest,
    fork,
    make_cache,
    one_part,
    parts,
    recorded,
    replay,
    tiles,
    walk,
)

# ----------------------------------------------------------------------------------------------------------------- megapd record


@pytest.fixture(scope="module")
def config():
    sizes = [f"--training.steps={STEPS}", f"--training.global_batch={GLOBAL}", "--telemetry.progress=false"]
    model = ["--task.kind=parity", "--task.dimension=20", "--task.degree=2", "--teacher.trajectory=x", "--teacher.depth=2"]
    return load(None, [*sizes, *model, "--schedule.policy=one_shot", "--training.micro_batch=3"])


@pytest.fixture(scope="module")
def task(config):
    return build_task(config)


def record_all(config, task, folder, source, rank=0, ranks=1, **settings):
    world = World(rank, ranks, torch.device("cpu"), None)
    return record(config, task, PLAN, Steps(), source, make_cache(folder, **settings), world, classes=CLASSES)


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


# -------------------------------------------------------------------------------------------------------- what cannot be written


def test_a_folder_that_cannot_be_made_stops_recording_alone(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    source = Source(SPECS[2])
    stream = CachedStream(make_cache(blocked / "cache", part_bytes=1), PLAN, SPECS[2], Steps(), source, classes=CLASSES)
    taken = walk(stream, ahead=1)
    stream.close()
    for step, signals in taken.items():
        expected = [as_sent(answer(SPECS[2], PLAN.checkpoint_at(step), batch)) for batch in tiles(step, 3)]
        assert [bits(signal) for signal in signals] == [bits(signal) for signal in expected]
    written = [text for text in caplog.messages if "cannot be written" in text]
    assert len(written) == 1
    assert str(blocked / "cache") in written[0]
    assert stream.counts["recorded"] == 0


def fill_disk(folder):
    """The system refuses to let any file grow beyond 1,500 bytes, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    messages = []
    log = logging.getLogger("megapd.teacher.cache.writer")
    log.handle = lambda line: messages.append(line.getMessage())
    taken = recorded(folder, SPECS[0])
    assert len(taken) == STEPS
    assert sum("cannot be written" in text for text in messages) == 1
    assert not parts(folder)
    assert not list(folder.rglob("*.tmp-*"))


@pytest.mark.slow
def test_a_full_disk_stops_recording_alone(tmp_path):
    process = fork(fill_disk, tmp_path)
    process.join(60)
    assert process.exitcode == 0


# --------------------------------------------------------------------------------------------------------------------- processes


def write_share(folder, rank, ranks):
    """What one rank of a recording run does, and then a look at the other's rows."""
    spec = SPECS[2]
    cache = make_cache(folder, part_bytes=2000)
    stream = CachedStream(cache, PLAN, spec, Steps(), Source(spec), classes=CLASSES)
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


@pytest.mark.slow
def test_two_processes_write_at_once_and_see_each_other(tmp_path):
    processes = [fork(write_share, tmp_path, rank, 2) for rank in range(2)]
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


@pytest.mark.slow
def test_a_kill_while_writing_leaves_a_usable_cache(tmp_path, caplog):
    process = fork(write_forever, tmp_path)
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


def test_parts_are_ordered_by_number_whatever_the_clock_says(tmp_path, monkeypatch):
    """Of two rows of one sample the one that was written first counts, for every reader, though the clock was set back."""
    spec, batch = SPECS[0], tiles(0, 3)[0]
    first, second = answer(spec, 20, batch), answer(spec, 20, batch, noise=0.5)
    one, other = make_cache(tmp_path), make_cache(tmp_path)
    assert other.lookup(digest(20), spec, batch) is None  # before there is anything, so that it will record too
    monkeypatch.setattr(other._reader, "refresh", lambda index: None)
    monkeypatch.setattr(time, "time_ns", iter(range(10**18, 0, -(10**9))).__next__)
    one.record(first, batch, CLASSES)
    one.close()
    other.record(second, batch, CLASSES)
    other.close()
    names = [path.name for path in parts(tmp_path)]
    assert [name[:21] for name in names] == ["part-0000000000000001", "part-0000000000000002"]
    assert torch.equal(make_cache(tmp_path).lookup(digest(20), spec, batch).values, as_sent(first).values)
    # Parts that an earlier version named by the time stay before those to come.
    (tmp_path / digest(20)).joinpath(*parts(tmp_path)[0].parts[-2:-1], "part-18a0000000000000-00.arrow").write_bytes(b"")
    last = make_cache(tmp_path)
    assert last._reader.next_number(last._reader.index(digest(20), spec)) == 0x18A0000000000001


def test_without_a_terminal_a_line_is_told_now_and_then(tmp_path, config, task, capsys, monkeypatch):
    monkeypatch.setattr("megapd.commands.record.TELL_SECONDS", 0.0)
    loud = config.model_copy(update={"telemetry": config.telemetry.model_copy(update={"progress": True})})
    record_all(loud, task, tmp_path, Source(SPECS[0]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == STEPS
    assert re.fullmatch(rf"record: step 1 of {STEPS}, {GLOBAL} signals, [\d,.]+ signals/s, \d+:\d\d:\d\d left", lines[0])
    assert progress(250, 1000, 4000, 40.0) == "record: step 250 of 1,000, 4,000 signals, 100.0 signals/s, 0:02:00 left"
    record_all(config, task, tmp_path / "quiet", Source(SPECS[0]))
    assert capsys.readouterr().out == ""

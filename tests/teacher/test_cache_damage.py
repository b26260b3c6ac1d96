"""Damaged files of the disk cache: what they held is missing, and never read as anything else."""

import os
import random
from pathlib import Path

import pytest
import torch

from megapd.signals import as_sent
from megapd.teacher.cache import CachedStream
from megapd.teacher.cache.parts import read_records
from tests.teacher.caching import (
    CLASSES,
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
    one_part,
    parts,
    recorded,
    replay,
    tiles,
    walk,
)


def samples_of(batch):
    return [batch.select(slice(row, row + 1)) for row in range(batch.samples)]


def replace_part(folder, path, data):
    """The one part holds these bytes; what an earlier round set aside is gone."""
    for left in folder.rglob("*part-*"):
        left.unlink()
    path.write_bytes(data)


def check_damaged(cache, folder, spec, batch, expected, caplog):
    """Every sample comes back as it was recorded, or is missing; a part found damaged is set aside, whole."""
    caplog.clear()
    singles = samples_of(batch)
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
    expected = [as_sent(answer(spec, 10, single)) for single in samples_of(batch)]
    rng = random.Random(0)
    noticed = 0
    for position in sorted(rng.sample(range(len(whole)), 120)):
        data = bytearray(whole)
        data[position] ^= 1 << rng.randrange(8)
        replace_part(tmp_path, path, data)
        missing, damaged = check_damaged(make_cache(tmp_path), tmp_path, spec, batch, expected, caplog)
        noticed += bool(missing or damaged)
    assert noticed >= 40


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4]], ids=lambda spec: spec.kind)
def test_every_bit_of_the_rows_is_guarded(tmp_path, spec, caplog):
    path, batch = one_part(tmp_path, spec)
    whole = path.read_bytes()
    expected = [as_sent(answer(spec, 10, single)) for single in samples_of(batch)]
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
            replace_part(tmp_path, path, data)
            missing, _ = check_damaged(make_cache(tmp_path), tmp_path, spec, batch, expected, caplog)
            assert missing, f"byte {position}"


def test_truncated_and_foreign_files_are_set_aside(tmp_path, caplog):
    spec = SPECS[4]
    path, batch = one_part(tmp_path, spec)
    whole = path.read_bytes()
    expected = [as_sent(answer(spec, 10, single)) for single in samples_of(batch)]
    rng = random.Random(2)
    contents = [whole[:length] for length in (0, 1, 8, len(whole) - 1, *rng.sample(range(len(whole)), 30))]
    contents += [b"no arrow file at all", bytes(len(whole)), whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)]
    contents += [rng.randbytes(len(whole)), whole + b"x"]
    for content in contents:
        replace_part(tmp_path, path, content)
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
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), source, classes=CLASSES)
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
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), source, classes=CLASSES)
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
    cache._reader._open.clear()
    assert cache.lookup(digest(10), SPECS[0], batch) is None
    assert cache.counts["damaged"] == 0
    assert not caplog.messages

"""The stream before the cache: what it asks of its source, and what it says where there is none."""

from dataclasses import replace

import pytest

from megapd.errors import SignalNotFinite, TeacherLost, UserError
from megapd.teacher.cache import CachedStream
from tests.teacher.caching import (
    CLASSES,
    PLAN,
    SPECS,
    Source,
    Steps,
    answer,
    batch_at,
    bits,
    digest,
    make_cache,
    recorded,
    replay,
    tiles,
    walk,
)


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
        make_cache(tmp_path), PLAN, spec, Steps(), source, classes=CLASSES, agree=lambda asked: [True, *asked[1:]]
    )
    taken = list(stream.signals(2, tiles(2, 3)))
    assert source.asked == [(2, [tiles(2, 3)[0].digest])]
    assert [bits(signal) for signal in taken] == [bits(answer(spec, 10, batch)) for batch in tiles(2, 3)]


def test_a_checkpoint_that_is_still_to_come_is_asked_of_the_source(tmp_path):
    spec, source = SPECS[0], Source(SPECS[0])
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps((10,)), source, classes=CLASSES)
    stream.request(4, tiles(4, 3))
    assert [step for step, _ in source.requested] == [4]
    assert stream.counts["misses"] == 0
    stream._trajectory = Steps()
    assert [bits(s) for s in stream.signals(4, tiles(4, 3))] == [bits(answer(spec, 20, batch)) for batch in tiles(4, 3)]
    stream.close()


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
    stream = CachedStream(make_cache(tmp_path), PLAN, spec, Steps(), Source(spec), classes=CLASSES)
    walk(stream)
    stream.close()
    assert len(list(tmp_path.glob("*/*/head.arrow"))) == 3
    walk(replay(tmp_path, spec))


def test_what_is_no_number_is_told_and_not_recorded(tmp_path):
    class Broken(Source):
        def signals(self, step, batches):
            for signal in super().signals(step, batches):
                yield replace(signal, values=signal.values * float("nan"))

    stream = replay(tmp_path, SPECS[0], source=Broken(SPECS[0]))
    with pytest.raises(SignalNotFinite, match=rf"^step 4: the signal of the teacher's step {PLAN.checkpoint_at(4)} holds NaN"):
        list(stream.signals(4, tiles(4, 3)))
    stream.close()
    assert not list(tmp_path.rglob("part-*"))

"""Contract 5, end to end: whatever befalls the teacher, a student of two ranks learns the same, or stops and says why.

The teachers are processes of `megapd teacher` and answer each request alone (teacher.server.token_budget 1), so that an answer
does not depend on what arrives beside it: losses are compared bitwise, except with a teacher of two ranks.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
import threading
import time

import psutil
import pytest

from megapd.commands import teacher as command
from megapd.config import load
from megapd.processes import supervisor
from tests.teacher.launching import (
    COMMON,
    REFRESH,
    STEPS,
    Stage,
    counted,
    ends_cleanly,
    ranks_of,
    replica_of,
    sources,
    told,
    trained,
    up,
    without_counts,
)
from tests.teacher.proxy import Proxy
from tests.teacher.teachers import MODELS
from tests.training.runs import last_step, metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    stage = Stage(tmp_path_factory.mktemp("chaos"))
    try:
        yield stage
    finally:
        stage.close()


@pytest.fixture(scope="module")
def undisturbed(stage):
    """Metrics of a run to which nothing happens."""
    stage.first.wait()
    stage.student("undisturbed", [stage.first.endpoint]).finished()
    found = metrics(stage.runs / "undisturbed")
    assert [record["step"] for record in found if record["kind"] == "rotation"] == list(range(0, STEPS, REFRESH))
    assert len(trained(stage.runs / "undisturbed")) == STEPS
    return found


@pytest.fixture
def first(stage, undisturbed):
    """The teacher alone, which runs."""
    up(stage.first)
    return stage.first


@pytest.fixture
def proxied(first):
    """A proxy before it."""
    proxy = Proxy(first.port)
    yield proxy
    proxy.cut()


# ----------------------------------------------------------------------------------------- answers that are not to be used


def test_flipped_bits_are_refused_and_asked_for_again(proxied, stage, undisturbed):
    job = stage.student("flipped", [proxied.endpoint], pauses=(5, 15, 25))
    for step in (5, 15, 25):
        job.at(step)
        proxied.answers.left, proxied.requests.left = 2, 1
        job.go(step)
    results = job.finished()
    assert (proxied.answers.done, proxied.requests.done) == (6, 3)
    assert counted(results, "damaged") + counted(results, "refused") > 0
    assert counted(results, "retries") >= 6
    assert metrics(job.folder) == undisturbed


def test_a_wrong_token_ends_the_run(stage, first, undisturbed):
    another = stage.folder / "another-token"
    another.write_text(secrets.token_hex(32))
    endpoints = [first.endpoint, stage.other.endpoint]
    up(stage.other)
    results = stage.student("wrong-token", endpoints, f"--teacher.token={another}").results()
    assert [result["code"] for result in results] == [1, 1]
    assert "teacher.token" in told(results)
    assert counted(results, "refused") > 0
    assert not trained(stage.runs / "wrong-token")


def test_another_trajectory_beside_the_right_one_is_never_used(stage, first, undisturbed):
    up(stage.other)
    job = stage.student("beside", [stage.other.endpoint, first.endpoint])
    results = job.finished()
    assert counted(results, "wrong_teacher") > STEPS
    assert metrics(job.folder) == undisturbed


def test_another_trajectory_alone_ends_the_run(stage, undisturbed):
    up(stage.other)
    results = stage.student("wrong-alone", [stage.other.endpoint]).results()
    assert [result["code"] for result in results] == [1, 1]
    digests = set(re.findall(r"\b[0-9a-f]{64}\b", results[0]["printed"]))
    named = [json.loads((stage.folder / name / f"step_{REFRESH}" / "meta.json").read_text()) for name in ("right", "wrong")]
    assert digests == {tree["digest"] for tree in named}
    assert max(result["seconds"] for result in results) < 20.0  # the deadline is 300


# ------------------------------------------------------------------------------------------- teachers that die or sleep


def test_the_only_teacher_is_killed_in_mid_batch(stage, first, undisturbed):
    job = stage.student("killed", [first.endpoint], pauses=(13,))
    job.at(13)
    first.send(signal.SIGSTOP)
    job.go(13)
    step = job.until_stalled()  # so there are requests that the teacher holds
    first.kill()
    time.sleep(5.0)
    assert last_step(job.folder) == step
    first.start()
    results = job.finished()
    assert metrics(job.folder) == undisturbed
    assert counted(results, "retries") > 0
    assert sources(results) == ["teacher"] * STEPS


def test_one_replica_of_two_is_killed_and_started_again(stage, undisturbed):
    up(stage.pair, 2)
    victim = replica_of(stage.pair, 1)
    job = stage.student("half-killed", stage.replicas, pauses=(10,))
    job.at(10)
    victim.suspend()
    job.go(10)
    job.until_stalled()  # on what this one was asked
    killed = time.monotonic()
    victim.kill()
    results = job.finished()
    assert time.monotonic() - killed < 10.0  # no waiting for calls, which may take 60 s
    assert metrics(job.folder) == undisturbed
    assert counted(results, "retries") > 0
    assert counted(results, "lost") == 0
    up(stage.pair, 2)
    assert replica_of(stage.pair, 1).pid != victim.pid


@pytest.mark.parametrize(
    ("call_seconds", "asleep", "carrier"),
    [
        (2, 8.0, "shared_memory"),
        (60, 4.0, "served"),
        pytest.param(5, 20.0, "served", marks=pytest.mark.full),
        pytest.param(60, 20.0, "shared_memory", marks=pytest.mark.full),
    ],
)
def test_the_only_teacher_sleeps(stage, first, undisturbed, call_seconds, asleep, carrier):
    """Calls that end while it sleeps, and are repeated; calls that outlast it."""
    arguments = [f"--teacher.call_seconds={call_seconds}", f"--teacher.carrier={carrier}"]
    job = stage.student(f"asleep-{call_seconds}-{asleep:g}", [first.endpoint], *arguments, pauses=(10,))
    job.at(10)
    first.send(signal.SIGSTOP)
    try:
        job.go(10)
        step = job.until_stalled()
        time.sleep(asleep - 0.7)
        assert last_step(job.folder) == step
    finally:
        first.send(signal.SIGCONT)
    results = job.finished()
    assert metrics(job.folder) == undisturbed
    assert (counted(results, "retries") > 0) == (call_seconds < asleep)
    assert counted(results, "lost") == 0


def test_one_replica_of_two_drains(stage, undisturbed):
    up(stage.pair, 2)
    victim = replica_of(stage.pair, 1)
    job = stage.student("drained", stage.replicas, pauses=(10,))
    job.at(10)
    job.go(10)
    victim.terminate()
    results = job.finished()
    assert metrics(job.folder) == undisturbed
    assert counted(results, "lost") == 0
    victim.wait(30)
    stage.students.until(lambda: "teacher replica 1 ended with code 0" in stage.pair.printed(), 10.0)


# -------------------------------------------------------------------------------------------------------- lost signals


def test_without_signals_all_ranks_learn_from_the_cache(proxied, stage, undisturbed):
    cache = f"--teacher.cache={stage.folder / 'cache'}"
    job = stage.student("recorded", [proxied.endpoint], cache)
    job.finished()
    assert metrics(job.folder) == undisturbed

    job = stage.student(
        "cache",
        [proxied.endpoint],
        cache,
        "--teacher.on_failure=cache",
        "--teacher.deadline_seconds=0.5",
        pauses=(10, 20),
    )
    job.at(10)
    proxied.cut()
    job.go(10)
    job.at(20)
    proxied.mend()
    job.go(20)
    found = sources(job.finished())
    assert found[13:20] == ["cache"] * 7  # two steps ahead were asked for before
    assert "labels" not in found
    assert without_counts(metrics(job.folder)) == undisturbed
    assert [record["steps_from_cache"] for record in trained(job.folder)] == [found[: n + 1].count("cache") for n in range(STEPS)]


def test_what_the_cache_lacks_ends_the_run(proxied, stage, undisturbed):
    cache = f"--teacher.cache={stage.folder / 'short-cache'}"
    stage.student("short", [proxied.endpoint], cache, "--training.steps=16").finished()
    job = stage.student(
        "lacking", [proxied.endpoint], cache, "--teacher.on_failure=cache", "--teacher.deadline_seconds=0.5", pauses=(12,)
    )
    job.at(12)
    proxied.cut()
    job.go(12)
    results = job.results()
    assert [result["code"] for result in results] == [1, 1]
    assert sources(results)[15:] == ["cache"]
    line = results[0]["printed"].splitlines()[-1]
    assert "step 16" in line
    assert proxied.endpoint in line
    assert "cache" in line
    expected = [record for record in undisturbed if record["kind"] == "train"]
    assert without_counts(trained(job.folder)) == expected[:16]


def test_without_signals_the_run_ends_at_the_deadline(proxied, stage, undisturbed):
    job = stage.student("waits", [proxied.endpoint], "--teacher.deadline_seconds=8", pauses=(10,))
    job.at(10)
    proxied.cut()
    job.go(10)
    results = job.results()
    assert [result["code"] for result in results] == [1, 1]
    lost = len(results[0]["sources"])
    line = results[0]["printed"].splitlines()[-1]
    assert 10 <= lost <= 13
    assert f"step {lost}:" in line
    assert proxied.endpoint in line
    assert "teacher.deadline_seconds 8" in line
    expected = [record for record in undisturbed if record["kind"] == "train"]
    assert trained(job.folder) == expected[:lost]


@pytest.mark.parametrize("policy", ["labels", "wait"])
def test_one_rank_alone_loses_its_signals(proxied, stage, undisturbed, policy):
    arguments = [f"--teacher.on_failure={policy}", "--teacher.deadline_seconds=2"]
    job = stage.student(f"one-rank-{policy}", [proxied.endpoint], *arguments, pauses=(10, 15))
    job.at(10)
    proxied.drop(stage.students.ranks()[1:])
    job.go(10)
    if policy == "labels":
        job.at(15)
        proxied.mend()
        job.go(15)
        results = job.finished()
        found = sources(results)
        assert "labels" in found[10:15]
        assert found[-1] == "teacher"
        assert trained(job.folder)[-1]["steps_from_labels"] == found.count("labels")
        assert len(trained(job.folder)) == STEPS
    else:
        results = job.results()
        assert [result["code"] for result in results] == [1, 1]
        assert 10 <= len(sources(results)) <= 13
        line = results[0]["printed"].splitlines()[-1]  # of the rank that has its signals, and speaks
        assert f"step {len(sources(results))}: " in line
        assert proxied.endpoint in line
    assert results[0]["counts"]["lost"] == 0
    assert results[1]["counts"]["lost"] > 0


def test_without_signals_all_ranks_learn_from_the_labels(stage, first, undisturbed):
    """The teacher dies for good, the run is stopped and resumed with another one, which dies too and comes back."""
    policy = ["--teacher.on_failure=labels", "--teacher.deadline_seconds=2"]
    job = stage.student("labels", [first.endpoint], *policy, pauses=(10, 14))
    job.at(10)
    first.kill()
    job.go(10)
    job.at(14)
    (job.folder / "stop").touch()
    job.go(14)
    before = sources(job.finished())

    up(stage.pair)
    proxied = Proxy(stage.pair.port)
    assert len(before) == 15
    assert before[:10] == ["teacher"] * 10
    assert before[-1] == "labels"

    job = stage.student("labels", [proxied.endpoint], *policy, pauses=(17, 21))
    job.at(17)
    proxied.cut()
    job.go(17)
    job.at(21)
    proxied.mend()
    job.go(21)
    after = sources(job.finished())
    assert after[:2] == ["teacher"] * 2
    assert "labels" in after
    assert after[-1] == "teacher"
    proxied.cut()

    found, records = before + after, trained(job.folder)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["steps_from_labels"] for record in records] == [found[: n + 1].count("labels") for n in range(STEPS)]
    assert all(record["steps_from_cache"] == 0 for record in records)
    first = found.index("labels")
    expected = [record for record in undisturbed if record["kind"] == "train"]
    assert without_counts(records[:first]) == expected[:first]
    assert records[first]["loss"] == records[first]["cross_entropy"]


# ---------------------------------------------------------------------------------------------------------- supervisor


def test_a_supervisor_ends_with_its_replicas(stage):
    up(stage.pair, 2)
    ends_cleanly(stage.pair)


def test_no_rank_outlives_its_supervisor(monkeypatch, tmp_path):
    """DeepSpeed's runner, which starts the launcher of the ranks, passes no signal on; nor does this one."""
    launcher, pid = "import time; time.sleep(300)", tmp_path / "pid"
    runner = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]);"
    runner += "open(sys.argv[2], 'w').write(str(p.pid)); p.wait()"
    monkeypatch.setattr(supervisor, "local_command", lambda *_: [sys.executable, "-c", runner, launcher, str(pid)])
    config = load(None, [*COMMON, *MODELS["gpt"], "--teacher.trajectory=none", "--teacher.server.ranks=2"])

    def stop():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopper = threading.Thread(target=stop)
    stopper.start()
    try:
        assert command.serve_teacher(config, []) == 0
    finally:
        stopper.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not psutil.pid_exists(int(pid.read_text()))


@pytest.mark.full
def test_a_replica_whose_rank_is_killed_ends_and_is_started_again(stage, undisturbed):
    """Two ranks sum in another order than one: losses are equal to 1e-5."""
    sharded = stage.server("right", "--teacher.sharding=tensor", "--teacher.server.ranks=2", ranks=None)
    up(sharded)
    job = stage.student("sharded", [sharded.endpoint], pauses=(10,))
    job.at(10)
    before = ranks_of(sharded)
    before[1].kill()
    job.go(10)
    results = job.finished()
    assert counted(results, "lost") == 0
    expected = [record["loss"] for record in undisturbed if record["kind"] == "train"]
    assert [record["loss"] for record in trained(job.folder)] == pytest.approx(expected, abs=1e-5)
    assert not {process.pid for process in before.values()} & {process.pid for process in ranks_of(sharded).values()}
    ends_cleanly(sharded)

"""Decisions: the rule against its definition, the record after every crash, and the plan as all ranks see it."""

import json
import random
import subprocess
import sys
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd.config import AdaptiveConfig
from megapd.errors import UserError
from megapd.schedule.adaptive import EmbeddedDecider, check_lead, decide, reported_kind
from megapd.schedule.decision_log import DecisionLog, recorded_decisions, subject
from megapd.schedule.plan import AdaptivePlan, Decision, Report
from megapd.schedule.policies import build_plan, candidates

quick = settings(max_examples=150, deadline=None, derandomize=True)

CANDIDATES = (100, 200, 300)


def adaptive(**changes) -> AdaptiveConfig:
    return AdaptiveConfig(**{"teachers": CANDIDATES, "window": 3, "lead": 4} | changes)


def decisions_of(setting, values, every=10):
    """The decisions of a run that reports `values`, one each `every` steps."""
    reports, made = [], []
    for number, value in enumerate(values, start=1):
        reports.append(Report(number * every, value))
        decision = decide(setting, setting.teachers, reports, made, number * every)
        if decision is not None:
            made.append(decision)
    return made


def decision(sequence, effective, checkpoint=200):
    return Decision(sequence, effective - 4, effective, checkpoint, "saturated", {"gains": [0.1 + 0.2]})


# ---------------------------------------------------------------------------------------------------------------- decide


def test_the_papers_rule_on_its_own_course():
    # At chance, then learning, then saturated: not on the first plateau, where nothing was gained since the run began.
    values = [0.5] * 20 + [0.55, 0.65, 0.75, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
    (made,) = decisions_of(AdaptiveConfig(teachers=CANDIDATES), values)
    assert made.reason == "saturated"
    assert (made.sequence, made.checkpoint) == (0, 200)
    # 0.8 gained less than 0.01 over the mean of five values first when all five are above 0.79.
    assert made.step == 10 * (values.index(0.8) + 1 + 5)
    assert made.effective == made.step + 10
    assert made.evidence == {
        "metric": "accuracy",
        "value": 0.8,
        "from": 100,
        "dwell": made.step,
        "gains": [pytest.approx(0.0)],
        "progress": pytest.approx(0.3),
    }


def test_a_plateau_without_progress_ends_at_max_dwell():
    assert decisions_of(adaptive(), [0.5] * 50) == []
    made = decisions_of(adaptive(max_dwell=100), [0.5] * 50)
    assert [(d.step, d.effective, d.checkpoint, d.reason) for d in made] == [
        (100, 104, 200, "max_dwell"),
        # The dwell of the second began at 104; its first report at or beyond 204 is that of 210.
        (210, 214, 300, "max_dwell"),
    ]
    assert [d.step for d in decisions_of(adaptive(progress=0), [0.5] * 50)] == [40, 80]


def test_min_dwell_and_patience():
    values = [0.5, 0.7, 0.8] + [0.8] * 40
    assert decisions_of(adaptive(), values)[0].step == 60  # 0.8 against (0.8, 0.8, 0.8)
    assert decisions_of(adaptive(min_dwell=95), values)[0].step == 100
    assert decisions_of(adaptive(patience=3), values)[0].step == 80
    assert decisions_of(adaptive(gain=0.2), values)[0].step == 40  # 0.8 against the mean of 0.5, 0.7 and 0.8 gains 0.13
    # One report that gains begins the count anew.
    assert decisions_of(adaptive(patience=2), [0.5, 0.7, 0.8, 0.8, 0.8, 0.8, 0.9, *[0.9] * 9])[0].step == 110


def test_a_divergence_improves_downwards_and_is_measured_against_one_teacher():
    # Another checkpoint raises the divergence; progress counts from there.
    first = [1.0, 0.5, 0.2, 0.2, 0.2, 0.2]
    second = [1.5, 0.9, 0.9, 0.9, 0.9, 0.9]
    made = decisions_of(adaptive(metric="divergence"), first + second)
    assert [(d.step, d.checkpoint) for d in made] == [(60, 200), (110, 300)]
    assert made[1].evidence["progress"] == pytest.approx(0.6)
    # The accuracy's progress counts from the advance.
    upwards = [0.5, 0.7, 0.8, 0.8, 0.8, 0.8, 0.805, 0.805, 0.805, 0.805, 0.805, 0.83, 0.83, 0.83, 0.83]
    made = decisions_of(adaptive(), upwards)
    assert [d.step for d in made] == [60, 140]
    assert made[1].evidence["progress"] == pytest.approx(0.03)


def test_nothing_follows_the_last():
    assert len(decisions_of(adaptive(max_dwell=10), [0.5] * 100)) == len(CANDIDATES) - 1
    assert decisions_of(AdaptiveConfig(teachers=(7,), max_dwell=10), [0.5] * 100) == []


def test_a_late_report_takes_effect_later():
    made = decide(adaptive(max_dwell=10), CANDIDATES, [Report(10, 0.5)], [], now=95)
    assert (made.step, made.effective) == (10, 99)


@quick
@given(st.lists(st.floats(0, 1), max_size=60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 60), st.data())
def test_any_course(values, window, patience, min_dwell, data):
    max_dwell = data.draw(st.one_of(st.none(), st.integers(min_dwell, 200)))
    setting = adaptive(window=window, patience=patience, min_dwell=min_dwell, max_dwell=max_dwell)
    made = decisions_of(setting, values)
    starts = [0, *(d.effective for d in made)]
    for number, found in enumerate(made):
        assert found.sequence == number
        assert found.checkpoint == CANDIDATES[number + 1]
        assert found.effective == found.step + setting.lead
        assert min_dwell <= found.step - starts[number]
        if found.reason == "saturated":
            dwell = [values[i] for i in range(len(values)) if starts[number] < 10 * (i + 1) <= found.step]
            for back in range(patience):
                end = len(dwell) - 1 - back
                assert dwell[end] - sum(dwell[end - window : end]) / window < setting.gain + 1e-12
        else:
            assert found.step - starts[number] >= max_dwell
    if max_dwell is not None and len(values) * 10 >= 3 * (max_dwell + 20):
        assert len(made) == 2


# ------------------------------------------------------------------------------------------------------------------ log


def open_log(path, writes=True, **changes) -> DecisionLog:
    return DecisionLog(path, subject(adaptive(**changes), CANDIDATES), writes=writes)


def fill(path) -> list[bytes]:
    log = open_log(path)
    assert log.add_report(Report(10, 0.1 + 0.2))
    assert log.add_report(Report(20, 0.5))
    assert log.add_decision(decision(0, 24)) == decision(0, 24)
    assert log.add_report(Report(30, 0.6))
    assert log.add_decision(decision(1, 34, 300)) == decision(1, 34, 300)
    log.close()
    return path.read_bytes().splitlines(keepends=True)


def test_a_log_is_read_back_exactly(tmp_path):
    path = tmp_path / "run" / "decisions.jsonl"
    fill(path)
    for writes in (True, False):
        log = open_log(path, writes)
        assert log.reports == (Report(10, 0.1 + 0.2), Report(20, 0.5), Report(30, 0.6))
        assert log.decisions == (decision(0, 24), decision(1, 34, 300))
        log.close()


def test_a_log_torn_anywhere_holds_what_was_whole(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = fill(path)
    content = b"".join(lines)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        reader = open_log(path, writes=False)
        assert path.read_bytes() == content[:length]
        assert len(reader.reports) + len(reader.decisions) == max(0, whole - 1)
        log = open_log(path)
        assert (log.reports, log.decisions) == (reader.reports, reader.decisions)
        assert path.read_bytes() == b"".join(lines[: max(1, whole)])
        if whole >= 1:
            assert log.add_report(Report(1000, 0.25))
            log.close()
            assert open_log(path, writes=False).reports[-1] == Report(1000, 0.25)
        log.close()


def test_what_a_power_cut_leaves_at_the_end_is_dropped(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = fill(path)
    path.write_bytes(b"".join(lines) + b"\0" * 40 + b"\n" + b'{"kind": "re')
    log = open_log(path)
    assert len(log.decisions) == 2
    assert path.read_bytes() == b"".join(lines)
    log.close()


@pytest.mark.parametrize(
    "bad", [b"", b"{}", b'{"kind": "decision"}', b"\0\0", b'{"kind": "other"}', b'{"kind": "report", "step": 1, "x": 2}']
)
def test_damage_in_the_middle_is_told(tmp_path, bad):
    path = tmp_path / "d.jsonl"
    lines = fill(path)
    lines[2] = bad + b"\n"
    path.write_bytes(b"".join(lines))
    for writes in (True, False):
        with pytest.raises(UserError, match=r"d\.jsonl: line 3 is damaged .* others follow"):
            open_log(path, writes)
    assert path.read_bytes() == b"".join(lines)


def test_a_decision_that_went_missing_is_damage(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = fill(path)
    path.write_bytes(b"".join([*lines[:3], *lines[4:], b'{"kind": "report", "step": 99, "value": 0.5}\n']))
    with pytest.raises(UserError, match=r"line 5 is damaged \(decision 1 does not follow the 0 on record\)"):
        open_log(path)


def test_a_number_is_given_once(tmp_path):
    log = open_log(tmp_path / "d.jsonl")
    assert log.add_decision(decision(0, 24)) == decision(0, 24)
    assert log.add_decision(decision(0, 99, 300)) == decision(0, 24)  # the first holds
    with pytest.raises(ValueError, match="decision 2 does not follow the 1 on record"):
        log.add_decision(decision(2, 50))
    with pytest.raises(ValueError, match="not after the one before it, at 24"):
        log.add_decision(decision(1, 24))
    log.close()
    assert open_log(tmp_path / "d.jsonl", writes=False).decisions == (decision(0, 24),)


def test_a_report_is_taken_once(tmp_path):
    log = open_log(tmp_path / "d.jsonl")
    assert log.add_report(Report(20, 0.5))
    for step in (20, 10):
        assert not log.add_report(Report(step, 0.9))
    assert log.reports == (Report(20, 0.5),)
    log.close()


def test_another_subject_is_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    fill(path)
    with pytest.raises(UserError, match=r"schedule: settings was .*'gain': 0\.01.* and is .*'gain': 0\.5.* now"):
        open_log(path, gain=0.5)
    with pytest.raises(UserError, match=r"schedule: candidates was \[100, 200, 300\] .* and is \[100, 200, 400\] now"):
        DecisionLog(path, subject(adaptive(), (100, 200, 400)), writes=True)


def test_two_processes_cannot_write_one_log(tmp_path):
    path = tmp_path / "d.jsonl"
    log = open_log(path)
    with pytest.raises(UserError, match="another process is training this run"):
        open_log(path)
    open_log(path, writes=False).close()  # ranks read beside it
    log.close()
    open_log(path).close()


def test_a_full_disk_leaves_the_log_whole(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    log = open_log(path)
    write = log.__class__._append.__globals__["os"].write
    monkeypatch.setattr("megapd.schedule.decision_log.os.write", lambda file, data: write(file, data[:7]))
    with pytest.raises(OSError, match="No space left"):
        log.add_report(Report(10, 0.5))
    assert log.reports == ()
    monkeypatch.undo()
    assert log.add_report(Report(20, 0.5))
    log.close()
    assert open_log(path, writes=False).reports == (Report(20, 0.5),)


WRITER = """
import sys
from megapd.config import AdaptiveConfig
from megapd.schedule.decision_log import DecisionLog, subject
from megapd.schedule.plan import Decision, Report
log = DecisionLog(sys.argv[1], subject(AdaptiveConfig(teachers=(100, 200, 300), window=3, lead=4), (100, 200, 300)), writes=True)
begin = len(log.decisions)
for n in range(begin, begin + 1000):
    log.add_report(Report(10 * n + 10, 0.5))
    log.add_decision(Decision(n, 10 * n + 10, 10 * n + 14, 100 + n % 7, "saturated", {}))
    print(n, flush=True)
"""


def test_kill_9_loses_no_acknowledged_decision(tmp_path):
    path, generator, known = tmp_path / "d.jsonl", random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        acknowledged = known - 1
        for line in process.stdout:
            acknowledged = int(line)
            if acknowledged >= known + generator.randrange(3, 40):
                process.kill()
                break
        rest = [int(line) for line in process.stdout if line.endswith("\n")]
        process.wait()
        acknowledged = max([acknowledged, *rest])
        log = open_log(path, writes=False)
        known = len(log.decisions)
        assert acknowledged < known <= acknowledged + 2
        assert [d.sequence for d in log.decisions] == list(range(known))
    assert known >= 12


# ------------------------------------------------------------------------------------------------------------- the decider


def course(seed=0, count=60):
    generator = random.Random(seed)
    return [min(1.0, 0.5 + 0.2 * (i // 12) + generator.uniform(0, 0.005)) for i in range(count)]


def run_of(path, values, begin, end, setting, every=10):
    """Report steps begin.. to ..end of a run; the decisions on record then."""
    store = DecisionLog(path, subject(setting, CANDIDATES), writes=True)
    decider = EmbeddedDecider(setting, CANDIDATES, store)
    made = [decider.report(step, {"accuracy": values[step // every - 1]}) for step in range(begin + every, end + 1, every)]
    decider.sync()
    found = tuple(store.decisions)
    decider.close()
    return found, [d for d in made if d is not None]


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_anywhere_resumes_into_the_same_decisions(tmp_path, seed):
    setting, values = adaptive(min_dwell=20), course(seed)
    whole, made = run_of(tmp_path / "whole.jsonl", values, 0, 600, setting)
    assert list(whole) == made
    assert len(whole) == 2
    content = (tmp_path / "whole.jsonl").read_bytes()
    for killed in range(content.index(b"\n") + 1, len(content), 97):
        path = tmp_path / "killed.jsonl"
        path.write_bytes(content[:killed])
        steps = [json.loads(line).get("step", 0) for line in content[:killed].split(b"\n")[:-1]]
        resume = max(0, steps[-1] - 30)  # the run's newest checkpoint lay behind
        # Other rank counts report slightly different numbers for what is on record: they change nothing.
        again = [v + 1e-6 if (i + 1) * 10 <= steps[-1] else v for i, v in enumerate(values)]
        assert run_of(path, again, resume, 600, setting)[0] == whole
        assert path.read_bytes() == content


def test_a_decider_takes_numbers_alone(tmp_path):
    store = open_log(tmp_path / "d.jsonl", max_dwell=1)
    decider = EmbeddedDecider(adaptive(max_dwell=1), CANDIDATES, store)
    for metrics in ({}, {"accuracy": None}, {"accuracy": float("nan")}, {"divergence": 0.5}):
        assert decider.report(10, metrics) is None
    assert store.reports == ()
    assert decider.report(10, {"accuracy": 1}).checkpoint == 200
    decider.close()
    assert (reported_kind(adaptive()), reported_kind(adaptive(metric="divergence"))) == ("eval", "train")


# ---------------------------------------------------------------------------------------------------------------- the plan


@quick
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(CANDIDATES)), max_size=6), st.integers(1, 40))
def test_a_plan_is_a_function_of_its_decisions(parts, steps):
    made, start = [], 0
    for number, (length, checkpoint) in enumerate(parts):
        start += length
        made.append(decision(number, start, checkpoint))
    plan = AdaptivePlan(CANDIDATES, steps, made)
    wanted = [next((d.checkpoint for d in reversed(made) if d.effective <= s), 100) for s in range(steps)]
    changes = [(0, 100)] + [(s, wanted[s]) for s in range(1, steps) if wanted[s] != wanted[s - 1]]
    assert plan.rotations() == changes
    assert list(zip(plan.starts, plan.teachers, strict=True)) == changes
    assert plan.fixed() == [(0, 100)]
    assert plan.known == len(made)
    for step in range(steps):
        assert plan.next_after(step) == next((c for c in changes if c[0] > step), None)
        assert plan.checkpoint_at(step) == wanted[step]


def test_what_was_asked_for_cannot_change():
    plan = AdaptivePlan(CANDIDATES, 100)
    assert plan.checkpoint_at(24) == 100
    with pytest.raises(RuntimeError, match=r"effect at student step 24, but step 24 has been asked for; raise schedule\.lead"):
        plan.take(decision(0, 24))
    plan.take(decision(0, 25))
    assert (plan.checkpoint_at(24), plan.checkpoint_at(25)) == (100, 200)
    with pytest.raises(RuntimeError, match="decision 2 came after 1 others"):
        plan.take(decision(2, 50))
    with pytest.raises(AssertionError, match="of a plan for 100 steps"):
        plan.checkpoint_at(100)


def test_lead_and_record_are_checked(tmp_path):
    check_lead(adaptive(lead=3), 2)
    with pytest.raises(UserError, match=r"^schedule\.lead: 2 student steps, but signals are asked for 2 steps ahead"):
        check_lead(adaptive(lead=2), 2)
    fill(tmp_path / "d.jsonl")
    log = open_log(tmp_path / "d.jsonl", writes=False)
    assert recorded_decisions(log, 1) == log.decisions
    with pytest.raises(UserError, match=r"taught by 3 decisions, but 2 are on record"):
        recorded_decisions(log, 3)


def test_candidates():
    there = [0, 10, 20, 40, 80]
    assert candidates(AdaptiveConfig(teachers=(0, 20)), there) == (0, 20)
    assert candidates(AdaptiveConfig(checkpoints=2), there) == (40, 80)
    assert candidates(AdaptiveConfig(checkpoints=4, spacing="geometric"), there) == (10, 20, 40, 80)
    plan = build_plan(AdaptiveConfig(checkpoints=2), available=there, steps=9)
    assert isinstance(plan, AdaptivePlan)
    assert (plan.policy, plan.candidates, plan.rotations(), plan.warnings) == ("adaptive", (40, 80), [(0, 40)], ())
    with pytest.raises(UserError, match=r"^schedule\.teachers: .*step 30"):
        build_plan(AdaptiveConfig(teachers=(10, 30)), available=there, steps=9)
    for changes, message in (
        ({}, "checkpoints: give either"),
        ({"checkpoints": 2, "teachers": (1,)}, "checkpoints: give either"),
        ({"teachers": (2, 2)}, "teachers: the steps must increase"),
        ({"checkpoints": 2, "min_dwell": 9, "max_dwell": 8}, "max_dwell: 8 is below min_dwell 9"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveConfig(**changes)


def test_a_decision_is_json():
    assert Decision(**json.loads(json.dumps(asdict(decision(0, 24))))) == decision(0, 24)

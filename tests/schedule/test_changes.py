"""The journal of changes and the reports beside it after every crash, and the decisions of a run that is killed."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict

import pytest

from megapd.config import OneShotConfig
from megapd.errors import DiskFailed, UserError
from megapd.schedule.changes import ChangeLog, open_embedded
from megapd.schedule.plan import Decision, Report, Version, resolved
from megapd.schedule.policies import build_plan
from megapd.schedule.reports import ReportLog, has_reports, subject
from tests.schedule.decider import CANDIDATES, adaptive

REPORTS = [Report(10, 0.1 + 0.2), Report(20, 0.5), Report(30, 0.6)]


def decision(sequence, effective, checkpoint=200):
    return Decision(sequence, effective - 4, effective, checkpoint, "saturated", {"gains": [0.1 + 0.2]})


# ---------------------------------------------------------------------------------------------------------- the journal


def test_changes_are_on_record_as_they_were(tmp_path):
    path = tmp_path / "run" / "changes.json"
    one_shot = OneShotConfig(checkpoint=50)
    changes = [
        resolved(2, 30, one_shot, build_plan(one_shot, available=range(10, 110, 10), steps=100)),
        decision(0, 40),
        dataclasses.replace(Version(1, 0, "explicit", ((0, 10), (20, 20), (60, 30))), version=3, start=60, timeout=9.5),
    ]
    record = ChangeLog(path, "r")
    assert record.changes == ()
    for change in changes:
        record.append(change)
    assert ChangeLog(path, "r").changes == tuple(changes)
    assert ChangeLog(path, "r").decisions == (decision(0, 40),)
    path.write_text(path.read_text().replace("megapd-changes/2", "megapd-changes/9"))
    with pytest.raises(UserError, match="damaged"):
        ChangeLog(path, "r")
    path.write_text(json.dumps({"format": "megapd-changes/1", "changes": [{"kind": "other"}]}))
    with pytest.raises(UserError, match="kind 'other'"):
        ChangeLog(path, "r")


def test_the_former_format_is_read(tmp_path):
    entries = [
        {"kind": "version", "version": 2, "start": 30, "policy": "follow", "rotations": [[0, 10], [20, 20]], "timeout": 5.0},
        {"kind": "version", "version": 3, "start": 50, "policy": "adaptive", "rotations": [[0, 10]], "timeout": None},
    ]
    (tmp_path / "changes.json").write_text(json.dumps({"format": "megapd-changes/1", "changes": entries}))
    log = ChangeLog(tmp_path / "changes.json", "r")
    wanted = (Version(2, 30, "follow", ((0, 10), (20, 20)), 5.0), Version(3, 50, "adaptive", ((0, 10),), grows=True))
    assert log.changes == wanted
    log.append(decision(0, 60))
    assert ChangeLog(tmp_path / "changes.json", "r").changes == (*wanted, decision(0, 60))


def test_a_decision_that_went_missing_is_damage(tmp_path):
    path = tmp_path / "changes.json"
    changes = [{"kind": "decision", **asdict(decision(1, 34))}]
    path.write_text(json.dumps({"format": "megapd-changes/2", "changes": changes}))
    with pytest.raises(UserError, match=r"damaged \(decision 1 does not follow the 0 on record\)"):
        ChangeLog(path, "r")


def test_a_number_is_given_once(tmp_path):
    log = ChangeLog(tmp_path / "changes.json", "r")
    log.append(decision(0, 24))
    for refused, message in (
        (decision(0, 99, 300), "decision 0 does not follow the 1 on record"),  # the first holds
        (decision(2, 50), "decision 2 does not follow the 1 on record"),
        (decision(1, 24), "not after the one before it, at 24"),
    ):
        with pytest.raises(ValueError, match=message):
            log.append(refused)
        assert log.changes == ChangeLog(tmp_path / "changes.json", "r").changes == (decision(0, 24),)


def test_a_change_that_the_disk_refuses_is_not_on_record(tmp_path, monkeypatch):
    log = ChangeLog(tmp_path / "changes.json", "r")
    log.append(decision(0, 24))

    def full(*_):
        raise OSError("No space left")

    monkeypatch.setattr("megapd.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        log.append(decision(1, 34))
    monkeypatch.undo()
    assert log.changes == ChangeLog(tmp_path / "changes.json", "r").changes == (decision(0, 24),)
    log.append(decision(1, 44))
    assert ChangeLog(tmp_path / "changes.json", "r").decisions == (decision(0, 24), decision(1, 44))


# ----------------------------------------------------------------------------------------------------------- the reports


def open_log(path, **changes) -> ReportLog:
    return ReportLog(path, "r", subject(adaptive(**changes), CANDIDATES))


def reports_of(path) -> tuple[Report, ...]:
    log = open_log(path)
    log.close()
    return log.reports


def fill(path) -> list[bytes]:
    log = open_log(path)
    assert all(log.append(report) for report in REPORTS)
    log.close()
    return path.read_bytes().splitlines(keepends=True)


def test_a_log_is_read_back_exactly(tmp_path):
    path = tmp_path / "run" / "reports.jsonl"
    fill(path)
    for _ in range(2):
        assert reports_of(path) == tuple(REPORTS)


def test_a_log_torn_anywhere_holds_what_was_whole(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = fill(path)
    content = b"".join(lines)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        log = open_log(path)
        assert log.reports == tuple(REPORTS[: max(0, whole - 1)])
        assert path.read_bytes() == b"".join(lines[: max(1, whole)])
        assert log.append(Report(1000, 0.25))
        log.close()
        assert reports_of(path)[-1] == Report(1000, 0.25)


def test_what_a_power_cut_leaves_at_the_end_is_dropped(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = fill(path)
    path.write_bytes(b"".join(lines) + b"\0" * 40 + b"\n" + b'{"kind": "re')
    assert reports_of(path) == tuple(REPORTS)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "bad", [b"", b"{}", b'{"kind": "decision"}', b"\0\0", b'{"kind": "other"}', b'{"kind": "report", "step": 1, "x": 2}', b"7"]
)
def test_damage_in_the_middle_is_told(tmp_path, bad):
    path = tmp_path / "r.jsonl"
    lines = fill(path)
    lines[2] = bad + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"r\.jsonl: line 3 is damaged .* others follow"):
        open_log(path)
    assert path.read_bytes() == b"".join(lines)


def test_a_report_is_taken_once(tmp_path):
    log = open_log(tmp_path / "r.jsonl")
    assert log.append(Report(20, 0.5))
    for step in (20, 10):
        assert not log.append(Report(step, 0.9))
    assert log.reports == (Report(20, 0.5),)
    log.close()


def test_another_subject_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    fill(path)
    with pytest.raises(UserError, match=r"schedule: settings was .*'gain': 0\.01.* and is .*'gain': 0\.5.* now"):
        open_log(path, gain=0.5)
    with pytest.raises(UserError, match=r"schedule: candidates was \[100, 200, 300\] .* and is \[100, 200, 400\] now"):
        ReportLog(path, "r", subject(adaptive(), (100, 200, 400)))
    path.write_text(path.read_text().replace("megapd-reports/1", "megapd-reports/9"))
    with pytest.raises(UserError, match="its format is 'megapd-reports/9'"):
        open_log(path)


def test_two_processes_cannot_write_one_log(tmp_path):
    path = tmp_path / "reports.jsonl"
    log = open_log(path)
    with pytest.raises(UserError, match="another process is training this run"):
        open_log(path)
    assert not has_reports(tmp_path)
    log.append(Report(10, 0.5))
    assert has_reports(tmp_path)  # which may be asked beside it
    log.close()
    open_log(path).close()


def test_a_full_disk_leaves_the_log_whole(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    log = open_log(path)
    write = os.write
    monkeypatch.setattr("megapd.schedule.reports.os.write", lambda file, data: write(file, data[:7]))
    with pytest.raises(DiskFailed, match=r"r\.jsonl: no space left"):
        log.append(Report(10, 0.5))
    assert log.reports == ()
    monkeypatch.undo()
    assert log.append(Report(20, 0.5))
    log.close()
    assert reports_of(path) == (Report(20, 0.5),)


@pytest.mark.slow
def test_kill_9_loses_no_acknowledged_decision(tmp_path):
    generator, known = random.Random(0), 0
    for _ in range(4):
        command = [sys.executable, "-m", "tests.schedule.decider", str(tmp_path)]
        acknowledged = known - 1
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                acknowledged = int(line)
                if acknowledged >= known + generator.randrange(3, 40):
                    process.kill()
                    break
            rest = [int(line) for line in process.stdout if line.endswith("\n")]
        acknowledged = max([acknowledged, *rest])
        decisions = ChangeLog(tmp_path / "changes.json", "r").decisions
        known = len(decisions)
        assert acknowledged < known <= acknowledged + 2
        assert [d.sequence for d in decisions] == list(range(known))
        assert known <= len(reports_of(tmp_path / "reports.jsonl")) <= known + 1  # what they rest on, and the next
    assert known >= 12


# ------------------------------------------------------------------------------------------------------- a run's decisions


def course(seed=0, count=60):
    generator = random.Random(seed)
    return [min(1.0, 0.5 + 0.2 * (i // 12) + generator.uniform(0, 0.005)) for i in range(count)]


def run_of(folder, values, begin, end, setting, every=10):
    """Report steps begin.. to ..end of a run; (all decisions on record then, those made now)."""
    changes = ChangeLog(folder / "changes.json", "r")
    source = open_embedded(folder, "r", setting, CANDIDATES, changes, (0, ""))
    made = []
    for step in range(begin + every, end + 1, every):
        source.report("eval", step, {"accuracy": values[step // every - 1]})
        made.append(source.next(step))
    source.sync()
    source.close()
    return changes.decisions, [d for d in made if d is not None]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_anywhere_resumes_into_the_same_decisions(tmp_path, seed):
    setting, values = adaptive(min_dwell=20), course(seed)
    whole, made = run_of(tmp_path / "whole", values, 0, 600, setting)
    assert list(whole) == made
    assert len(whole) == 2
    wanted = files(tmp_path / "whole")
    content = wanted["reports.jsonl"]
    folder = tmp_path / "killed"
    folder.mkdir()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for killed in sorted({*range(ends[0], len(content), 97), *ends}):
        reported = content[:killed].count(b"\n") - 1
        last = 10 * reported
        # A decision reaches the disk after the report that it rests on: the last one's may be there or not.
        for known in {sum(d.step < last for d in whole), sum(d.step <= last for d in whole)}:
            (folder / "changes.json").unlink(missing_ok=True)
            if known:
                ChangeLog(folder / "changes.json", "r").append(*whole[:known])
            (folder / "reports.jsonl").write_bytes(content[:killed])
            resume = max(0, last - 30)  # the run's newest checkpoint lay behind
            # Other rank counts report slightly different numbers for what is on record: they change nothing.
            again = [v + 1e-6 if (i + 1) * 10 <= last else v for i, v in enumerate(values)]
            assert run_of(folder, again, resume, 600, setting)[0] == whole
            assert files(folder) == wanted


def test_a_source_takes_numbers_of_its_own_kind_alone(tmp_path):
    source = open_embedded(tmp_path, "r", adaptive(max_dwell=1), CANDIDATES, ChangeLog(tmp_path / "changes.json", "r"), (0, ""))
    for metrics in ({}, {"accuracy": None}, {"accuracy": float("nan")}, {"divergence": 0.5}):
        source.report("eval", 10, metrics)
    source.report("train", 10, {"accuracy": 1.0})
    assert source.next(10) is None
    assert not has_reports(tmp_path)
    source.report("eval", 10, {"accuracy": 1})
    assert source.next(10).checkpoint == 200
    source.close()


# ------------------------------------------------------------------------------------------------------- runs begun before


def former(folder, lines) -> None:
    """The one file in which runs kept reports and decisions, by hand."""
    subject_line = {"kind": "subject", "format": "megapd-decisions/1", **subject(adaptive(min_dwell=20), CANDIDATES)}
    (folder / "decisions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [subject_line, *lines]))


@pytest.mark.parametrize("stage", ["before", "reports", "changes"])
def test_a_run_begun_before_goes_on_as_it_would_have(tmp_path, stage):
    """stage: where a first attempt to take the old file over was killed."""
    setting, values = adaptive(min_dwell=20), course()
    whole, _ = run_of(tmp_path / "whole", values, 0, 600, setting)
    folder = tmp_path / "before"
    folder.mkdir()
    lines = []
    for number, value in enumerate(values[:30], start=1):
        lines.append({"kind": "report", "step": 10 * number, "value": value})
        lines += [{"kind": "decision", **asdict(d)} for d in whole if d.step == 10 * number]
    assert sum(line["kind"] == "decision" for line in lines) >= 1
    former(folder, lines)
    assert has_reports(folder)
    if stage in ("reports", "changes"):
        content = (tmp_path / "whole" / "reports.jsonl").read_bytes()
        (folder / "reports.jsonl").write_bytes(content[: len(content) // 3])
    if stage == "changes":
        ChangeLog(folder / "changes.json", "r").append(*(d for d in whole if d.step <= 300))
    assert run_of(folder, [value + 1e-6 for value in values[:30]] + values[30:], 200, 600, setting)[0] == whole
    assert files(folder) == files(tmp_path / "whole")  # and the old file is gone


def test_damage_in_what_a_run_begun_before_left_is_told(tmp_path):
    lines = [{"kind": "report", "step": 10, "value": 0.5}, {"kind": "other"}, {"kind": "report", "step": 20, "value": 0.5}]
    former(tmp_path, lines)
    for _ in range(2):
        with pytest.raises(UserError, match=r"decisions\.jsonl: line 3 is damaged .* others follow"):
            open_embedded(tmp_path, "r", adaptive(min_dwell=20), CANDIDATES, ChangeLog(tmp_path / "changes.json", "r"), (0, ""))
    with pytest.raises(UserError, match=r"schedule: settings was .*'min_dwell': 20"):
        open_embedded(tmp_path, "r", adaptive(min_dwell=30), CANDIDATES, ChangeLog(tmp_path / "changes.json", "r"), (0, ""))
    assert sorted(files(tmp_path)) == ["decisions.jsonl", "reports.jsonl"]


def test_a_decision_is_json():
    assert Decision(**json.loads(json.dumps(asdict(decision(0, 24))))) == decision(0, 24)

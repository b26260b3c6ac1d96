"""The verbs of the scheduler, where what they are given is not what they need."""

from __future__ import annotations

import contextlib
import json

import pytest

from megapd.cli import main
from megapd.config import SchedulerConfig
from megapd.errors import UserError
from megapd.scheduler.local import open_api
from megapd.scheduler.store import trajectories as catalogue
from megapd.scheduler.store.database import Refused, Store
from megapd.scheduler.store.runs import parse_schedule
from tests.scheduler import services


@pytest.mark.parametrize(
    "verb", [["schedule", "show", "student"], ["trajectory", "verify", "nowhere"], ["scheduler", "tokens"]], ids=" ".join
)
def test_commands_that_read_make_no_database(tmp_path, capsys, verb):
    assert main([*verb, f"--scheduler.database=sqlite:///{tmp_path}/none.db"]) == 2
    assert "scheduler.database: there is no" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_is_set_beside_the_database_as_over_http(tmp_path, capsys):
    """Without scheduler.url: by the API in this process, whose caller has the database and needs no token."""
    database = f"--scheduler.database=sqlite:///{tmp_path}/scheduler.db"
    with services.client(tmp_path, max_body_bytes=1024) as http:
        assert http.put("/v1/runs/student", json={"steps": 1000}).status_code == 201
        services.token(http.service.store, "run")
    new = ["--schedule.policy=explicit", "--schedule.ranges=" + json.dumps([{"start": s, "checkpoint": s} for s in range(99)])]
    assert main(["schedule", "set", "student", *new, database, "--scheduler.max_body_bytes=1024"]) == 0
    assert main(["schedule", "set", "student", "--schedule.policy=one_shot", "--at=500", "--note=why", database]) == 0
    assert "version 2: one_shot, begins at student step 500, not taken up yet, by command line (why)" in capsys.readouterr().out
    assert main(["schedule", "show", "student", database]) == 0
    told = capsys.readouterr().out
    assert told.startswith("student: nothing reported yet, 0 decisions, replicas: none\nversion 2: one_shot")
    assert "policy: one_shot" in told
    assert main(["schedule", "set", "student", "--schedule.policy=one_shot", "--at=1000", database]) == 2
    assert "effective: student ends at step 1000; choose an earlier one" in capsys.readouterr().err
    assert main(["schedule", "show", "nobody", database]) == 2
    assert "run: there is none called nobody" in capsys.readouterr().err


def test_a_service_that_is_away_is_told_in_one_line():
    settings = SchedulerConfig(url="http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"does not answer.*is `megapd scheduler` up"), open_api(settings, retry_seconds=0) as api:
        api.ask("GET", "/v1/runs")


def test_the_history_says_where_changes_began(tmp_path, capsys):
    with services.client(tmp_path) as http:
        assert http.put("/v1/runs/student", json={"steps": 1000}).status_code == 201
        for expected, effective in ((0, 0), (1, 500)):
            body = {"expected": expected, "effective": effective, "document": {"policy": "one_shot", "checkpoint": 10}}
            assert http.put("/v1/runs/student/schedule", json=body).status_code == 201
        made = {"sequence": 0, "step": 20, "effective": 24, "checkpoint": 20, "reason": "max_dwell", "evidence": {}}
        assert http.post("/v1/runs/student/decisions", json=made).status_code == 201
        for change, step in (("decisions/0", 77), ("schedules/2", 1000)):
            assert http.post(f"/v1/runs/student/{change}/applied", json={"step": step}).status_code == 200
    assert main(["schedule", "history", "student", f"--scheduler.database=sqlite:///{tmp_path}/scheduler.db"]) == 0
    told = capsys.readouterr().out
    assert "decision 0: teacher step 20 from student step 77" in told
    assert "version 2: one_shot, begins at student step 500, never taken up" in told


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"policy": "foo"}, "^schedule.policy: unknown schedule policy 'foo'"),
        ({}, "^schedule.policy: "),
        ({"policy": "one_shot", "checkpoint": "x"}, "^schedule.checkpoint: "),
        ({"policy": "adaptive", "checkpoints": 2, "teachers": [1]}, "^schedule: checkpoints: give either"),
    ],
)
def test_a_document_that_is_no_schedule_names_the_setting(document, message):
    with pytest.raises(Refused, match=message):
        parse_schedule(document)


def test_a_name_that_no_request_could_ask_for_is_refused(tmp_path):
    with contextlib.closing(Store(f"sqlite:///{tmp_path}/s.db")) as store:
        digest = store.write(lambda connection: catalogue.add_trajectory(connection, "t", "/t", "")[0]["digest"])
        for name in ("a b", "a/b", "f" * 64):
            with pytest.raises(Refused, match="name: "):
                store.write(lambda connection, name=name: catalogue.set_name(connection, name, digest))

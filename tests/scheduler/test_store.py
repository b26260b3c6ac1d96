"""The store: what a write is, migrations, and runs, schedules, decisions and reports as functions of a connection."""

from __future__ import annotations

import contextlib
import sqlite3
import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, select, update

from megapd.errors import UserError
from megapd.scheduler.store import events as journal
from megapd.scheduler.store import runs, tables, tokens
from megapd.scheduler.store import trajectories as catalogue
from megapd.scheduler.store.control import control
from megapd.scheduler.store.database import HEAD, Conflict, NotFound, Refused, Store
from megapd.scheduler.store.tables import metadata, names
from tests.scheduler.services import new_database, postgres, postgres_binaries

EQUAL = {"policy": "equal", "checkpoints": 2, "steps": 20}


@pytest.fixture(scope="module")
def server():
    if postgres_binaries() is None:
        pytest.skip("needs PostgreSQL's initdb and postgres (Debian: postgresql)")
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def store(request, tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    if request.param == "postgresql":
        url = new_database(request.getfixturevalue("server"))
    with contextlib.closing(Store(url)) as found:
        yield found


@pytest.fixture
def sqlite(tmp_path):
    with contextlib.closing(Store(f"sqlite:///{tmp_path}/s.db")) as found:
        yield found


def trajectory(store: Store, steps=(10, 20, 30, 40), name="teacher") -> str:
    def write(connection):
        digest = catalogue.add_trajectory(connection, name, f"/{name}", "v1")[0]["digest"]
        for step in steps:
            record = {"step": step, "weights": f"{step:064x}", "metrics": {}, "files": {}}
            catalogue.add_checkpoint(connection, digest, record)
        catalogue.set_name(connection, name, digest)
        return digest

    return store.write(write)


def run(store: Store, name="student", trajectory="teacher", steps=100) -> None:
    store.write(lambda c: runs.put_run(c, name, trajectory=trajectory, group=name, steps=steps, facts={}))


def schedule(store: Store, document=EQUAL, *, expected=0, effective=0, name="student", **more):
    return store.write(
        lambda c: runs.set_schedule(c, name, document, expected=expected, effective=effective, author="test", **more)
    )


def decision(sequence: int, **changes) -> runs.Stored:
    made = {"sequence": sequence, "step": 1, "effective": 10 * (sequence + 1), "checkpoint": 20, "reason": "saturated"}
    return {**made, "evidence": {"gain": 0.1, "of": [1, 2.5]}, "applied": None, **changes}


def decide(store: Store, made: runs.Stored):
    return store.write(lambda c: runs.add_decision(c, "student", made))


# ------------------------------------------------------------------------------------------------------------- the store


def test_a_new_store_is_what_the_tables_say(store):
    with store._writer_engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_head_is_the_newest_migration():
    config = Config()
    config.set_main_option("script_location", "megapd.scheduler.store:migrations")
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_a_store_of_a_newer_megapd_is_refused(tmp_path):
    Store(f"sqlite:///{tmp_path}/s.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    with pytest.raises(UserError, match="newer megapd"):
        Store(f"sqlite:///{tmp_path}/s.db")


@pytest.mark.parametrize("url", ["sqlite:////proc/nowhere/s.db", "postgresql://nobody@127.0.0.1:1/none"])
def test_a_database_that_cannot_be_opened_is_told_in_one_line(url):
    with pytest.raises(UserError, match=r"scheduler\.database") as error:
        Store(url)
    assert "\n" not in str(error.value)


def test_sqlite_writes_through_to_the_disk(sqlite):
    with sqlite._writer_engine.connect() as connection:
        raw = connection.connection.dbapi_connection
        pragmas = {name: raw.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")}
        assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
        assert raw.execute("PRAGMA busy_timeout").fetchone()[0] >= 10_000


def test_writes_that_wait_share_a_transaction_and_fail_alone(store):
    begun, release = threading.Event(), threading.Event()

    def hold(connection):
        begun.set()
        release.wait(10)

    def fail(connection):
        connection.execute(names.insert(), {"name": "half", "digest": "0" * 64, "version": 1})
        raise Refused("no")

    def good(connection, name):
        connection.execute(names.insert(), {"name": name, "digest": "0" * 64, "version": 1})

    def doubled(connection):
        connection.execute(names.insert(), {"name": "a", "digest": "0" * 64, "version": 1})

    holding = store.submit(hold)
    begun.wait(10)
    commits = []
    store.on_commit(lambda: commits.append(1))
    first, bad = store.submit(lambda c: good(c, "a")), store.submit(fail)
    twice, last = store.submit(doubled), store.submit(lambda c: good(c, "b"))
    release.set()
    for future in (holding, first, last):
        future.result(10)
    with pytest.raises(Refused):
        bad.result(10)
    with pytest.raises(Exception, match=r"(?i)unique"):
        twice.result(10)
    assert set(store.read(lambda c: list(c.execute(select(names.c.name)).scalars()))) == {"a", "b"}
    assert len(commits) <= 2  # the one held, and one of the other four


def test_a_reader_sees_what_was_committed_while_a_write_goes_on(store):
    trajectory(store)
    begun, release = threading.Event(), threading.Event()

    def slow(connection):
        catalogue.add_trajectory(connection, "other", "/o", "")
        begun.set()
        release.wait(10)

    future = store.submit(slow)
    begun.wait(10)
    assert len(store.read(lambda c: catalogue.list_trajectories(c, "", 10))) == 1
    release.set()
    future.result(10)
    assert len(store.read(lambda c: catalogue.list_trajectories(c, "", 10))) == 2


def test_one_service_a_store(store):
    store.lock_service()
    other = Store(store._writer_engine.url.render_as_string(hide_password=False))
    try:
        with pytest.raises(UserError, match="another scheduler"):
            other.lock_service()
    finally:
        other.close()


def test_two_processes_may_write_one_sqlite_file(tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    stores = [Store(url), Store(url)]
    futures = [stores[i % 2].submit(lambda c, i=i: catalogue.add_trajectory(c, f"t{i}", "/x", "")) for i in range(60)]
    for future in futures:
        future.result(30)
    events = stores[0].read(lambda c: journal.events_after(c, 0, 100))
    for store in stores:
        store.close()
    assert [event["id"] for event in events] == list(range(1, 61))


def test_event_ids_are_never_used_again(sqlite):
    trajectory(sqlite)
    newest = sqlite.read(journal.span)[1]
    assert sqlite.write(lambda c: journal.prune(c, 1e12)) == newest
    trajectory(sqlite, name="other")
    assert sqlite.read(journal.span)[0] == newest + 1


# ------------------------------------------------------------------------------------------------------- compare and set


def test_records_are_immutable_and_repeats_change_nothing(store):
    digest = trajectory(store)
    events = store.read(journal.span)[1]
    record = {"step": 10, "weights": f"{10:064x}", "metrics": {}, "files": {}}
    found, new = store.write(lambda c: catalogue.add_checkpoint(c, digest, record))
    assert not new
    assert store.read(lambda c: catalogue.find_checkpoint(c, found["digest"])) == found
    with pytest.raises(Conflict, match="immutable"):
        store.write(lambda c: catalogue.add_checkpoint(c, digest, {**record, "weights": "f" * 64}))
    assert store.read(journal.span)[1] == events


def test_names_move_by_compare_and_set(store):
    digest = trajectory(store)
    other = store.write(lambda c: catalogue.add_trajectory(c, "other", "/o", ""))[0]["digest"]
    moved = store.write(lambda c: catalogue.set_name(c, "teacher", other, 1))
    assert moved["version"] == 2
    assert store.write(lambda c: catalogue.set_name(c, "teacher", other, 1)) == moved
    with pytest.raises(Conflict):
        store.write(lambda c: catalogue.set_name(c, "teacher", digest, 1))
    with pytest.raises(NotFound):
        store.write(lambda c: catalogue.set_name(c, "teacher", "0" * 64))


def test_a_schedule_is_set_once_and_then_compared(store):
    trajectory(store)
    run(store)
    first, new = schedule(store)
    assert new
    assert (first["version"], first["applied"]) == (1, 0)
    assert schedule(store) == (first, False)  # the answer was lost, the request came again
    with pytest.raises(Conflict) as error:
        schedule(store, {"policy": "one_shot"}, expected=0)
    assert error.value.current == first
    second, _ = schedule(store, {"policy": "one_shot"}, expected=1, effective=30)
    assert [v["version"] for v in store.read(lambda c: runs.list_schedules(c, "student"))] == [1, 2]
    assert store.read(lambda c: runs.find_schedule(c, "student")) == second


@pytest.mark.parametrize(
    ("document", "more", "message"),
    [
        ({"policy": "explicit", "ranges": [{"start": 0, "checkpoint": 11}]}, {}, "schedule.ranges.0.checkpoint"),
        ({"policy": "none"}, {}, "schedule"),
        ({"policy": "equal", "checkpoints": 2, "steps": 20, "more": 1}, {}, "more"),
        (EQUAL, {"effective": 5}, "effective"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(sqlite, document, more, message):
    trajectory(sqlite)
    run(sqlite)
    with pytest.raises(Refused, match=message):
        schedule(sqlite, document, **more)


def test_a_change_lies_ahead_of_what_was_done(sqlite):
    trajectory(sqlite)
    run(sqlite)
    schedule(sqlite)
    sqlite.write(lambda c: runs.add_report(c, "student", 50, {"loss": 1.0}))
    with pytest.raises(Refused, match="step 50"):
        schedule(sqlite, {"policy": "one_shot"}, expected=1, effective=50)
    schedule(sqlite, {"policy": "one_shot"}, expected=1, effective=51)
    applied = sqlite.write(lambda c: runs.apply_schedule(c, "student", 2, 55))
    assert applied["applied"] == 55
    assert sqlite.write(lambda c: runs.apply_schedule(c, "student", 2, 55)) == applied
    with pytest.raises(Conflict):
        sqlite.write(lambda c: runs.apply_schedule(c, "student", 2, 56))


def test_flagged_checkpoints_are_not_scheduled_until_accepted(store):
    digest = trajectory(store)
    run(store)
    flagged = store.write(lambda c: catalogue.set_flags(c, digest, {20: {"duplicate": "as step 10"}}))
    with pytest.raises(Refused, match="step 20"):
        schedule(store)
    schedule(store, {"policy": "explicit", "ranges": [{"start": 0, "checkpoint": 10}, {"start": 50, "checkpoint": 30}]})
    with pytest.raises(Refused, match="step 20"):
        decide(store, decision(0))
    store.write(lambda c: catalogue.accept(c, flagged[0]["digest"], "ann"))
    decide(store, decision(0))
    schedule(store, expected=1, effective=5)
    # The same finding stays accepted; another one does not.
    store.write(lambda c: catalogue.set_flags(c, digest, {20: {"duplicate": "as step 10"}}))
    assert store.read(lambda c: catalogue.flagged_steps(c, digest)) == {}
    store.write(lambda c: catalogue.set_flags(c, digest, {20: {"changed": "model.safetensors is missing"}}))
    assert store.read(lambda c: catalogue.flagged_steps(c, digest)) == {20: ["changed"]}


def test_decisions_are_appended_in_order_and_never_changed(store):
    trajectory(store)
    run(store)
    first, new = decide(store, decision(0))
    assert new
    assert first == decision(0)
    assert decide(store, decision(0)) == (first, False)
    with pytest.raises(Conflict) as error:
        decide(store, decision(0, checkpoint=30))
    assert error.value.current == first
    with pytest.raises(Conflict, match="number 1, not 2"):
        decide(store, decision(2))
    with pytest.raises(Refused, match="effective"):
        decide(store, decision(1, effective=10))
    decide(store, decision(1))
    assert store.read(lambda c: runs.list_decisions(c, "student")) == [decision(0), decision(1)]
    assert store.read(lambda c: runs.list_decisions(c, "student", 0, 1)) == [decision(1)]


def test_a_decision_that_its_run_learned_of_too_late_begins_where_the_run_says(store):
    trajectory(store)
    run(store)
    decide(store, decision(0))

    def applied(step, sequence=0):
        return store.write(lambda c: runs.apply_decision(c, "student", sequence, step))

    with pytest.raises(Refused, match="takes effect at student step 10, not before"):
        applied(9)
    assert applied(25) == decision(0, applied=25) == applied(25)
    with pytest.raises(Conflict, match="taken up at student step 25"):
        applied(26)
    with pytest.raises(NotFound, match="no decision 3"):
        applied(40, sequence=3)
    assert decide(store, decision(0)) == (decision(0, applied=25), False)
    with pytest.raises(Refused, match="student step 25; choose a later one"):
        decide(store, decision(1, effective=20))
    decide(store, decision(1, effective=26))


def test_a_late_report_decides_for_steps_to_come(sqlite):
    trajectory(sqlite)
    run(sqlite)
    adaptive = {"policy": "adaptive", "teachers": [10, 20, 40], "min_dwell": 1, "max_dwell": 10, "lead": 3, "metric": "accuracy"}
    schedule(sqlite, adaptive)
    _, made = sqlite.write(lambda c: runs.add_report(c, "student", 10, {"accuracy": 0.5}, 37))
    assert made is not None
    assert (made["step"], made["effective"]) == (10, 40)
    assert sqlite.read(lambda c: runs.find_run(c, "student"))["step"] == 37
    sqlite.write(lambda c: runs.apply_decision(c, "student", 0, 44))
    # The dwell of the next checkpoint begins where it began to teach.
    assert sqlite.write(lambda c: runs.add_report(c, "student", 53, {"accuracy": 0.5})) == (True, None)
    _, second = sqlite.write(lambda c: runs.add_report(c, "student", 54, {"accuracy": 0.5}))
    assert second is not None
    assert (second["sequence"], second["effective"]) == (1, 57)


def test_an_adaptive_run_is_decided_with_its_report(sqlite):
    trajectory(sqlite)
    run(sqlite)
    adaptive = {"policy": "adaptive", "teachers": [10, 20, 40], "min_dwell": 1, "max_dwell": 10, "lead": 3, "metric": "accuracy"}
    schedule(sqlite, adaptive)

    def report(step, value=0.5):
        return sqlite.write(lambda c: runs.add_report(c, "student", step, {"accuracy": value, "loss": 1.0}))

    assert report(5) == (True, None)
    new, first = report(10)
    assert new
    assert first is not None
    assert (first["sequence"], first["checkpoint"], first["effective"], first["reason"]) == (0, 20, 13, "max_dwell")
    assert report(10) == (False, first)  # the answer was lost
    assert report(8) == (False, None)
    assert report(14) == (True, None)
    _, second = report(23)
    assert second is not None
    assert (second["sequence"], second["checkpoint"], second["effective"]) == (1, 40, 26)
    assert sqlite.read(lambda c: runs.list_decisions(c, "student")) == [first, second]


# --------------------------------------------------------------------------------------------------------------- control


def act(store: Store, action: str, expected: int, effective: int, **more):
    return store.write(lambda c: control(c, "student", action, expected=expected, effective=effective, author="ann", **more))[0]


def test_control_sets_versions_of_the_schedule(sqlite):
    trajectory(sqlite)
    run(sqlite)
    ranges = [{"start": 0, "checkpoint": 10}, {"start": 20, "checkpoint": 20}, {"start": 60, "checkpoint": 40}]
    schedule(sqlite, {"policy": "explicit", "ranges": ranges})
    advanced = act(sqlite, "advance", 1, 5)
    assert advanced["document"]["ranges"] == [{"start": 0, "checkpoint": 20}, {"start": 60, "checkpoint": 40}]
    assert act(sqlite, "advance", 1, 5) == advanced  # a repeat
    paused = act(sqlite, "pause", 2, 60)
    assert paused["document"]["checkpoint"] == 20
    pinned = act(sqlite, "pin", 3, 70, checkpoint=30)
    assert pinned["document"] == {"policy": "one_shot", "checkpoint": 30}
    resumed = act(sqlite, "resume", 4, 80)
    assert resumed["document"]["ranges"] == ranges
    with pytest.raises(Refused, match="no rotation"):
        act(sqlite, "advance", 5, 90)
    with pytest.raises(Refused, match="checkpoint"):
        act(sqlite, "pin", 5, 90)


# ----------------------------------------------------------------------------------------------------------- assignments


def test_tokens_are_kept_as_hashes(store):
    token = store.write(lambda c: tokens.create_token(c, "admin", "ann"))
    assert store.read(lambda c: tokens.find_token(c, tokens.token_hash(token))) == ("ann", "admin")
    assert token not in str(store.read(lambda c: c.exec_driver_sql("SELECT * FROM tokens").all()))
    with pytest.raises(Conflict):
        store.write(lambda c: tokens.create_token(c, "read", "ann"))
    store.write(lambda c: tokens.revoke_token(c, "ann"))
    assert store.read(lambda c: tokens.find_token(c, tokens.token_hash(token))) is None


def test_look_ups_use_indices(sqlite):
    """The plans of the statements that every run repeats hold no scan: their time does not grow with the history."""
    dialect = create_engine("sqlite://").dialect
    for statement in (runs._ASSIGNMENT, runs._NEWEST, tokens._TOKEN):
        sql = f"EXPLAIN QUERY PLAN {statement.compile(dialect=dialect)}"
        rows = sqlite.read(lambda c, sql=sql: c.exec_driver_sql(sql, ("x",)).all())
        assert rows
        assert not [row for row in rows if "SCAN" in row[3]], (sql, rows)
    paging = [
        "SELECT * FROM decisions WHERE run = 'r' AND sequence > 5 ORDER BY sequence LIMIT 10",
        "SELECT * FROM reports WHERE run = 'r' AND step > 5 ORDER BY step LIMIT 10",
        "SELECT * FROM events WHERE id > 5 ORDER BY id LIMIT 10",
    ]
    for sql in paging:
        rows = sqlite.read(lambda c, sql=sql: c.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}").all())
        assert not [row for row in rows if "SCAN" in row[3] or "TEMP B-TREE" in row[3]], (sql, rows)


def test_a_name_is_one_run_once_it_has_made_a_step(store):
    """Another run of that name would take the changes of the first for its own."""

    def put(identity, steps=100):
        facts = {} if identity is None else {"run": identity}
        return store.write(lambda c: runs.put_run(c, "s", trajectory=None, group="g", steps=steps, facts=facts))

    put("a")
    put("b")  # a start that failed before its first step left nothing
    store.write(lambda c: c.execute(update(tables.runs).where(tables.runs.c.name == "s").values(step=5)))
    put("b", steps=200)
    with pytest.raises(Conflict, match=r"name: the run s here is another \(b\), with changes of its own"):
        put("a")
    put(None)  # an older megapd names none

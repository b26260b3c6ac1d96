"""One process at a time trains a run, whatever the file system carries of its lock."""

import fcntl
import json
import multiprocessing
import os
import socket
import time

import pytest

from megapd.cli import main
from megapd.errors import RunFailed, UserError
from megapd.training.folder import held, lock
from megapd.training.folder.lock import RunLock
from tests.training import runs


@pytest.fixture
def no_flock(monkeypatch):
    """A file system that carries no flock."""

    def refuse(file, operation):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def owner(folder, seconds=0.0, **changes):
    """A lock that its holder left, or still has, `seconds` after its last sign."""
    path = folder / "lock"
    known = {"token": "t", "host": "elsewhere", "pid": 7, "boot": "b", "started": "1", "since": "", "heartbeat": ""}
    path.write_text(json.dumps({**known, **changes}))
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_the_second_is_refused_and_the_next_is_not(tmp_path, caplog):
    first = RunLock(tmp_path)
    assert held(tmp_path)
    with pytest.raises(UserError, match=rf"another process trains this run: process {os.getpid()} on .* holds it; stop it"):
        RunLock(tmp_path)
    first.check()
    first.close()
    first.close()
    assert not held(tmp_path)
    RunLock(tmp_path).close()
    assert caplog.text == ""


def _die_holding(folder):
    RunLock(folder)
    os._exit(1)


@pytest.mark.parametrize("flock", [True, False])
def test_a_holder_that_died_here_is_told(tmp_path, caplog, flock, request):
    if not flock:
        request.getfixturevalue("no_flock")
    process = multiprocessing.get_context("fork").Process(target=_die_holding, args=(tmp_path,))
    process.start()
    process.join()
    RunLock(tmp_path).close()
    assert (
        f"the process that trained it last (process {process.pid} on {socket.gethostname()}) ended without closing it"
        in caplog.text
    )


def test_without_flock_the_owner_file_speaks(tmp_path, no_flock):
    first = RunLock(tmp_path)
    with pytest.raises(UserError, match="holds it"):
        RunLock(tmp_path)
    assert held(tmp_path)
    first.close()
    RunLock(tmp_path).close()


def test_one_of_the_same_number_after_a_reboot_is_another(tmp_path, no_flock):
    owner(tmp_path, host=socket.gethostname(), pid=os.getpid(), boot="before", started="1")
    RunLock(tmp_path).close()
    owner(tmp_path, host=socket.gethostname(), pid=os.getpid(), boot=lock._line("/proc/sys/kernel/random/boot_id"), started="1")
    RunLock(tmp_path).close()


def test_a_holder_elsewhere(tmp_path, caplog):
    """It lives as long as it gives signs; a silent one is taken over by name only."""
    owner(tmp_path, seconds=20)
    assert held(tmp_path)
    with pytest.raises(UserError, match="process 7 on elsewhere gave a sign 20 s ago"):
        RunLock(tmp_path, take_over=True)
    owner(tmp_path, seconds=90)
    assert not held(tmp_path)
    with pytest.raises(UserError, match="gave no sign for 90 s; when you know that it has ended, start with --take-over"):
        RunLock(tmp_path)
    RunLock(tmp_path, take_over=True).close()
    assert "taken over from process 7 on elsewhere, silent for 90 s" in caplog.text


def test_one_that_was_taken_over_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    first = RunLock(tmp_path)
    owner(tmp_path)
    first._thread.join(10)
    with pytest.raises(RunFailed, match="another process has taken this run over"):
        first.check()
    first.close()
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"


def test_it_gives_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    first = RunLock(tmp_path)
    os.utime(tmp_path / "lock", (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / "lock").stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "lock").stat().st_mtime > 2
    first.close()


@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"[1]", b"\xff"])
def test_an_unreadable_owner_holds_nothing(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    RunLock(tmp_path).close()


def test_beside_a_live_run_nothing_is_touched(tmp_path, capsys):
    """A second start is refused, and an evaluation only reads."""
    arguments = ["train", *runs.COMMON, f"--runs_dir={tmp_path}", "--name=s", "--training.steps=4", "--trajectory.every=2"]
    assert main(arguments) == 0
    run = tmp_path / "s"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    alive = RunLock(run)
    try:
        assert main([*arguments, "--training.steps=8"]) == 2
        assert main(["evaluate", str(run)]) == 0
    finally:
        alive.close()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"} == before
    assert "another process trains this run" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 0
    assert (run / "evaluation.json").exists()

"""One process at a time trains a run: a lock on its folder for as long as it lives.

The file `lock` is held by flock, which ends with the process. File systems that several machines share may not carry flock from
one to the other, so the file also says who holds it, and its holder writes it anew every HEARTBEAT_SECONDS.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megapd.errors import RunFailed, UserError

FILE = "lock"  # in the run's folder
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a heartbeat: six were missed
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
log = logging.getLogger(__name__)


class RunLock:
    """Held from construction to `close`. token: what no other holder has written to the file, for ranks that look at it."""

    def __init__(self, folder: Path, *, take_over: bool = False) -> None:
        """take_over: also from a holder on another machine that gave no sign for STALE_SECONDS.

        Raises UserError, with the folder as it was, where another process holds it or may still do so.
        """
        self.path, self.token = folder / FILE, secrets.token_hex(8)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._take(take_over)
        except BaseException:
            os.close(self._file)
            raise
        self._lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RunFailed once another process has taken the folder over."""
        if self._lost:
            raise RunFailed(f"{self.path.parent}: another process has taken this run over (--take-over); this one stops")

    def close(self) -> None:
        """Leave the folder to whoever comes next. Again: nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if not self._lost:
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def _take(self, take_over: bool) -> None:
        flocked = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(self._held(self._read(), "holds it")) from error
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            flocked = False
        holder = self._read()
        if holder:
            self._look_at(holder, take_over, flocked)
        self._owner = {"token": self.token, "host": socket.gethostname(), **_this_process(), "since": _now()}
        self._write()

    def _look_at(self, holder: dict[str, Any], take_over: bool, flocked: bool) -> None:
        """Whether a holder that did not close the lock still lives; UserError if it may."""
        if holder.get("host") == socket.gethostname():
            if not flocked and _lives(holder):
                raise UserError(self._held(holder, "holds it"))
            log.warning("%s: the process that trained it last (%s) ended without closing it", self.path.parent, _who(holder))
            return
        silent = self._silence()
        if silent < STALE_SECONDS:
            raise UserError(self._held(holder, f"gave a sign {silent:.0f} s ago"))
        if not take_over:
            what = f"{self.path.parent}: {_who(holder)} trained it and gave no sign for {silent:.0f} s"
            raise UserError(f"{what}; when you know that it has ended, start with --take-over")
        log.warning("%s: taken over from %s, silent for %.0f s", self.path.parent, _who(holder), silent)

    def _silence(self) -> float:
        """Seconds since the holder's last heartbeat, by the file system's clock: machines' own may differ."""
        with tempfile.TemporaryFile(dir=self.path.parent) as probe:
            probe.write(b".")
            probe.flush()
            return max(0.0, os.fstat(probe.fileno()).st_mtime - os.fstat(self._file).st_mtime)

    def _held(self, holder: dict[str, Any], how: str) -> str:
        return f"{self.path.parent}: another process trains this run: {_who(holder)} {how}; stop it, or choose another name"

    def _read(self) -> dict[str, Any]:
        """{}: nobody holds it, or nothing that can be read."""
        try:
            found = json.loads(os.pread(self._file, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        content = json.dumps({**self._owner, "heartbeat": _now()}).encode()
        os.ftruncate(self._file, os.pwrite(self._file, content, 0))

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            try:
                if self._read().get("token", self.token) != self.token:
                    self._lost = True
                    return
                self._write()
            except OSError as error:
                log.warning("%s: %s; others may take this run for dead", self.path, error)


def held(folder: Path) -> bool:
    """Whether a process that this machine can see, or one elsewhere that gave a sign lately, trains the run in `folder`."""
    path = folder / FILE
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        holder = json.loads(os.pread(file, 4096, 0) or b"{}")
        silent = datetime.now(UTC).timestamp() - os.fstat(file).st_mtime
        return bool(holder) and holder.get("host") != socket.gethostname() and silent < STALE_SECONDS
    except BlockingIOError:
        return True
    except (OSError, ValueError):  # no flock here, or written just now
        return True
    finally:
        os.close(file)


def _this_process() -> dict[str, Any]:
    """What tells this process from a later one of the same number."""
    return {"pid": os.getpid(), "boot": _line("/proc/sys/kernel/random/boot_id"), "started": _started(os.getpid())}


def _lives(holder: dict[str, Any]) -> bool:
    """On this machine."""
    if holder.get("boot") != _line("/proc/sys/kernel/random/boot_id"):
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, KeyError, ValueError):
        return False
    return holder.get("started") == _started(int(holder["pid"]))


def _started(pid: int) -> str:
    """The process's start in ticks since the boot; "" where the system does not say."""
    return "".join(_line(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20])


def _line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

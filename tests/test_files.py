"""Which errors a disk is to blame for, and what is said of it."""

import errno
import sqlite3
from pathlib import Path

import pytest
from safetensors import SafetensorError
from sqlalchemy.exc import OperationalError

from megapd.errors import DiskFailed, UserError
from megapd.files import append_whole, atomic_file, disk_failure, write_private, writing


class Sqlite(sqlite3.OperationalError):
    """As sqlite3 raises it; its constructor takes no name."""

    def __init__(self, name):
        super().__init__("database or disk is full")
        self.sqlite_errorname = name


def caused(error, cause):
    error.__context__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")
SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FULL, "no space left on device: the disk at"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk quota exceeded: the disk at"),
        (OSError(errno.EROFS, "Read-only file system"), "is read-only; mount it for writing"),
        (PermissionError(errno.EACCES, "Permission denied"), "permission denied (the disk at"),
        (OSError(errno.EIO, "Input/output error"), "fails: input/output error"),
        (SAFETENSORS, "no space left on device"),
        (Sqlite("SQLITE_FULL"), "no space left on device"),
        (Sqlite("SQLITE_READONLY_DIRECTORY"), "is read-only"),
        (OperationalError("INSERT", {}, Sqlite("SQLITE_FULL")), "no space left on device"),
        (caused(RuntimeError("[enforce fail at inline_container.cc:672]"), FULL), "no space left on device"),
        (RuntimeError("basic_ios::clear: iostream error"), "fails: input/output error"),  # no other reason is seen
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (SafetensorError("Error while deserializing header"), None),
        (Sqlite("SQLITE_BUSY"), None),
        (RuntimeError("shapes differ"), None),
        (UserError("a mistake"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_disk_is_to_blame_for(tmp_path, error, told):
    found = disk_failure(error, tmp_path / "file")
    assert (found is None) == (told is None)
    assert found is None or (told in found and found.startswith(f"{tmp_path}/file: ") and "\n" not in found)
    with pytest.raises(type(error) if told is None else DiskFailed), writing(tmp_path / "file"):
        raise error


def test_the_file_that_the_error_names(tmp_path):
    copied = OSError(errno.ENOSPC, "No space left on device", "/proc/from", None, str(tmp_path / "to"))
    assert disk_failure(copied, tmp_path).startswith(f"{tmp_path}/to: ")
    assert disk_failure(copied).startswith(f"{tmp_path}/to: ")
    hidden = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x.tmp-1"))
    assert disk_failure(hidden, tmp_path / "x").startswith(f"{tmp_path}/x: ")
    assert disk_failure(FULL).startswith(f"{Path.cwd()}: ")
    assert disk_failure(PermissionError(errno.EACCES, "Permission denied")) is None  # of a socket, say
    assert "HF_HOME" in disk_failure(FULL, tmp_path)  # there is room where the file lies
    assert "HF_HOME" not in disk_failure(copied, tmp_path)


def test_the_innermost_names_the_path(tmp_path):
    with pytest.raises(DiskFailed, match="/inner: "), writing(tmp_path / "outer"), writing(tmp_path / "inner"):
        raise FULL
    with pytest.raises(DiskFailed, match="/file: "), atomic_file(tmp_path / "file"):
        raise FULL
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    with (tmp_path / "lines").open("ab") as file:
        append_whole(tmp_path / "lines", file.fileno(), b"first\n")
        real = __import__("os").write
        monkeypatch.setattr("megapd.files.os.write", lambda descriptor, data: real(descriptor, data[:3]))
        with pytest.raises(DiskFailed, match="/lines: no space"):
            append_whole(tmp_path / "lines", file.fileno(), b"second\n")
    assert (tmp_path / "lines").read_bytes() == b"first\n"


def test_a_private_file(tmp_path):
    write_private(tmp_path / "secret", "x")
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="it is there already"):
        write_private(tmp_path / "secret", "y")
    assert (tmp_path / "secret").read_text() == "x"

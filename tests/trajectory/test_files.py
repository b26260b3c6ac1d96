"""megapd/files.py: nothing is ever seen half-written."""

import hashlib
import os
import subprocess
import sys

import pytest

from megapd import files
from megapd.files import commit_folder, sha256_file, temporary_folder, write_atomic

from .checkpoints import write


def test_write_atomic_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_write_atomic_that_fails_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "b.txt"
    write_atomic(path, "old")

    def broken(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]


def test_write_atomic_flushes_the_file_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def noted(descriptor):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "x", "data")
    assert events == ["file", "rename", "folder"]


def test_sha256_file(tmp_path):
    data = os.urandom(1_000_003)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("exchanges", [True, False])
def test_commit_folder_replaces_a_folder(tmp_path, monkeypatch, exchanges):
    if not exchanges:  # a file system without renameat2
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    final = tmp_path / "final"
    for content in ("one", "two"):
        with temporary_folder(final) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "x").write_text(content)
            commit_folder(temporary, final)
        assert (final / "sub" / "x").read_text() == content
        assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_commit_folder_flushes_everything_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def noted(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    with temporary_folder(tmp_path / "final") as temporary:
        for name in ("x", "y"):
            (temporary / name).write_text(name)
        monkeypatch.setattr(os, "fsync", noted)
        monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
        commit_folder(temporary, tmp_path / "final")
    assert set(events[:3]) == {"x", "y", temporary.name}
    assert events[3:] == ["rename", tmp_path.name]


def test_exchange_swaps_two_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a" / "x").read_text() == "b"
    assert (tmp_path / "b" / "x").read_text() == "a"


def test_exchange_reports_real_errors(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        files._exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.slow
def test_temporary_folder_clears_leftovers_of_the_dead_alone(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {
        "dead": f"final.tmp-{ended.pid}",
        "aside": f"final.tmp-old-{ended.pid}",
        "alive": "final.tmp-1",
        "other": f"x.tmp-{ended.pid}",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    with temporary_folder(tmp_path / "final") as own:
        assert {p.name for p in tmp_path.iterdir()} == {own.name, names["alive"], names["other"]}
        (own / "stale").write_text("")
        with temporary_folder(tmp_path / "final") as again:
            assert list(again.iterdir()) == []
    assert not own.exists()  # nothing was committed


@pytest.mark.parametrize(("umask", "files_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_a_colleague_may_read_what_the_umask_lets_him(tmp_path, umask, files_mode, folder_mode):
    """safetensors itself leaves its files to the owner alone."""
    before = os.umask(umask)
    try:
        write(tmp_path / "trajectory", 5)
        write_atomic(tmp_path / "x", "data")
    finally:
        os.umask(before)
    found = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert found.pop("trajectory") == found.pop("trajectory/step_5") == folder_mode
    assert len(found) == 4
    assert set(found.values()) == {files_mode}

"""Small disks that fill up: a tmpfs whose size and number of files are set while it is used. Needs the right to mount."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = 4096  # a file takes whole pages
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
MNT_DETACH = 2
LARGE = 1 << 28
_libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """A tmpfs at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount(0, LARGE, LARGE // PAGE)

    def leave(self, *, pages: int | None = None, files: int | None = None) -> None:
        """Let this much more be written, by default as much as there is memory for."""
        now = os.statvfs(self.path)
        used, there = (now.f_blocks - now.f_bfree) * now.f_frsize, now.f_files - now.f_ffree
        size = LARGE if pages is None else max(used + pages * PAGE, PAGE)  # 0 would be no limit
        if pages is not None and size > used + pages * PAGE:
            (self.path / "ballast").write_bytes(b"0" * PAGE)
        self._mount(MS_REMOUNT, size, LARGE // PAGE if files is None else there + files)

    def set_read_only(self, yes: bool) -> None:
        """No file on it may be open for writing."""
        self._mount(MS_REMOUNT | (MS_RDONLY if yes else 0), LARGE, LARGE // PAGE)

    def close(self) -> None:
        assert _libc.umount2(os.fsencode(self.path), MNT_DETACH) == 0

    def _mount(self, flags: int, size: int, files: int) -> None:
        options = f"size={size},nr_inodes={files}".encode()
        if _libc.mount(b"none", os.fsencode(self.path), b"tmpfs", flags, options) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self.path))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A disk in a folder of the test, which is skipped where nothing may be mounted."""
    try:
        disk = Disk(folder / "disk")
    except PermissionError:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield disk
    finally:
        disk.close()

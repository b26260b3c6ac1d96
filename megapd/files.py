"""Files that exist whole or not at all, after a crash or a power cut too.

Whatever is to last is written under a temporary name in the folder of its destination, flushed to the disk (fsync), renamed,
and the rename itself flushed (fsync of the folder). A temporary name is `NAME.tmp-PID...`, so it never ends like the name it
stands for.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megapd.errors import UserError

TEMPORARY_INFIX = ".tmp-"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` when the block ends: a reader sees the old content or the new.

    If the block raises, or the file cannot be flushed, nothing has changed. The folder must be there.
    """
    # Random: two threads, or two machines that share the folder, may write the same path.
    temporary = path.with_name(f"{path.name}{TEMPORARY_INFIX}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8), as `atomic_file` does. Makes the folder if it lacks."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_private(path: Path, data: str) -> None:
    """A new file, which its owner alone can read. UserError if `path` is there, or cannot be written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UserError(f"{path}: it is there already; name a new file") from error
    try:
        with open(descriptor, "w") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        path.unlink()
        raise
    fsync_path(path.parent)


def check_run(path: Path, named: object, run: str) -> None:
    """UserError if `path`, a file of the run `run`, names another run; one that names none was written by an older megapd."""
    if named is not None and named != run:
        what = f"{path}: belongs to run {named}, not to {run}, in whose folder it lies"
        raise UserError(f"{what}; restore the run's own, or start a run of another name")


def sealed(tree: Mapping[str, Any]) -> str:
    """JSON of `tree` and, as its last entry, the digest of all others: what changes later is found by `unsealed`."""
    return json.dumps({**tree, "digest": _seal(tree)}, indent=1) + "\n"


def unsealed(content: str) -> dict[str, Any]:
    """The tree that `sealed` wrote, without its digest, or one that an older megapd wrote without. ValueError if it changed."""
    tree = json.loads(content)
    if not isinstance(tree, dict):
        raise ValueError("no JSON object")
    digest = tree.pop("digest", None)
    if digest is not None and digest != _seal(tree):
        raise ValueError("its digest is that of another content")
    return tree


def _seal(tree: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(tree))  # whose keys are text, and are sorted as such
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def fsync_path(path: Path) -> None:
    """Flush to the disk a file that is closed, or a folder's entries: what makes a rename or a new file in it last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content, read in 256 KiB pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """Where to build the folder that `commit_folder` renames to `final`: made afresh beside it, and removed if not committed.

    Leftovers for the same destination of processes that no longer run on this machine are removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for entry in list(final.parent.iterdir()):
        owner = entry.name.rpartition("-")[2]
        if entry.name.startswith(final.name + TEMPORARY_INFIX) and (owner == str(os.getpid()) or not _alive(owner)):
            shutil.rmtree(entry)
    temporary = final.with_name(f"{final.name}{TEMPORARY_INFIX}{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # an error that brought us here says more than a failing clean-up would


def commit_folder(temporary: Path, final: Path) -> None:
    """Rename the folder `temporary` to `final`, both in one parent, with every file in it flushed first.

    A folder that is at `final` already is exchanged for the new one in one step where the file system can (Linux renameat2), else
    moved aside first, and removed afterwards. After a crash at any moment no folder named `final` is incomplete.
    """
    assert temporary.parent == final.parent, "a rename across folders is not covered by one fsync"
    for folder, _, files in os.walk(temporary):
        for name in (*files, ""):  # at last the folder itself
            fsync_path(Path(folder, name))
    if final.exists():
        if not _exchange(temporary, final):
            aside = final.with_name(f"{final.name}{TEMPORARY_INFIX}old-{os.getpid()}")
            os.rename(final, aside)
            os.rename(temporary, final)
            temporary = aside
        fsync_path(final.parent)
        shutil.rmtree(temporary)
    else:
        os.rename(temporary, final)
    fsync_path(final.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically; False where the kernel, the C library or the file system cannot."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):  # glibc before 2.28
        return False
    at_fdcwd, rename_exchange = -100, 2
    if library.renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), ctypes.c_uint(rename_exchange)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, ProcessLookupError):  # no process id, or nobody's
        return False
    return True

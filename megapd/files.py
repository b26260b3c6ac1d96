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
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megapd.errors import DiskFailed, UserError

TEMPORARY_INFIX = ".tmp-"
MANY_BYTES = 1 << 26  # a disk with as many free is hardly the one that a library found to be full
FEW_BYTES = 1 << 20  # a disk with fewer free, or read-only, is why a library failed that does not say what stopped it

_FULL, _READ_ONLY, _FORBIDDEN = "full", "read-only", "forbidden"
_DISK_ERRORS = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL, errno.EROFS: _READ_ONLY}
_DISK_ERRORS |= {errno.EACCES: _FORBIDDEN, errno.EPERM: _FORBIDDEN}
_TORCH = re.compile(r"inline_container|iostream error|Parent directory .* does not exist")  # its RuntimeErrors of a file
_UNCLEAR = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)  # what a disk that fails says

CACHE = "XDG_CACHE_HOME"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a full, read-only or failing disk makes of the block becomes DiskFailed, which names `path`, or the file that the
    error names, and the disk. Of several around each other the innermost tells."""
    try:
        yield
    except Exception as error:
        if (told := disk_failure(error, path)) is None:
            raise
        raise DiskFailed(told) from error


def disk_failure(error: BaseException, path: Path | None = None) -> str | None:
    """One line on the disk that is to blame for an error while `path` was written, None if none is.

    Libraries have errors of their own for it: safetensors SafetensorError, torch RuntimeError without a reason, SQLite
    OperationalError; those that led to the error are looked at too. path: None where it is not known, which is no reason.
    """
    if isinstance(error, UserError):
        return None
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    number = next((found for link in chain if (found := _number(link))), None)
    # Of two, a copy's, the second is what was written.
    named = next((link.filename2 or link.filename for link in chain if isinstance(link, OSError) and link.filename), None)
    if isinstance(named, str | bytes) and (path is None or TEMPORARY_INFIX not in os.fsdecode(named)):
        path = Path(os.fsdecode(named))
    if path is None:
        clear = number is not None and _DISK_ERRORS.get(number) in (_FULL, _READ_ONLY)
        return _told(Path.cwd(), number) if number is not None and clear else None
    if number is None and any(_is_silent(link) for link in chain):
        free, files, read_only = _space(path)
        number = errno.EROFS if read_only else errno.ENOSPC if free < FEW_BYTES or files == 0 else errno.EIO
    return None if number is None else _told(path, number, sure=isinstance(named, str | bytes))


def _is_silent(error: BaseException) -> bool:
    """Whether it is what torch.save and SQLite say where they could not write, without a reason."""
    return _sqlite(error) == "SQLITE_CANTOPEN" or (isinstance(error, RuntimeError) and bool(_TORCH.search(str(error))))


def _number(error: BaseException) -> int | None:
    """The errno by which a disk is to blame for an error, None if it is not."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _DISK_ERRORS or error.errno in _UNCLEAR else None
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", str(error))):
        return int(found[1]) if int(found[1]) in _DISK_ERRORS or int(found[1]) in _UNCLEAR else None
    codes = {"SQLITE_FULL": errno.ENOSPC, "SQLITE_READONLY": errno.EROFS, "SQLITE_IOERR": errno.EIO}
    return next((number for begin, number in codes.items() if _sqlite(error).startswith(begin)), None)


def _sqlite(error: BaseException) -> str:
    """The name that SQLite has for its error, or for the one that SQLAlchemy wraps; "" of all others."""
    return str(getattr(getattr(error, "orig", error), "sqlite_errorname", ""))


def _told(path: Path, number: int, *, sure: bool = False) -> str:
    """sure: the error itself names `path`."""
    free, files, _ = _space(path)
    disk = f"the disk at {_mount(path)}"
    space = f"{free:,} bytes free" + ("" if files is None else f", {files:,} more files")
    match _DISK_ERRORS.get(number):
        case "full":
            other = ", or on that of TMPDIR or HF_HOME," if not sure and free > MANY_BYTES and files != 0 else ","
            return f"{path}: {os.strerror(number).lower()}: {disk} has {space}; make space there{other} or choose another folder"
        case "read-only":
            return f"{path}: {disk} is read-only; mount it for writing, or choose another folder"
        case "forbidden":
            return f"{path}: {os.strerror(number).lower()} ({disk}); correct the rights, or choose another folder"
    return f"{path}: {disk} ({space}) fails: {os.strerror(number).lower()}; look into the system's log"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _mount(path: Path) -> Path:
    path = _existing(path).resolve()
    while not path.is_mount():
        path = path.parent
    return path


def _space(path: Path) -> tuple[int, int | None, bool]:
    """(free bytes, further files that it takes, None: unlimited; whether it is read-only)."""
    disk = os.statvfs(_existing(path))
    return disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else None, bool(disk.f_flag & os.ST_RDONLY)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` when the block ends: a reader sees the old content or the new.

    If the block raises, or the file cannot be flushed, nothing has changed. The folder must be there.
    """
    # Random: two threads, or two machines that share the folder, may write the same path.
    temporary = path.with_name(f"{path.name}{TEMPORARY_INFIX}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with writing(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with writing(path):
        fsync_path(path.parent)


def append_whole(path: Path, file: int, data: bytes) -> None:
    """Write `data` at the end of an open file, all of it or, where the disk has no room, nothing. DiskFailed names `path`."""
    with writing(path):
        end = os.lseek(file, 0, os.SEEK_END)
        try:
            if os.write(file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.ftruncate(file, end)
            raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8), as `atomic_file` does. Makes the folder if it lacks."""
    path = Path(path)
    with writing(path):
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


def parse_finite(text: bytes | str) -> Any:
    """The tree in a JSON text. ValueError where it is none, holds NaN or an infinity, or is nested too deep."""

    def number(literal: str) -> float:
        if not math.isfinite(value := float(literal)):
            raise ValueError(f"{literal} is no finite number")
        return value

    try:
        return json.loads(text, parse_constant=number, parse_float=number)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def machine_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_cache(kind: str) -> Path:
    """Where what this machine found out of `kind` is kept: XDG_CACHE_HOME/megapd/KIND, by default beneath ~/.cache."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache") / "megapd" / kind


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content, read in 256 KiB pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """Where to build the folder that `commit_folder` renames to `final`: made afresh beside it, and removed if not committed.

    Leftovers for the same destination of processes that no longer run on this machine are removed.
    """
    temporary = final.with_name(f"{final.name}{TEMPORARY_INFIX}{os.getpid()}")
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        for entry in list(final.parent.iterdir()):
            owner = entry.name.rpartition("-")[2]
            if entry.name.startswith(final.name + TEMPORARY_INFIX) and (owner == str(os.getpid()) or not _alive(owner)):
                shutil.rmtree(entry)
        temporary.mkdir()
    try:
        with writing(final):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # an error that brought us here says more than a failing clean-up would


def obey_umask(folder: Path) -> None:
    """Let others read the files in `folder` as the umask does, of which the folder's own mode tells: safetensors leaves its files
    to their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def commit_folder(temporary: Path, final: Path) -> None:
    """Rename the folder `temporary` to `final`, both in one parent, with every file in it flushed first.

    A folder that is at `final` already is exchanged for the new one in one step where the file system can (Linux renameat2), else
    moved aside first, and removed afterwards. After a crash at any moment no folder named `final` is incomplete.
    """
    assert temporary.parent == final.parent, "a rename across folders is not covered by one fsync"
    obey_umask(temporary)
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

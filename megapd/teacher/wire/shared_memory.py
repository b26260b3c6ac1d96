"""Memory that answers lie in on the client's side, given out again and again, and shared with a teacher on the same host.

Where it is shared, the client gives it and the teacher writes an Arrow stream into it, once.

The memory is a memfd, which has no name in any file system: it is gone when the last process that maps it is, however it ends.
The request says which descriptor of which process it is, and the teacher opens it through /proc. The client seals it against
shrinking, since a server that writes where a file has ended dies of SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
import threading
import weakref
from collections import deque
from collections.abc import Callable

import pyarrow as pa

from megapd.errors import SignalDamaged
from megapd.teacher.wire.messages import read_record
from megapd.teacher.wire.refusals import Refused
from megapd.teacher.wire.requests import Memory

PREFIX = "megapd-"
FIRST_BYTES = 64 << 20  # of a slot; pages that nothing is written to take no memory
GRANULE = 1 << 20  # sizes are multiples of it
ROOM = 1.25  # times the answer that did not fit: those of other micro-batches may be a little larger
MAPPINGS = 256  # that a server keeps, a descriptor each; a rank of a student has depth * micro-batches

_NEEDED = "shared_memory needs student and teacher on one host, in one pid namespace, run by one user"
_ELSEWHERE = f"teacher.carrier: {_NEEDED}; use served instead"


class Slot:
    """One piece of memory that an answer is written into; mapped, and grown when an answer does not fit.

    shared: a teacher on the same host writes; else this process does, with what it receives.
    """

    def __init__(self, size: int, shared: bool) -> None:
        self.name, self.fd = "", -1
        if shared:
            self.name = f"{PREFIX}{secrets.token_hex(8)}"
            self.fd = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.close: Callable[[], object] = weakref.finalize(self, os.close, self.fd) if shared else lambda: None
        self._map(size)

    def grow(self, needed: int) -> None:
        """Make it hold an answer of `needed` bytes. Nothing refers to its memory."""
        self._map(int(needed * ROOM))

    def _map(self, size: int) -> None:
        size = -(-size // GRANULE) * GRANULE
        # The mapping that was there goes when nothing refers to it any more.
        if self.fd < 0:
            self._mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            os.ftruncate(self.fd, size)
            self._mapping = mmap.mmap(self.fd, size)
        self._buffer = pa.py_buffer(self._mapping)
        self.size = size  # now that it is there

    @property
    def memory(self) -> Memory:
        return Memory(os.getpid(), self.fd, self.name, self.size)

    def writable(self, length: int) -> memoryview:
        """The first `length` bytes, for an answer that is received."""
        assert length <= self.size
        return memoryview(self._mapping)[:length]

    def view(self, length: int, owner: object) -> pa.Buffer:
        """The first `length` bytes, without a copy; `owner` lives as long as anything that was made of them."""
        return pa.foreign_buffer(self._buffer.address, length, base=owner)


class _Lease:
    """Lives as long as the arrays and tensors on a slot's memory."""


class Slots:
    """A client's memory: a slot for every answer that is awaited or still in use, reused when nothing refers to it.

    Memory that is new to the process costs more than to receive into it: 1,500 page faults for 6 MiB.
    """

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        # Filled by finalizers, which may run inside any allocation of any thread: no lock there, a deque appends atomically.
        self._free: deque[Slot] = deque()
        self._closed = False
        self._largest = FIRST_BYTES

    def take(self) -> Slot:
        try:
            return self._free.pop()  # the last one that was used, which the caches may still hold
        except IndexError:
            return Slot(self._largest, self._shared)

    def give(self, slot: Slot) -> None:
        """Back at once: nobody writes into it or refers to it. A slot that a teacher may yet write into is closed instead."""
        if self._closed:
            slot.close()
        else:
            self._free.append(slot)

    def read(self, slot: Slot, length: int) -> pa.RecordBatch:
        """The answer in a slot, a view; the slot is free again when nothing refers to it. Raises SignalDamaged."""
        if length > slot.size:
            raise SignalDamaged(f"an answer of {length} bytes in {slot.size} bytes of shared memory")
        self._largest = max(self._largest, slot.size)
        lease = _Lease()
        weakref.finalize(lease, self.give, slot).atexit = False
        return read_record(slot.view(length, lease))

    def close(self) -> None:
        """Free slots go now, the others with what refers to them."""
        self._closed = True
        while self._free:
            self._free.popleft().close()


class Mappings:
    """Clients' memory as the server maps it, the least recently used forgotten first. Thread-safe."""

    def __init__(self, limit: int = MAPPINGS) -> None:
        self._limit = limit
        self._known: dict[str, tuple[Memory, tuple[int, int], pa.Buffer]] = {}  # the one used last at the end
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def open(self, memory: Memory) -> pa.Buffer:
        """The client's memory, mutable; Refused, kind memory, if it cannot be reached or is not what it says."""
        with self._lock:
            known = self._known.pop(memory.name, None)
            if known is None or known[0] != memory or known[1] != _identity(memory):
                known = (memory, *_map(memory))
            self._known[memory.name] = known
            if len(self._known) > self._limit:
                del self._known[next(iter(self._known))]
            return known[2]

    def sweep(self) -> None:
        """Forget the memory of clients that are gone: a mapping alone would keep it."""
        with self._lock:
            self._known = {name: known for name, known in self._known.items() if _identity(known[0]) == known[1]}


def write(record: pa.RecordBatch, buffer: pa.Buffer) -> int:
    """Write an IPC stream into the client's memory, without a copy in between; returns its bytes. Refused, kind small, with the
    bytes needed, if it does not fit."""
    needed = record.schema.serialize().size + pa.ipc.get_record_batch_size(record) + 8  # the mark of a stream's end
    if needed > buffer.size:
        raise Refused("small", f"the answer takes {needed} bytes of shared memory, {buffer.size} are there", needed)
    sink = pa.FixedSizeBufferWriter(buffer)
    with pa.ipc.new_stream(sink, record.schema) as stream:
        stream.write_batch(record)
    return int(sink.tell())


def _link(memory: Memory) -> str:
    return f"/proc/{memory.pid}/fd/{memory.fd}"


def _identity(memory: Memory) -> tuple[int, int] | None:
    try:
        found = os.stat(_link(memory))
        return found.st_dev, found.st_ino
    except OSError:
        return None


def _map(memory: Memory) -> tuple[tuple[int, int], pa.Buffer]:
    expected = f"/memfd:{memory.name} (deleted)"
    # Looked at before it is opened, since to open another process's device or pipe may have effects, and again after.
    try:
        if not memory.name.startswith(PREFIX) or os.readlink(_link(memory)) != expected:
            raise Refused("memory", f"{_ELSEWHERE} (descriptor {memory.fd} of process {memory.pid} is no memory of a student)")
        fd = os.open(_link(memory), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Refused("memory", f"{_ELSEWHERE} ({_link(memory)}: {error.strerror})") from error
    try:
        found = os.fstat(fd)
        ours = os.readlink(f"/proc/self/fd/{fd}") == expected and found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode)
        if not ours or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or found.st_size < memory.bytes:
            raise Refused("memory", f"{_ELSEWHERE} (descriptor {memory.fd} of process {memory.pid} is not as the request says)")
        return (found.st_dev, found.st_ino), pa.py_buffer(mmap.mmap(fd, memory.bytes))
    finally:
        os.close(fd)

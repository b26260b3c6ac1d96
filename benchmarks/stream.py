"""How fast signals travel beside the bare carrier, and what a served teacher costs its student.

    python benchmarks/stream.py [--part carriers|student] [--quick] [--output benchmarks/results/stream.json]

carriers  signals/s and MB/s of each kind over each carrier at about 6 MiB a batch, several in flight as a student has them, and
          in the same round the carrier alone: Arrow Flight with one constant record batch, a ring of plain copies through shared
          memory, a file written and flushed, a file mapped and copied. The server is another process, whose answers are there
          before they are asked for: encoding, carrier, checks and decoding are measured, no model.
student   the step of a student in megapd's loop: on labels; with signals that cost nothing, which is labels and the loss; with
          the teacher in its process; with a teacher served by another process that answers at once. All of it shares this
          machine's cores; the seconds of the CPU that the server took are told.

Both go in turns, several rounds, medians. Without --part both run and the file holds both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.flight as flight
import torch
import trustme
from common import write_result
from prepared import STEP, OneCheckpoint, PreparedServer, Sizes, cut, make_signal
from student import measure_students

from megapd.batch import Batch
from megapd.config import load
from megapd.schedule.plan import Plan
from megapd.signals import SignalSpec, decode, encode
from megapd.teacher.cache import SignalCache
from megapd.teacher.client import FixedEndpoints, ServedStream

SIZES = Sizes(classes=8192, width=768, length=128)
# Samples a batch: 6 MiB of dense logits and hidden states; the small kinds have the positions of hidden-bf16.
KINDS = {
    "dense-bf16": (SignalSpec("dense", "bf16"), 3),
    "hidden-bf16": (SignalSpec("hidden", "bf16"), 32),
    "hidden-fp32": (SignalSpec("hidden", "fp32"), 16),
    "hidden-int8": (SignalSpec("hidden", "int8"), 64),
    "topk-64": (SignalSpec("topk", "fp16", k=64), 32),
    "sampled-12": (SignalSpec("sampled", k=12), 32),
    "argmax": (SignalSpec("argmax"), 32),
}
# What each of megapd's carriers is held against, and its bare ones.
CARRIERS = {
    "in_process": ("copy",),
    "tcp": ("flight_get", "flight_exchange"),
    "tls": ("flight_tls_get",),
    "shared_memory": ("ring",),
    "cache_write": ("file_write",),
    "cache_read": ("file_read",),
}
RING_BYTES = 64 << 20
PART_BYTES = 64 << 20  # of a file, as the cache's
STEPS = 1 << 30


class Measured(NamedTuple):
    """Signals a second while the pipeline was full, and how many there were in all."""

    rate: float
    signals: int


def paced(ask: Callable[[int], None], take: Callable[[int], None], in_flight: int, seconds: float) -> Measured:
    """Answers a second, `in_flight` of them under way."""
    for number in range(in_flight):
        ask(number)
    taken, start = 0, 0.0
    while taken < 2 * in_flight or time.perf_counter() - start < seconds:
        take(taken)
        taken += 1
        if taken == in_flight:
            start = time.perf_counter()
        ask(taken + in_flight - 1)
    rate = (taken - in_flight) / (time.perf_counter() - start)
    for number in range(taken, taken + in_flight):
        take(number)
    return Measured(rate, taken + in_flight)


def pooled(pool: ThreadPoolExecutor, call: Callable[[], object], in_flight: int, seconds: float) -> Measured:
    waiting: deque[Future[object]] = deque()

    def take(_: int) -> None:
        waiting.popleft().result()

    return paced(lambda _: waiting.append(pool.submit(call)), take, in_flight, seconds)


@dataclass
class Kind:
    """One kind of signals: its prepared signal, its batches, and the bytes of one record."""

    name: str
    samples: int
    spec: SignalSpec

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        positions = torch.arange(self.samples * SIZES.length)
        self.teacher = OneCheckpoint(SIZES).checkpoint(STEP).digest
        self.signal = make_signal(self.spec, SIZES, len(positions), self.teacher)
        self._ids = [torch.from_numpy(random.integers(0, SIZES.classes, (self.samples, SIZES.length))) for _ in range(16)]
        self._batches = [Batch(ids, None, positions, torch.zeros_like(positions), torch.arange(len(ids))) for ids in self._ids]
        self.bytes = encode(cut(self.signal, self._batches[0]), self._batches[0], SIZES.classes).nbytes

    def batch(self, number: int) -> Batch:
        """One that nobody has hashed yet, as a step's is."""
        return replace(self._batches[number % len(self._batches)])

    def fresh(self, count: int) -> list[Batch]:
        """Batches of different samples."""
        random = np.random.default_rng(11)
        some = self._batches[0]
        shape = (self.samples, SIZES.length)
        return [replace(some, ids=torch.from_numpy(random.integers(0, SIZES.classes, shape))) for _ in range(count)]


class Bench:
    """Everything that measures one kind; `measures` by the names of CARRIERS."""

    def __init__(self, kind: Kind, server: PreparedServer, authority: Path, folder: Path, arguments: argparse.Namespace) -> None:
        self.kind, self.server, self.folder = kind, server, folder
        self.in_flight, self.seconds = arguments.in_flight, arguments.seconds
        self.files = max(1, round(arguments.file_megabytes * 1e6 / max(kind.bytes, 1 << 20)))
        self.cached = kind.fresh(self.files)
        self.round = 0
        self.pool = ThreadPoolExecutor(self.in_flight)
        self.root = authority.read_bytes()
        ports = server.ports
        self.streams = {
            "tcp": self._stream(f"grpc://127.0.0.1:{ports['plain']}", False),
            "tls": self._stream(f"grpc+tls://127.0.0.1:{ports['tls']}", False, authority),
            "shared_memory": self._stream(f"grpc://127.0.0.1:{ports['plain']}", True),
        }
        self.next_step = dict.fromkeys(self.streams, 0)
        self.clients = {
            "flight": flight.FlightClient(f"grpc://127.0.0.1:{ports['raw']}"),
            "flight_tls": flight.FlightClient(f"grpc+tls://127.0.0.1:{ports['raw_tls']}", tls_root_certs=self.root),
        }
        source = np.random.default_rng(0).integers(0, 256, max(kind.bytes, 1), dtype=np.uint8)
        self.source, self.target = source, np.empty_like(source)
        self.measures: dict[str, Callable[[], Measured]] = {
            "in_process": self._in_process,
            **{name: partial(self._served, name) for name in self.streams},
            "cache_write": self._cache_write,
            "cache_read": self._cache_read,
            "copy": lambda: self._repeat(lambda: np.copyto(self.target, self.source)),
            "flight_get": lambda: pooled(self.pool, lambda: self._get("flight"), self.in_flight, self.seconds),
            "flight_exchange": lambda: pooled(self.pool, self._exchange, self.in_flight, self.seconds),
            "flight_tls_get": lambda: pooled(self.pool, lambda: self._get("flight_tls"), self.in_flight, self.seconds),
            "ring": self._ring,
            "file_write": self._file_write,
            "file_read": self._file_read,
        }

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
        for client in self.clients.values():
            client.close()
        self.pool.shutdown()

    def _stream(self, address: str, shared_memory: bool, authority: Path | None = None) -> ServedStream:
        tls = [f"--teacher.root_certificate={authority}"] if authority else []
        fixed = ["--teacher.trajectory=unused", "--schedule.policy=one_shot"]
        config = load(None, [*fixed, *tls]).teacher
        assert config is not None
        return ServedStream(
            config,
            Plan("one_shot", STEPS, ((0, STEP),)),
            self.kind.spec,
            OneCheckpoint(SIZES),
            device=torch.device("cpu"),
            shared_memory=shared_memory,
            endpoints=FixedEndpoints([address]),
        )

    # ------------------------------------------------------------------------------------------------ megapd's carriers

    def _in_process(self) -> Measured:
        numbers = iter(range(STEPS))
        head = self.kind.signal.head

        def once() -> None:
            batch = self.kind.batch(next(numbers))
            record = encode(cut(self.kind.signal, batch), batch, SIZES.classes)
            decode(record, self.kind.spec, self.kind.teacher, batch, head)

        return self._repeat(once)

    def _served(self, name: str) -> Measured:
        stream, first = self.streams[name], self.next_step[name]
        asked: dict[int, list[Batch]] = {}

        def ask(number: int) -> None:
            asked[number] = [self.kind.batch(number)]
            stream.request(first + number, asked[number])
            self.next_step[name] = first + number + 1

        def take(number: int) -> None:
            (signal,) = stream.signals(first + number, asked.pop(number))
            assert signal.values.shape[0] == self.kind.samples * SIZES.length

        found = paced(ask, take, self.in_flight, self.seconds)
        assert stream.counts["retries"] == 0, stream.counts
        return found

    def _cache_write(self) -> Measured:
        self.round += 1
        batches = [replace(batch) for batch in self.cached]
        signals = [cut(self.kind.signal, batch) for batch in batches]
        start = time.perf_counter()
        cache = SignalCache(self.folder / f"cache-{self.round}")
        for signal, batch in zip(signals, batches, strict=True):
            cache.record(signal, batch, SIZES.classes)
        cache.close()
        seconds = time.perf_counter() - start
        assert cache.counts["recorded"] == len(batches) * self.kind.samples
        return Measured(len(batches) / seconds, len(batches))

    def _cache_read(self) -> Measured:
        batches = [replace(batch) for batch in self.cached]
        start = time.perf_counter()
        cache = SignalCache(self.folder / f"cache-{self.round}")
        found = [cache.lookup(self.kind.teacher, self.kind.spec, batch, self.kind.signal.head) is not None for batch in batches]
        seconds = time.perf_counter() - start
        cache.close()
        assert all(found)
        return Measured(len(batches) / seconds, len(batches))

    # ------------------------------------------------------------------------------------------------- bare carriers

    def _repeat(self, once: Callable[[], None]) -> Measured:
        count, start = 0, time.perf_counter()
        while count < 2 or time.perf_counter() - start < self.seconds:
            once()
            count += 1
        return Measured(count / (time.perf_counter() - start), count)

    def _get(self, name: str) -> Any:
        record = self.clients[name].do_get(flight.Ticket(str(self.kind.bytes).encode())).read_chunk().data
        assert record.num_rows == self.kind.bytes
        return record  # kept until it is taken, as a signal is

    def _exchange(self) -> Any:
        descriptor = flight.FlightDescriptor.for_command(str(self.kind.bytes).encode())
        writer, reader = self.clients["flight"].do_exchange(descriptor)
        with writer:
            writer.done_writing()
            record = reader.read_chunk().data
        assert record.num_rows == self.kind.bytes
        return record  # kept until it is taken, as a signal is

    def _ring(self) -> Measured:
        assert self.server.memory is not None
        assert self.server.memory.buf is not None
        whole = np.frombuffer(self.server.memory.buf, dtype=np.uint8)
        size, ring = self.kind.bytes, self.server.ring

        def take(number: int) -> None:
            start = ring.recv()
            np.copyto(self.target, whole[start : start + size])

        return paced(lambda number: ring.send((number % self.in_flight * size, size)), take, self.in_flight, self.seconds)

    def _file_write(self) -> Measured:
        """Files of the cache's size, each flushed to the disk."""
        path, left = self.folder / "raw", self.files
        start = time.perf_counter()
        number = 0
        while left:
            here = min(left, max(1, PART_BYTES // self.kind.bytes))
            with path.with_suffix(f".{number}").open("wb") as file:
                for _ in range(here):
                    file.write(self.source.data)
                file.flush()
                os.fsync(file.fileno())
            left, number = left - here, number + 1
        return Measured(self.files / (time.perf_counter() - start), self.files)

    def _file_read(self) -> Measured:
        """Map each file, and copy out of it."""
        start = time.perf_counter()
        for path in sorted(self.folder.glob("raw.*")):
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
            for begin in range(0, len(mapped), self.kind.bytes):
                np.copyto(self.target, mapped[begin : begin + self.kind.bytes])
        return Measured(self.files / (time.perf_counter() - start), self.files)


def measure_carriers(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    root, certificate, key = folder / "root.pem", folder / "server.pem", folder / "server.key"
    authority.cert_pem.write_to_path(str(root))
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    server = PreparedServer(SIZES, tls=(certificate, key), ring=RING_BYTES)
    results: dict[str, Any] = {}
    try:
        for name in arguments.kinds or KINDS:
            spec, samples = KINDS[name]
            kind = Kind(name, samples, spec)
            with tempfile.TemporaryDirectory(dir=folder) as own:
                bench = Bench(kind, server, root, Path(own), arguments)
                try:
                    results[name] = measure_kind(bench, kind, arguments)
                finally:
                    bench.close()
    finally:
        server.close()
    return results


def measure_kind(bench: Bench, kind: Kind, arguments: argparse.Namespace) -> dict[str, Any]:
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(-1, arguments.rounds):  # the first warms up
        found = {}
        for carrier in arguments.carriers or CARRIERS:
            names = [carrier, *CARRIERS[carrier]]
            # A read needs what the write before it left.
            order = names if number % 2 or carrier.startswith("cache") else names[::-1]
            for name in order:
                own, other = time.process_time(), bench.server.cpu_seconds()
                rate, signals = bench.measures[name]()
                own, other = time.process_time() - own, bench.server.cpu_seconds() - other
                found[name] = {"rate": rate, "cpu_ms": 1e3 * own / signals, "server_cpu_ms": 1e3 * other / signals}
        if number >= 0:
            rounds.append(found)
    medians = {
        name: {key: statistics.median(found[name][key] for found in rounds) for key in values}
        for name, values in rounds[0].items()
    }
    result: dict[str, Any] = {"bytes": kind.bytes, "positions": kind.samples * SIZES.length}
    for carrier in arguments.carriers or CARRIERS:
        bare = CARRIERS[carrier]
        result[carrier] = {
            **{
                name: {**medians[name], "megabytes_per_second": medians[name]["rate"] * kind.bytes / 1e6}
                for name in (carrier, *bare)
            },
            "ratio": statistics.median(found[carrier]["rate"] / max(found[name]["rate"] for name in bare) for found in rounds),
            "rates": {name: [found[name]["rate"] for found in rounds] for name in (carrier, *bare)},
        }
        for name in (carrier, *bare):
            line = result[carrier][name]
            print(
                f"{kind.name if name == carrier else '':12} {name:16} {line['rate']:8,.0f} signals/s"
                f" {line['megabytes_per_second']:8,.0f} MB/s  {line['cpu_ms']:6.2f} + {line['server_cpu_ms']:6.2f} ms of CPU"
                + (f"  ratio {result[carrier]['ratio']:.2f}" if name == carrier else ""),
                flush=True,
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("carriers", "student"))
    parser.add_argument("--quick", action="store_true", help="one short round of everything, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one measurement")
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--file-megabytes", type=float, default=70.0, help="that a measurement of the cache writes")
    parser.add_argument("--kinds", nargs="*", choices=KINDS)
    parser.add_argument("--carriers", nargs="*", choices=CARRIERS)
    for name, default in (
        ("steps", 14),
        ("layers", 4),
        ("hidden", 256),
        ("batch", 8),
        ("length", 128),
        ("classes", 8192),
        ("teacher-layers", 6),
        ("teacher-hidden", 768),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the student's part")
    parser.add_argument("--threads", type=int, help="of the student; default: torch's. With one, a core is left to the carrier")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/stream.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.file_megabytes, arguments.steps = 1, 0.05, 13.0, 5
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        if arguments.part in (None, "carriers"):
            found["carriers"] = measure_carriers(arguments, Path(temporary))
        if arguments.part in (None, "student"):
            found["student"] = measure_students(arguments, Path(temporary))
    question = "signals over each carrier against the bare carrier; a student's step with a served teacher against free signals"
    write_result(arguments.output, question, arguments, ("torch", "pyarrow", "deepspeed"), **found)


if __name__ == "__main__":
    main()

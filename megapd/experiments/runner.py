"""Makes the runs of a sweep that are not there yet, several at once, each with one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import yaml

from megapd.analysis.plots import METRICS, read_metrics
from megapd.config import load
from megapd.errors import RunFailed, UserError
from megapd.experiments.spec import Cell, Sweep, students_of, teachers_of
from megapd.experiments.worker import make
from megapd.files import write_atomic

DONE = "done.json"  # in a run's folder: how it ended, and how long it took


@dataclass(frozen=True)
class Ended:
    """error: why a run came to no end, "": it did. seconds: from its start, of the start that ended it."""

    error: str
    seconds: float


def ended(folder: Path) -> Ended | None:
    """How the run of a folder ended; None: it has not."""
    try:
        return Ended(**json.loads((folder / DONE).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / DONE}: damaged ({error}); remove it, the sweep goes on with the run") from error


def run_sweep(sweep: Sweep, jobs: int, told: Callable[[int, int, str], object] = lambda done, total, more: None) -> None:
    """Teachers first, then students; what was made before, by this sweep or another into the same folder, is left as it is, and a
    run that was stopped goes on from its checkpoint.

    jobs: runs at once; 0: one after the other in this process, which knows tasks that no package brings. told: now and then,
    with student and teacher steps made, those of the whole sweep, and what is running. A student that diverges is on record as
    such. Raises UserError for settings that a run refuses, RunFailed for a teacher that diverges and a process that dies.
    """
    teachers = {cell.address: cell for cell in teachers_of(sweep).values()}
    students = {cell.address: cell for cell in students_of(sweep)}
    sweep.folder.mkdir(parents=True, exist_ok=True)
    total = sum(cell.steps for cell in (*teachers.values(), *students.values()))
    workers = _Workers(sweep)

    def tell() -> None:
        told(_steps(sweep, (*teachers.values(), *students.values())), total, workers.running)

    with closing(workers), ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            for stage in (teachers, students):
                missing = [cell for cell in stage.values() if ended(sweep.folder / cell.address) is None]
                if jobs:
                    _watch([pool.submit(workers.run, cell) for cell in missing], tell)
                for cell in () if jobs else missing:
                    workers.run(cell, here=True)
                    tell()
                for address in stage:
                    found = ended(sweep.folder / address)
                    assert found is not None
                    if found.error and stage is teachers:
                        (sweep.folder / address / DONE).unlink()
                        raise RunFailed(f"teacher {sweep.folder / address}: {found.error}")
        finally:
            workers.end()  # before the pool waits for its threads, which wait for them


def _watch(futures: Iterable[Future[None]], tell: Callable[[], object]) -> None:
    left = set(futures)
    try:
        while left:
            finished, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
            tell()
            for future in finished:
                future.result()
    except BaseException:
        for future in left:
            future.cancel()
        raise


def _steps(sweep: Sweep, cells: Iterable[Cell]) -> int:
    """Steps that are on record of all cells."""
    return sum(_made(sweep.folder / cell.address, cell.steps) for cell in cells)


def _made(folder: Path, steps: int) -> int:
    if (folder / DONE).exists():
        return steps
    if not (folder / METRICS).exists():
        return 0
    return max((line["step"] for line in read_metrics(folder)), default=0)


class _Worker(NamedTuple):
    process: subprocess.Popen[str]
    answers: TextIO


class _Workers:
    """One process a thread of the pool, started when the thread has its first run; a process that dies is replaced."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep, self._own = sweep, threading.local()
        self._lock, self._workers, self._running = threading.Lock(), list[_Worker](), dict[str, None]()
        self._ending = False

    @property
    def running(self) -> str:
        with self._lock:
            return ", ".join(self._running)

    def run(self, cell: Cell, *, here: bool = False) -> None:
        """here: in this process."""
        folder = self._sweep.folder / cell.address
        config = self._sweep.folder / f"{cell.address}.yaml"
        write_atomic(config, yaml.safe_dump(cell.tree, sort_keys=False))
        name = f"{cell.method or 'teacher'} {cell.address[:6]}"
        with self._lock:
            self._running[name] = None
        began = time.monotonic()
        try:
            kind, error = make(load(config)) if here else self._ask(str(config.resolve()))
        finally:
            with self._lock:
                del self._running[name]
        if kind == "mistake":
            raise UserError(f"{name}: {error}")
        if kind == "stopped":
            raise RunFailed(f"{name}: stopped {error}; start the sweep again to go on")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / DONE, json.dumps({"error": error, "seconds": round(time.monotonic() - began, 2)}))

    def _ask(self, config: str) -> tuple[str, str]:
        """How the run of a configuration ended, from this thread's process, see worker.py. RunFailed where that dies."""
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None or worker.process.poll() is not None:
            worker = self._own.worker = self._start()
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps(config) + "\n")
            worker.process.stdin.flush()
            answer = worker.answers.readline()
        except (BrokenPipeError, ValueError):  # it is gone, or `end` has closed its stdin
            answer = ""
        if not answer:
            code = worker.process.wait()
            raise RunFailed(f"{config}: its process ended with exit code {code}; its folder's run.log and sweep.log say why")
        kind, error = json.loads(answer)
        return str(kind), str(error)

    def _start(self) -> _Worker:
        # One thread a run: the same sums in the same order on any machine. No variable lays settings over the cells' own.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MEGAPD_")}
        with self._lock, (self._sweep.folder / "sweep.log").open("a") as log:
            if self._ending:
                raise RunFailed("the sweep is ending")
            reading, writing = os.pipe()
            process = subprocess.Popen(
                [sys.executable, "-m", "megapd.experiments.worker", str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env={**environment, "OMP_NUM_THREADS": "1"},
                pass_fds=(writing,),
            )
            os.close(writing)
            worker = _Worker(process, os.fdopen(reading))
            self._workers.append(worker)
        return worker

    def end(self) -> None:
        """The processes end: those between two runs at once, others with a checkpoint."""
        with self._lock:
            self._ending = True
        for worker in self._workers:
            assert worker.process.stdin is not None
            with suppress(BrokenPipeError):
                worker.process.stdin.close()  # a run that the signal stops is its last
            worker.process.terminate()
        for worker in self._workers:
            worker.process.wait()

    def close(self) -> None:
        """After `end`, when no thread reads any more."""
        for worker in self._workers:
            worker.answers.close()

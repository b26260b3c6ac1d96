"""The client's side of several teacher replicas: where they are, which of them answer, and asking until one does."""

from __future__ import annotations

import itertools
import logging
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import pyarrow as pa
import pyarrow.flight as flight

from megapd.config import TeacherConfig
from megapd.errors import SignalDamaged, SignalMismatch, SignalNotFinite, TeacherLost, UserError
from megapd.network import backoff, check_transport, client_tls, read_secret
from megapd.teacher.client.probe import Reach, reach
from megapd.teacher.wire.calls import parse_json
from megapd.teacher.wire.messages import MESSAGE_BYTES
from megapd.teacher.wire.refusals import RefusalKind, Refused, refusal
from megapd.teacher.wire.secrets import read_bearer

log = logging.getLogger(__name__)

ROUNDS = 3  # times that every replica must say no before it is taken for final: one may have been restarted with old files
SILENT_SECONDS = 10.0  # the same for connections that are closed without a word: no TLS at one end, or a server that starts
BACKOFF = (0.1, 5.0)  # seconds before a replica is tried again: doubled each time, from, to; times 0.5 to 1.5 at random
BUSY = (0.02, 0.5)  # the same where its queue is full
PROBE_SECONDS = 5.0  # a replica that failed is asked for its health first, so that a dead one costs this and no more

# gRPC's own pause before it connects again grows to two minutes; a teacher restarts in seconds.
_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),  # a longer one is not read
]

# Signals and heads travel as bytes. This lets Arrow refuse record batches, which it would decode, compressed buffers included.
_NO_RECORDS = pa.ipc.IpcReadOptions(included_fields=[1 << 30])
T = TypeVar("T")
Failure = RefusalKind | Reach | Literal["damaged"]

# Failures that are counted and logged, by counter; all but damaged are final once every replica repeats them.
COUNTED: dict[Failure, str] = {"wrong_teacher": "wrong_teacher", "damaged": "damaged"}
COUNTED |= dict.fromkeys(("token", "certificate", "silent", "invalid", "memory", "not_finite"), "refused")


class Endpoints(Protocol):
    """Where the replicas are now, grpc://HOST:PORT each; in the order of preference, none twice."""

    def current(self) -> Sequence[str]: ...

    def close(self) -> None: ...


class FixedEndpoints:
    """Replicas whose addresses the configuration names."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = tuple(dict.fromkeys(addresses))

    def current(self) -> Sequence[str]:
        return self._addresses

    def close(self) -> None:
        """Nothing to do."""


class Remote:
    """One replica as a client sees it; thread-safe as far as Flight's client is, which is for all it does here."""

    def __init__(self, address: str, client: flight.FlightClient, bearer: bytes | None) -> None:
        self.address, self.client = address, client
        self._headers = [] if bearer is None else [(b"authorization", bearer)]
        self.failures = 0  # in a row, of the replica as a whole
        self.retry_at = 0.0
        self.last = "no answer yet"

    def options(self, seconds: float) -> flight.FlightCallOptions:
        return flight.FlightCallOptions(timeout=seconds, headers=self._headers, read_options=_NO_RECORDS)

    def action(self, name: str, body: bytes, seconds: float) -> bytes:
        """The one result of a do_action. Raises Refused, or Flight's errors."""
        try:
            results = list(self.client.do_action(flight.Action(name, body), self.options(seconds)))
        except (flight.FlightError, pa.ArrowException) as error:
            raise (refusal(error) or error) from error
        if len(results) != 1:
            raise SignalDamaged(f"{name}: {len(results)} results instead of one")
        return bytes(results[0].body)


@dataclass
class _Verdict:
    """What a replica said to one question: how often in a row, and since when."""

    failure: Failure
    message: str = ""
    count: int = 0
    since: float = field(default_factory=time.monotonic)

    @property
    def final(self) -> bool:
        """Whether this replica will not say anything else."""
        if self.failure not in COUNTED or self.failure == "damaged" or self.count < ROUNDS:
            return False
        return self.failure != "silent" or time.monotonic() - self.since > SILENT_SECONDS


class Replicas:
    """All replicas of one teacher. `ask` goes round those that answer, away from those that do not, until one did.

    counts: requests (calls made), retries, damaged, refused, wrong_teacher.
    """

    def __init__(self, config: TeacherConfig, endpoints: Endpoints) -> None:
        """endpoints: closed with these. Connects to nothing yet.

        UserError where the token or a certificate cannot be read, or the token would cross a network in the clear.
        """
        self.counts: Counter[str] = Counter(requests=0, retries=0, damaged=0, refused=0, wrong_teacher=0)
        self.closed = threading.Event()
        self._endpoints, self._config = endpoints, config
        self._bearer = read_bearer(config.token)
        for address in config.endpoints:
            self._check(address)
        files = {"tls_root_certs": "root_certificate", "cert_chain": "certificate", "private_key": "key"}
        given = {argument: name for argument, name in files.items() if getattr(config, name) is not None}
        self._tls = {argument: read_secret(getattr(config, name), f"teacher.{name}") for argument, name in given.items()}
        if self._tls:
            _ = self._context  # a certificate that cannot be used shows now
        self._known: dict[str, Remote] = {}
        self._unsafe: dict[str, str] = {}  # addresses that are left out, and why
        self._turn = itertools.count()
        self._lock = threading.Lock()

    def current(self) -> list[Remote]:
        """The replicas that the endpoints name now, in their order."""
        named = self._endpoints.current()
        with self._lock:
            addresses = [address for address in named if address in self._known or self._safe(address)]
            for address in addresses:
                if address not in self._known:
                    self._known[address] = Remote(address, self._client(address), self._bearer)
            for address in self._known.keys() - set(addresses):
                del self._known[address]  # its client closes with the last call that uses it
            return [self._known[address] for address in addresses]

    def _client(self, address: str) -> flight.FlightClient:
        tls = self._tls if _is_tls(address) else {}
        # A proxy of the environment would be told the token where there is no TLS.
        direct = [] if self._bearer is None or _is_tls(address) else [("grpc.enable_http_proxy", 0)]
        return flight.FlightClient(address, generic_options=[*_OPTIONS, *direct], **tls)

    def _check(self, address: str) -> None:
        config, has_token = self._config, self._bearer is not None
        authority = config.root_certificate is not None
        check_transport("teacher", address, token=has_token, insecure=config.insecure, authority=authority)

    def _safe(self, address: str) -> bool:
        """Whether the replica may be asked. One that another's lease names must not keep students from the others."""
        if address not in self._unsafe:
            try:
                self._check(address)
                return True
            except UserError as error:
                self._unsafe[address] = str(error)
                log.error("a replica is left out: %s", error)
        return False

    def ask(self, what: str, do: Callable[[Remote, float], T], deadline: Callable[[], float | None]) -> T:
        """What `do(replica, seconds)` returns, at most `seconds` each time, with the first replica that has it.

        deadline: monotonic time after which it is too late, None while that is not known. Raises TeacherLost then, or as soon as
        every replica refuses for good; SignalMismatch if that is because each has another teacher, SignalNotFinite if it is
        because the answer is not finite; CancelledError once closed.
        """
        verdicts: dict[str, _Verdict] = {}
        later: dict[str, float] = {}  # of this question alone
        previous = ""
        while True:
            now, end = time.monotonic(), deadline()
            left = float("inf") if end is None else end - now
            if left <= 0:
                raise TeacherLost(f"{what}: no answer in time; {self.describe(verdicts)}")
            remote, ready_at = self._choose(later, previous)
            if remote is None or ready_at > now:
                if self.closed.wait(min(max(ready_at - now, 0.001), left, 0.2)):
                    raise CancelledError("the stream was closed")
                continue
            try:
                result = self._try(remote, do, min(self._config.call_seconds, left))
            except (Refused, SignalDamaged, SignalMismatch, flight.FlightError, pa.ArrowException, OSError) as error:
                if self.closed.is_set():
                    raise CancelledError("the stream was closed") from error
                previous = remote.address
                failure, message = self._classify(error, remote, left)
                later[previous] = self._failed(remote, failure, message, verdicts)
                self._judge(what, verdicts)
            else:
                remote.failures, remote.last = 0, "answers"
                return result

    def describe(self, verdicts: dict[str, _Verdict] | None = None) -> str:
        """One line: each endpoint and the last that was heard of it."""
        heard = verdicts or {}
        lines = [f"{r.address}: {heard[r.address].message if r.address in heard else r.last}" for r in self.current()]
        none = "teacher.endpoints: there is no replica, nor one with a lease at scheduler.url"
        return "; ".join([*lines, *self._unsafe.values()]) or none

    def close(self) -> None:
        """No call begins from now on; those under way are for the caller to end."""
        self.closed.set()
        self._endpoints.close()

    @cached_property
    def _context(self) -> ssl.SSLContext:
        """Made where it is needed: 50 ms, for the authorities of the system."""
        named = self._config.root_certificate, self._config.certificate, self._config.key
        return client_tls("teacher.root_certificate, teacher.certificate, teacher.key", *named, protocol="h2")

    def _classify(self, error: Exception, remote: Remote, seconds: float) -> tuple[Failure, str]:
        failure, message = classify(error)
        if failure != "away" or not isinstance(error, flight.FlightUnavailableError):
            return failure, message
        return reach(remote.address, self._context if _is_tls(remote.address) else None, min(seconds, PROBE_SECONDS))

    def _choose(self, later: dict[str, float], previous: str) -> tuple[Remote | None, float]:
        """(the replica to ask, when): round about those that are well, another than the previous one if there is one."""
        remotes = self.current()
        if not remotes:
            return None, time.monotonic() + 0.2
        now, turn = time.monotonic(), next(self._turn)
        ready_at = [max(remote.retry_at, later.get(remote.address, 0.0)) for remote in remotes]

        def rank(place: int) -> tuple[Any, ...]:
            remote, wait = remotes[place], max(ready_at[place] - now, 0.0)
            return wait, remote.failures > 0, remote.address == previous, (place - turn) % len(remotes)

        best = min(range(len(remotes)), key=rank)
        return remotes[best], ready_at[best]

    def _try(self, remote: Remote, do: Callable[[Remote, float], T], seconds: float) -> T:
        if remote.failures:
            remote.retry_at = time.monotonic() + PROBE_SECONDS  # meanwhile nobody else tries it
            if parse_json(remote.action("health", b"", min(PROBE_SECONDS, seconds))).get("draining"):
                raise Refused("draining", "it is about to end")
            remote.failures, remote.retry_at = 0, 0.0
        self._count("requests")
        return do(remote, seconds)

    def _failed(self, remote: Remote, failure: Failure, message: str, verdicts: dict[str, _Verdict]) -> float:
        """Note a failure; returns when this question may go to the replica again."""
        self._count("retries")
        if failure in COUNTED:
            self._count(COUNTED[failure])
            log.warning("%s: %s", remote.address, message)
        known = verdicts.get(remote.address)
        if known is None or known.failure != failure:
            known = verdicts[remote.address] = _Verdict(failure)
        known.count += 1
        known.message = remote.last = message
        now = time.monotonic()
        if failure in ("away", "draining", "certificate", "silent"):  # of the replica, whatever is asked
            remote.failures += 1
            remote.retry_at = now + backoff(BACKOFF, remote.failures)
            return 0.0
        return now + backoff(BUSY if failure == "busy" else BACKOFF, known.count)

    def _judge(self, what: str, verdicts: dict[str, _Verdict]) -> None:
        found = [verdicts.get(remote.address) for remote in self.current()]
        final = [verdict for verdict in found if verdict is not None and verdict.final]
        if not final or len(final) < len(found):
            return
        wrong = [verdict.message for verdict in final if verdict.failure == "wrong_teacher"]
        if wrong:
            raise SignalMismatch(f"{what}: {wrong[0]}")
        broken = [verdict.message for verdict in final if verdict.failure == "not_finite"]
        if broken:
            raise SignalNotFinite(f"{what}: {broken[0]}")
        unreached = "teacher.certificate, teacher.root_certificate, teacher.token: no replica takes a connection: "
        token = "teacher.token: every replica refuses the bearer token: "
        hints: dict[Failure, str] = {"token": token, "certificate": unreached, "silent": unreached}
        raise TeacherLost(f"{what}: {hints.get(final[0].failure, '')}{self.describe(verdicts)}")

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1


def classify(error: Exception) -> tuple[Failure, str]:
    """(what kind of failure, by its type or status code alone; the message for people)."""
    told = error if isinstance(error, Refused) else refusal(error)
    if told is not None:
        return told.kind, str(told)
    if isinstance(error, SignalMismatch):
        return "wrong_teacher", str(error)
    if isinstance(error, flight.FlightUnavailableError):
        return "away", "it cannot be reached"
    if isinstance(error, flight.FlightTimedOutError):
        return "away", "it does not answer in time"
    message = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, flight.FlightUnauthenticatedError | flight.FlightUnauthorizedError):
        return "token", message
    if isinstance(error, SignalDamaged) or (isinstance(error, pa.ArrowInvalid) and not isinstance(error, flight.FlightError)):
        return "damaged", message
    return "away", message


def _is_tls(address: str) -> bool:
    return address.startswith("grpc+tls:")

"""How a teacher says no: a kind that the client acts on, in the extra information of a Flight error."""

from __future__ import annotations

import json
from typing import Literal, get_args

import pyarrow.flight as flight

MAX_ANSWER_BYTES = 16 << 30  # of one request; dense logits of 64k positions over 128k classes in bf16
MAX_MESSAGE = 1000  # characters of an error: it travels in gRPC's trailing metadata, 8 KiB with all else

RefusalKind = Literal[
    "wrong_teacher",  # the step is there, with other weights
    "absent",  # no checkpoint of that step
    "invalid",  # a request that no teacher would answer
    "token",  # bearer token missing or another
    "certificate",  # told by the client's own TLS: the handshake failed
    "memory",  # the client's shared memory cannot be reached from here
    "small",  # the client's shared memory does not hold the answer
    "busy",  # the queue is full: come again
    "draining",  # about to end: ask another replica
    "not_finite",  # the answer holds NaN or an infinity
    "failed",  # the answer could not be made
]


class Refused(Exception):
    """A teacher's no. needed: bytes of shared memory, for kind small."""

    def __init__(self, kind: RefusalKind, message: str, needed: int = 0) -> None:
        super().__init__(message)
        self.kind: RefusalKind = kind
        self.needed = needed

    def as_flight(self) -> flight.FlightError:
        """The error that a Flight handler raises, which `refusal` turns back on the client."""
        message = str(self)[:MAX_MESSAGE]
        extra = json.dumps({"kind": self.kind, "message": message, "needed": self.needed}).encode()
        if self.kind == "token":
            return flight.FlightUnauthenticatedError(message, extra)
        if self.kind in ("busy", "draining"):
            return flight.FlightUnavailableError(message, extra)
        return flight.FlightServerError(message, extra)


def refusal(error: BaseException) -> Refused | None:
    """The refusal that a Flight error carries; None where the teacher itself said nothing (it is away, or the call ran out)."""
    try:
        tree = json.loads(getattr(error, "extra_info", None) or b"null")
        kind, message, needed = tree["kind"], str(tree["message"]), tree.get("needed", 0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # another server's
        return None
    if kind not in get_args(RefusalKind) or type(needed) is not int or not 0 <= needed <= 2 * MAX_ANSWER_BYTES:
        return None
    return Refused(kind, message, needed)

"""Short ways for what is asked all the time: beats and look-ups, ahead of the framework's machinery, which is two thirds of their
time.

A lane answers the plain good case, with the code that the route uses. Whatever else there is about a request (a lesser role, a
body that does not validate, a run that is not there) it leaves to the route, which then sees the request as if nothing had been.
So there is one description of each operation, and one place that refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import ValidationError

from megapd.scheduler import api
from megapd.scheduler.service.hub import Service
from megapd.scheduler.store import runs
from megapd.scheduler.store.database import StoreError
from megapd.scheduler.store.tables import NAME, canonical
from megapd.scheduler.store.tokens import ROLES


class Lane(NamedTuple):
    """answer: of name and body, a tree. route: what it is counted as."""

    route: str
    role: int
    answer: Callable[[str, bytes], Any]


class Lanes:
    """Those of one service."""

    def __init__(self, service: Service) -> None:
        leases, store = service.leases, service.store
        name = NAME.removeprefix("^").removesuffix("$")
        self._path = re.compile(rf"/v1/(replicas|runs)/({name})/(beat|assignment|schedule)")

        def beat(id: str, body: bytes) -> Any:
            lease = leases.beat(id, api.Beat.model_validate_json(body).figures)
            return {"state": lease.state, "lease_seconds": leases.seconds}

        self._lanes = {("POST", "replicas", "beat"): Lane("/v1/replicas/{id}/beat", ROLES.index("run"), beat)}
        if store.sqlite:  # another database is not waited for on the event loop
            for kind, look in (("assignment", runs.assignment), ("schedule", runs.find_schedule)):

                def answer(run: str, _: bytes, look: Callable[..., Any] = look) -> Any:
                    return store.read(lambda connection: look(connection, run))

                self._lanes["GET", "runs", kind] = Lane(f"/v1/runs/{{name}}/{kind}", ROLES.index("read"), answer)

    def find(self, method: str, path: str, query: bytes, role: str) -> tuple[Lane, str] | None:
        """(the lane, the name in the path) of a request that may take one."""
        match = self._path.fullmatch(path)
        if match is None or query:
            return None
        lane = self._lanes.get((method, match[1], match[3]))
        return (lane, match[2]) if lane is not None and ROLES.index(role) >= lane.role else None


def try_lane(lane: Lane, name: str, body: bytes) -> bytes | None:
    """The body of the answer 200; None: the route is to say what is wrong."""
    try:
        return canonical(lane.answer(name, body)).encode()
    except (ValidationError, StoreError):
        return None

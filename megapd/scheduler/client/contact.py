"""The service as one of its clients sees it: there, away, or back again."""

from __future__ import annotations

import logging

from megapd.errors import UserError
from megapd.scheduler.client.http import Api, Away, Refusal

log = logging.getLogger(__name__)

CALL_SECONDS = 5.0  # for one answer: with the default lease, two beats may hang before it runs out
COMPLAINTS = 100  # that are remembered, so as not to be logged again


class Contact:
    """Tells the user once that the service went away, or refuses, and once that it is back. For any thread.

    api  what calls it
    up   whether it answered last: only then is it worth while to wait for an answer
    """

    def __init__(self, api: Api, without: str) -> None:
        """without: what happens while there is no service."""
        self.api, self.up = api, False
        self._without, self._trouble = without, ""
        self._complaints: set[str] = set()

    def failed(self, error: Exception) -> None:
        """An answer did not come, or was a refusal."""
        self.up = False
        trouble = f"{type(error).__name__} {getattr(error, 'status', '')}"
        if trouble != self._trouble:
            self._trouble = trouble
            unknown = None if isinstance(error, Away | Refusal) else error
            log.warning("%s; %s", error, self._without, exc_info=unknown)

    def heard(self) -> None:
        self.up = True
        if self._trouble:
            self._trouble = ""
            log.warning("the scheduler at %s answers again", self.api.url)

    def complain(self, text: str) -> None:
        """Log an error, once."""
        if text in self._complaints:
            return
        log.error("%s", text)
        if len(self._complaints) == COMPLAINTS:
            self._complaints.clear()
        self._complaints.add(text)


def mistake(error: Refusal, role: str) -> UserError:
    """A refusal as the error that ends a program at its start."""
    if error.status in (401, 403):
        fix = f"name a file that holds what `megapd scheduler token {role}` printed"
        return UserError(f"scheduler.token: scheduler.url refuses it: {error}; {fix}")
    return UserError(str(error))

"""Who a bearer token stands for."""

from __future__ import annotations

import time

from megapd.scheduler.store import Store
from megapd.scheduler.store.tokens import find_token, list_tokens, token_hash

KNOWN_SECONDS = 5.0  # that a token is taken for valid without a look into the store: how long a revoked one lives on


class Authenticator:
    """Who a token stands for. `open`: there are no tokens, and need be none."""

    def __init__(self, store: Store, *, loopback: bool) -> None:
        self._store = store
        self._known: dict[str, tuple[float, tuple[str, str]]] = {}
        self._needed = not loopback  # and once needed, needed until the end: the last one revoked opens nothing
        self._open_until = 0.0

    def open(self) -> bool:
        now = time.monotonic()
        if not self._needed and now >= self._open_until:
            self._needed = bool(self._store.read(list_tokens))
            self._open_until = now + 1.0
        return not self._needed

    def find(self, token: str) -> tuple[str, str] | None:
        """(name, role), None of an unknown one."""
        hashed, now = token_hash(token), time.monotonic()
        known = self._known.get(hashed)
        if known is not None and now < known[0]:
            return known[1]
        found = self._store.read(lambda connection: find_token(connection, hashed))
        if found is None:
            self._known.pop(hashed, None)
            return None
        self._known[hashed] = (now + KNOWN_SECONDS, found)
        return found

    def forget(self) -> None:
        """Look into the store again, now."""
        self._known.clear()
        self._open_until = 0.0

"""The registry's records, as what reads checkpoints' files writes them: the service keeps what it is told, and opens no file."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from megapd.scheduler.client.http import Api
from megapd.scheduler.registry.rules import Flags


class Registry:
    """Registered trajectories. Raises Refusal for what the service refuses."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def add_trajectory(self, run: str, location: str, vocabulary: str, name: str | None) -> str:
        """Its digest; name: also points to it."""
        body = {"run": run, "location": location, "vocabulary": vocabulary, "name": name}
        return str(self._api.ask("POST", "/v1/trajectories", body)["digest"])

    def add_checkpoint(self, trajectory: str, record: dict[str, Any]) -> None:
        """record: see importing.record_of."""
        self._api.ask("POST", f"/v1/trajectories/{trajectory}/checkpoints", record)

    def find_trajectory(self, reference: str) -> dict[str, Any]:
        """Of a digest or name."""
        found: dict[str, Any] = self._api.ask("GET", f"/v1/trajectories/{quote(reference, safe='')}")
        return found

    def checkpoints(self, trajectory: str) -> list[dict[str, Any]]:
        return self._api.pages(f"/v1/trajectories/{trajectory}/checkpoints", "step", -1)

    def set_flags(self, trajectory: str, flags: Flags) -> list[dict[str, Any]]:
        """Instead of those that there were; the flagged checkpoints."""
        body = {"flags": {str(step): kinds for step, kinds in flags.items()}}
        flagged: list[dict[str, Any]] = self._api.ask("PUT", f"/v1/trajectories/{trajectory}/flags", body)
        return flagged

    def accept(self, checkpoint: str) -> None:
        """Let it be scheduled though it is flagged."""
        self._api.ask("POST", f"/v1/checkpoints/{checkpoint}/accept")

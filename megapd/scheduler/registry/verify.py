"""What is wrong with a registered trajectory: its files hashed again, and the rules over its records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megapd.errors import UserError
from megapd.files import sha256_file
from megapd.scheduler.client.http import Api
from megapd.scheduler.registry.importing import registered, set_flags
from megapd.scheduler.registry.rules import judge
from megapd.trajectory.hugging_face import HuggingFaceTrajectory


def verify_trajectory(api: Api, reference: str, *, accept: bool = False) -> list[dict[str, Any]]:
    """Hash every file again, judge the records (rules.py), and flag what is wrong; the flagged checkpoints.

    accept: let those be scheduled all the same. Raises UserError if no checkpoint's folder is on this machine.
    """
    digest = api.ask("GET", f"/v1/trajectories/{quote(reference, safe='')}")["digest"]
    records = registered(api, digest)
    if not records:
        raise UserError(f"{reference}: no checkpoint is registered; import them first")
    if not any(_folder(record) is not None for record in records):
        raise UserError(f"{records[0]['location']}: not on this machine; verify where the files are")
    flags = judge(records)
    for record in records:
        detail = changed(record)
        if detail is not None:
            flags.setdefault(record["step"], {})["changed"] = detail
    flagged = set_flags(api, digest, flags)
    return [api.ask("POST", f"/v1/checkpoints/{found['digest']}/accept") for found in flagged] if accept else flagged


def changed(record: Mapping[str, Any]) -> str | None:
    """How the files are not those of the record; None if they are. Reads all of them."""
    folder = _folder(record)
    if folder is None:
        return "its folder is missing"
    for name, file in sorted(record["files"].items()):
        path = folder / name
        try:
            size = path.stat().st_size
            if size != file["bytes"]:
                return f"{name} has {size} bytes, registered were {file['bytes']}"
            found = sha256_file(path)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found != file["sha256"]:
            return f"{name} has sha256 {found[:12]}, registered was {file['sha256'][:12]}"
    return None


def _folder(record: Mapping[str, Any]) -> Path | None:
    location = record["location"]
    if location.startswith("hf:"):
        return HuggingFaceTrajectory(location, (record["step"],)).checkpoint(record["step"]).path
    return Path(location) if Path(location).is_dir() else None

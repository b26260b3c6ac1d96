"""The bearer token that students and their teacher share."""

from __future__ import annotations

import re
from pathlib import Path

from megapd.errors import UserError
from megapd.network import read_secret

MIN_TOKEN_CHARACTERS = 16


def read_bearer(path: Path | None) -> bytes | None:
    """The authorization header's value, of the token in a file; None without one. UserError if it cannot be read, or is too short
    to be a secret."""
    if path is None:
        return None
    token = read_secret(path, "teacher.token").strip()
    hint = "write it with `openssl rand -hex 32`"
    if len(token) < MIN_TOKEN_CHARACTERS:
        found = f"{path} holds {len(token)} characters, at least {MIN_TOKEN_CHARACTERS} are needed"
        raise UserError(f"teacher.token: {found}; {hint}")
    if not re.fullmatch(rb"[!-~]+", token):
        raise UserError(f"teacher.token: {path} holds characters that are not printable ASCII; {hint}")
    return b"Bearer " + token

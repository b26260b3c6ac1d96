"""The bearer token that students and their teacher share."""

from __future__ import annotations

import hmac
import re
from pathlib import Path

from megapd.errors import UserError
from megapd.network import read_secret
from megapd.teacher.wire.refusals import Refused

MIN_TOKEN_CHARACTERS = 16


def read_token(path: Path) -> bytes:
    """The bearer token in a file, without the white space around it. UserError if it is missing or too short to be a secret."""
    token = read_secret(path, "teacher.token").strip()
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise UserError(
            f"teacher.token: {path} holds {len(token)} characters, at least {MIN_TOKEN_CHARACTERS} are needed; "
            f"write it with `openssl rand -hex 32`"
        )
    if not re.fullmatch(rb"[!-~]+", token):
        raise UserError(
            f"teacher.token: {path} holds characters that are not printable ASCII; write it with `openssl rand -hex 32`"
        )
    return token


def bearer(token: bytes) -> bytes:
    """The value of the authorization header."""
    return b"Bearer " + token


def check_token(given: bytes, expected: bytes) -> None:
    """Refused, kind token, unless they are equal; takes the same time wherever they differ."""
    if not hmac.compare_digest(given, expected):
        raise Refused("token", "the bearer token is missing or another; student and teacher need one teacher.token")

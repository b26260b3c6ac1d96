"""Certificates of a little authority, as PEM files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """root: its own PEM; server: for 127.0.0.1; client: valid; expired: a client's, since yesterday."""

    root: Path
    server: Pair
    client: Pair
    expired: Pair


def make_authority(folder: Path) -> Authority:
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    root = folder / "root.pem"
    authority.cert_pem.write_to_path(str(root))

    def pair(name: str, issued: trustme.LeafCert) -> Pair:
        found = Pair(folder / f"{name}.pem", folder / f"{name}.key")
        found.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(found.key))
        return found

    yesterday = datetime.now(UTC) - timedelta(days=1)
    expired = authority.issue_cert("student", not_before=yesterday - timedelta(days=1), not_after=yesterday)
    return Authority(
        root,
        pair("server", authority.issue_cert("127.0.0.1", "localhost")),
        pair("client", authority.issue_cert("student")),
        pair("expired", expired),
    )

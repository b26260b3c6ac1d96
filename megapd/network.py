"""What every client and server needs: addresses of this machine alone, secrets in files, TLS, pauses before another try."""

from __future__ import annotations

import ipaddress
import random
import ssl
from pathlib import Path

from megapd.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether this machine alone reaches the address; of names, localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_secret(path: Path, setting: str) -> bytes:
    """A token, key or certificate. UserError, which names the setting, if the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{setting}: {path}: {error.strerror or error}; name a file that can be read") from error


def client_tls(
    setting: str, root: Path | None, certificate: Path | None = None, key: Path | None = None, protocol: str = ""
) -> ssl.SSLContext:
    """Of connections to servers that the authority in `root` signed, by default the system's, 50 ms.

    certificate, key: PEM of the client's own. protocol: that the handshake names, ALPN. UserError, which names the setting,
    where a file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=root)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"{setting}: {root or certificate}: {error.strerror or error}; name a PEM file") from error
    if protocol:
        context.set_alpn_protocols([protocol])
    return context


def doubled(bounds: tuple[float, float], count: int) -> float:
    """Seconds before try number count + 1: the first bound, doubled each time up to the second."""
    return min(bounds[1], bounds[0] * 2.0 ** min(count - 1, 30))


def backoff(bounds: tuple[float, float], count: int) -> float:
    """The same times 0.5 to 1.5 at random, so that clients do not come back all at once."""
    return doubled(bounds, count) * random.uniform(0.5, 1.5)

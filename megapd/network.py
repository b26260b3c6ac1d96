"""What every client and server needs: addresses of this machine alone, secrets in files, TLS, pauses before another try."""

from __future__ import annotations

import ipaddress
import random
import re
import ssl
from pathlib import Path

from megapd.errors import UserError, hide

TLS_OF = {"http": "https", "grpc": "grpc+tls"}
TLS_SCHEMES = tuple(TLS_OF.values())
_ADDRESS = re.compile(r"[a-z+]+://(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<ip>[0-9A-Fa-f:.]+)\])(?::\d+)?/?")


def is_loopback(host: str) -> bool:
    """Whether this machine alone reaches the address; of names, localhost."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str | None:
    """The host of scheme://HOST[:PORT]; None of what clients may read in different ways."""
    found = _ADDRESS.fullmatch(address)
    return None if found is None else found["name"] or found["ip"]


def server_address(scheme: str, host: str, port: int | None = None) -> str:
    """Where a server listens: scheme://HOST[:PORT], an IPv6 address in brackets."""
    name = f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}" if port is None else f"{scheme}://{name}:{port}"


def check_transport(
    section: str, address: str, *, token: bool, insecure: bool, authority: bool = False, fix: str | None = None
) -> None:
    """UserError, which names `section`'s setting, unless a connection to `address` keeps what it carries.

    address    grpc[+tls]://HOST:PORT or http[s]://HOST[:PORT], of a server that a client asks, or that listens there
    token      whether a token goes with each call: never in the clear to another host, unless `insecure` says so
    authority  whether root_certificate is set, which asks for TLS whatever else there is
    fix        what turns TLS on
    """
    scheme, _, place = address.partition("://")
    if scheme in TLS_SCHEMES:
        return
    fix = fix or f"name {TLS_OF.get(scheme, 'grpc+tls')}://{place.rstrip('/')}"
    if authority:
        raise UserError(f"{section}.root_certificate: {address} is without TLS; {fix}, or leave root_certificate out")
    host = host_of(address)
    if token and not insecure and not (host is not None and is_loopback(host)):
        trusted = f"where the network is trusted, set {section}.insecure"
        raise UserError(f"{section}.token: it would cross the network to {address} in the clear; {fix}, or, {trusted}")


def read_secret(path: Path, setting: str) -> bytes:
    """A token, key or certificate. UserError, which names the setting, if the file cannot be read.

    From now on messages and logs mask it, wherever it comes from.
    """
    try:
        secret = path.read_bytes()
    except OSError as error:
        shown = path if path.suffix or path.parent != Path(".") else "what is given"  # it may be the secret itself
        raise UserError(f"{setting}: {shown}: {error.strerror or error}; name a file that can be read") from error
    hide(secret.decode("latin-1").strip())
    return secret


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

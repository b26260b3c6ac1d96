"""Why a replica cannot be reached: gRPC has one status for a closed port and for a certificate that is refused."""

from __future__ import annotations

import socket
import ssl
from typing import Literal
from urllib.parse import urlsplit

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04" + bytes(5)  # and SETTINGS without any (RFC 9113)
SETTINGS = 4  # the kind of frame that a server begins with

# certificate: of the teacher, which is not to be trusted, or TLS where there is none. silent: whoever is there closes the
# connection without a word of HTTP/2, as gRPC does to a client's certificate that it refuses, TLS to plain text, or a server that
# starts. away: nobody is there, or whatever it was is over.
Reach = Literal["certificate", "silent", "away"]


def reach(address: str, context: ssl.SSLContext | None, seconds: float) -> tuple[Reach, str]:
    """(how far a connection to grpc://HOST:PORT comes, the message for people). context: of grpc+tls://.

    A lease may name what no socket takes, a host like a..b: one replica's odd address must not end the student.
    """
    try:
        place = urlsplit(address)
        if place.hostname is None or place.port is None:
            raise ValueError("no HOST:PORT")
        with socket.create_connection((place.hostname, place.port), seconds) as connection:
            if context is None:
                connection.sendall(PREFACE)
                head = connection.recv(9)
            else:
                # Nothing is sent: with TLS 1.3 a client's certificate is refused after its handshake, and what arrives at a
                # closed socket would take an alert away.
                with context.wrap_socket(connection, server_hostname=place.hostname) as secured:
                    head = secured.recv(9)
    except (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError):
        head = b""
    except ssl.SSLError as error:
        return "certificate", f"the TLS handshake failed: {error}"
    except OSError as error:
        return "away", f"it cannot be reached: {error.strerror or error}"
    except ValueError as error:  # UnicodeError is one, of a host that is no name
        return "away", f"it cannot be reached: {error}"
    if len(head) > 3 and head[3] == SETTINGS:
        return "away", "the connection was lost"
    return "silent", "it closes connections without a word: it wants another certificate, or one of both ends is without TLS"

"""Where a token may go, and how."""

import itertools

import pytest

from megapd.errors import UserError
from megapd.network import check_transport, host_of, server_address

LOOPBACK = ("127.0.0.1", "127.8.9.1", "localhost", "LOCALHOST", "[::1]")
OTHERS = ("10.0.0.5", "node-3", "node-3.cluster", "0.0.0.0", "[::]", "[fe80::1]", "127.0.0.1.evil.com", "localhost.evil.com")
ODD = ("127.0.0.1@evil.com", "evil.com#localhost", "127.0.0.1\\@evil.com", "localhost/../evil", "")


@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpc+tls"])
def test_a_token_crosses_a_network_in_the_clear_only_where_that_is_said(scheme):
    """Each scheme x host x token x insecure x root_certificate."""
    for host, token, insecure, authority in itertools.product((*LOOPBACK, *OTHERS, *ODD), *[(False, True)] * 3):
        address = f"{scheme}://{host}:8470"
        section = "teacher" if scheme.startswith("grpc") else "scheduler"
        refused = None
        if scheme in ("http", "grpc"):
            if authority:
                refused = f"{section}.root_certificate: {address} is without TLS"
            elif token and not insecure and host not in LOOPBACK:
                refused = f"{section}.token: it would cross the network to {address} in the clear"
        told = None
        try:
            check_transport(section, address, token=token, insecure=insecure, authority=authority)
        except UserError as error:
            told = str(error)
            assert {"http": "https://", "grpc": "grpc+tls://"}[scheme] in told
        assert (told or "")[: len(refused or "")] == (refused or ""), address
        assert (told is None) == (refused is None), (address, token, insecure, authority)


def test_hosts():
    assert host_of("https://node-3.cluster:80/") == "node-3.cluster"
    assert host_of("grpc://[::1]:5") == "::1"
    assert [host_of(f"grpc://{odd}:5") for odd in ODD] == [None] * len(ODD)
    assert server_address("grpc", "::", 5) == "grpc://[::]:5"
    assert server_address("https", "h") == "https://h"

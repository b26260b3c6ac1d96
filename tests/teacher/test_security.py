"""Who may ask a teacher: tokens, certificates, the addresses that it listens on."""

import socket
from pathlib import Path

import pyarrow.flight as flight
import pytest

from megapd.config import SchedulerConfig
from megapd.errors import TeacherLost, UserError
from megapd.scheduler.client.http import Api, Away
from megapd.teacher.client import FixedEndpoints
from megapd.teacher.client.replicas import Replicas
from megapd.teacher.locate import open_endpoints
from megapd.teacher.wire.requests import encode_request
from tests.teacher.serving import (
    DENSE,
    DIGESTS,
    TOKEN,
    FakeReplica,
    Served,
    act,
    configuration,
    exchange,
    head,
    make_authority,
    make_batch,
    options,
    served,
    stream_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_soon")]


# -------------------------------------------------------------------------------------------- tokens, certificates, hosts


def test_without_the_token_nothing_is_answered(token_file):
    record = encode_request(20, DIGESTS[20], DENSE, make_batch(0))
    with served(None, f"--teacher.token={token_file}") as server, flight.FlightClient(server.address) as client:
        for token in (None, b"", TOKEN, b"Bearer " + TOKEN[:-1], b"Bearer " + TOKEN + b"0", b"bearer " + TOKEN, b"Bearer \xff"):
            for call in (
                lambda token=token: exchange(client, record, token=token),
                lambda token=token: act(client, "health", token=token),
                lambda token=token: head(client, 20, DIGESTS[20], token),
                lambda token=token: client.do_get(flight.Ticket(b""), options(token)).read_all(),
                lambda token=token: list(client.list_flights(options=options(token))),
            ):
                with pytest.raises((flight.FlightUnauthenticatedError, flight.FlightInternalError)):
                    call()
        assert not server.replica.asked
        assert exchange(client, record, token=b"Bearer " + TOKEN).num_rows == 3


def test_tokens_that_are_none(tmp_path):
    file = tmp_path / "token"
    for content in (b"", b"short\n", b"two words, and long enough", b"\xff" * 20):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"teacher\.token"):
            Served(FakeReplica(), configuration(f"--teacher.token={file}"))
    with pytest.raises(UserError, match=r"teacher\.token"):
        Served(FakeReplica(), configuration(f"--teacher.token={tmp_path / 'none'}"))


def test_it_listens_on_loopback_unless_there_is_a_token(token_file):
    with pytest.raises(UserError, match=r"teacher\.token: teacher\.server\.host 0\.0\.0\.0"):
        Served(FakeReplica(), configuration("--teacher.server.host=0.0.0.0"))
    with served() as server:
        assert listening_on(server.port) == {"0100007F"}
    token = f"--teacher.token={token_file}"
    in_the_clear = r"teacher\.token: .*grpc://0\.0\.0\.0:.*in the clear; set teacher\.server\.certificate.*teacher\.insecure"
    with pytest.raises(UserError, match=in_the_clear):
        Served(FakeReplica(), configuration("--teacher.server.host=0.0.0.0", token))
    with served(None, "--teacher.server.host=0.0.0.0", token, "--teacher.insecure=true") as server:
        assert listening_on(server.port) == {"00000000"}
        with stream_of(server, overrides=(token,)) as stream:
            assert len(stream.signals(0, [make_batch(0)])) == 1


def test_a_student_sends_no_token_in_the_clear(token_file, authorities, caplog):
    """To another host, unless teacher.insecure says so; nor anything without TLS where teacher.root_certificate asks for it."""
    token, root = f"--teacher.token={token_file}", f"--teacher.root_certificate={authorities[0].root}"
    far = ["--teacher.carrier=served", "--teacher.endpoints=[grpc://10.1.2.3:5]"]
    near = ["--teacher.carrier=served", "--teacher.endpoints=[grpc://127.0.0.1:5]"]
    for settings, problem in (
        ([*far, token], r"teacher\.token: .*grpc://10\.1\.2\.3:5 in the clear; name grpc\+tls://10\.1.*teacher\.insecure"),
        ([*far, root], r"teacher\.root_certificate: grpc://10\.1\.2\.3:5 is without TLS"),
        ([*near, token, root], r"teacher\.root_certificate: grpc://127\.0\.0\.1:5 is without TLS"),
    ):
        config = configuration(*settings)
        with pytest.raises(UserError, match=problem):
            Replicas(config.teacher, open_endpoints(config))
    for settings in (far, near, [*near, token], [*far, token, "--teacher.insecure=true"]):
        config = configuration(*settings)
        assert len(Replicas(config.teacher, open_endpoints(config)).current()) == 1
    # One of several that a lease names is left out, and told once.
    replicas = Replicas(configuration(token).teacher, FixedEndpoints(("grpc://10.1.2.3:5", "grpc://127.0.0.1:5")))
    assert [[remote.address for remote in replicas.current()] for _ in range(3)] == [["grpc://127.0.0.1:5"]] * 3
    assert caplog.text.count("a replica is left out: teacher.token: it would cross the network to grpc://10.1.2.3:5") == 1
    assert "grpc://10.1.2.3:5 in the clear" in replicas.describe()


def test_a_proxy_of_the_environment_is_not_told_the_token(token_file, monkeypatch):
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.settimeout(0.2)
        for name in ("http_proxy", "grpc_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        token = f"--teacher.token={token_file}"
        with served(None, token) as server, stream_of(server, overrides=(token,)) as stream:
            assert len(stream.signals(0, [make_batch(0)])) == 1
        with pytest.raises(Away):
            Api(SchedulerConfig(url="http://127.0.0.1:1", token=token_file)).ask("GET", "/v1/runs")
        with pytest.raises(TimeoutError):
            proxy.accept()


def listening_on(port):
    """IPv4 addresses, in hexadecimal, little-endian; those of sockets for both families too."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {line[1].split(":")[0][-8:] for line in lines if line[3] == "0A" and int(line[1].split(":")[1], 16) == port}


def test_ports_that_another_has():
    with served() as server, pytest.raises(UserError, match=rf"teacher\.server: .*:{server.port}.*choose another"):
        Served(FakeReplica(), configuration(port=server.port))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        setting = f"--teacher.server.metrics_port={taken.getsockname()[1]}"
        with pytest.raises(UserError, match=r"teacher\.server\.metrics_port"):
            Served(FakeReplica(), configuration(setting))


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    return make_authority(folder / "ours"), make_authority(folder / "theirs")


def tls(authority, *, mutual):
    settings = [f"--teacher.server.certificate={authority.server.certificate}", f"--teacher.server.key={authority.server.key}"]
    return settings + ([f"--teacher.server.client_authority={authority.root}"] if mutual else [])


def shown(root, pair=None):
    settings = {"root_certificate": root} | ({} if pair is None else {"certificate": pair.certificate, "key": pair.key})
    return tuple(f"--teacher.{name}={value}" for name, value in settings.items())


def test_mutual_tls(authorities, shared_memory, monkeypatch):
    monkeypatch.setattr("megapd.teacher.client.replicas.SILENT_SECONDS", 0.2)
    ours, theirs = authorities
    with served(None, *tls(ours, mutual=True)) as server:
        good = shown(ours.root, ours.client)
        with stream_of(server, shared_memory=shared_memory, overrides=good) as stream:
            assert len(stream.signals(0, [make_batch(0)])) == 1
        asked = len(server.replica.asked)
        for overrides in (
            shown(ours.root),  # none
            shown(ours.root, ours.expired),
            shown(ours.root, theirs.client),
            shown(theirs.root, ours.client),  # the student does not trust the teacher
        ):
            with stream_of(server, overrides=overrides) as stream:
                with pytest.raises(TeacherLost, match=r"teacher\.certificate.*teacher\.token"):
                    stream.signals(0, [make_batch(0)])
                assert stream.counts["refused"] >= 3
        with stream_of(server.address.replace("+tls", "")) as stream, pytest.raises(TeacherLost):
            stream.signals(0, [make_batch(0)])  # in plain text
        assert len(server.replica.asked) == asked


def test_tls_of_the_server_alone_with_a_token(authorities, tmp_path, token_file):
    ours, _ = authorities
    with served(None, f"--teacher.token={token_file}", *tls(ours, mutual=False)) as server:
        with stream_of(server, overrides=(*shown(ours.root), f"--teacher.token={token_file}")) as stream:
            assert len(stream.signals(0, [make_batch(0)])) == 1
        with stream_of(server, overrides=shown(ours.root)) as stream, pytest.raises(TeacherLost, match=r"teacher\.token"):
            stream.signals(0, [make_batch(0)])
    with pytest.raises(UserError, match=r"teacher\.server\.key"):
        Served(FakeReplica(), configuration(*tls(ours, mutual=False)[:1], f"--teacher.server.key={tmp_path / 'none'}"))
    with pytest.raises(UserError, match=r"teacher\.root_certificate"), stream_of(server, overrides=shown(tmp_path / "none")):
        pass

"""The service over HTTP: who may do what, what is refused and how, events as they happen, and where it listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from megapd.config import SchedulerConfig
from megapd.errors import UserError
from megapd.network import is_loopback
from megapd.scheduler.routes import service as service_routes
from megapd.scheduler.server import serve
from megapd.scheduler.service import guard
from megapd.scheduler.store import ROLES, Store
from megapd.scheduler.store import trajectories as catalogue
from tests.scheduler import services
from tests.scheduler.services import serving
from tests.teacher.serving import make_authority

pytestmark = pytest.mark.slow

WEIGHTS = "a" * 64


@pytest.fixture
def client(tmp_path):
    with services.client(tmp_path) as found:
        yield found


def fill(client) -> None:
    assert client.post("/v1/trajectories", json={"run": "t", "location": "/t", "name": "t"}).status_code == 201
    for step in (10, 20):
        record = {"step": step, "location": f"/t/{step}", "weights": f"{step:064x}", "files": {}}
        assert client.post("/v1/trajectories/t/checkpoints", json=record).status_code == 201
    assert client.put("/v1/runs/r", json={"steps": 100, "trajectory": "t"}).status_code == 201


SCHEDULE = {"expected": 0, "effective": 0, "document": {"policy": "equal", "checkpoints": 2, "steps": 20}}
DECISION = {"sequence": 0, "step": 5, "effective": 9, "checkpoint": 20, "reason": "saturated", "evidence": {}}

# method, path, body, role
OPERATIONS = [
    ("GET", "/metrics", None, "read"),
    ("GET", "/openapi.json", None, "read"),
    ("GET", "/v1/trajectories", None, "read"),
    ("POST", "/v1/trajectories", {"run": "x", "location": "/x"}, "run"),
    ("GET", "/v1/trajectories/t", None, "read"),
    ("GET", "/v1/trajectories/t/checkpoints", None, "read"),
    ("POST", "/v1/trajectories/t/checkpoints", {"step": 30, "location": "/x", "weights": WEIGHTS, "files": {}}, "run"),
    ("PUT", "/v1/trajectories/t/flags", {"flags": {}}, "run"),
    ("GET", "/v1/checkpoints/CHECKPOINT", None, "read"),
    ("POST", "/v1/checkpoints/CHECKPOINT/accept", None, "admin"),
    ("GET", "/v1/names", None, "read"),
    ("PUT", "/v1/names/n", {"digest": "CHECKPOINT"}, "admin"),
    ("GET", "/v1/runs", None, "read"),
    ("PUT", "/v1/runs/r2", {"steps": 10}, "run"),
    ("GET", "/v1/runs/r", None, "read"),
    ("GET", "/v1/runs/r/assignment", None, "read"),
    ("PUT", "/v1/runs/r/schedule", SCHEDULE, "run"),
    ("GET", "/v1/runs/r/schedule", None, "read"),
    ("GET", "/v1/runs/r/schedules", None, "read"),
    ("PUT", "/v1/runs/r/schedule", {**SCHEDULE, "expected": 1, "effective": 50}, "admin"),
    ("POST", "/v1/runs/r/control", {"action": "pin", "expected": 2, "effective": 60, "checkpoint": 10}, "admin"),
    ("POST", "/v1/runs/r/schedules/2/applied", {"step": 50}, "run"),
    ("GET", "/v1/runs/r/decisions", None, "read"),
    ("POST", "/v1/runs/r/decisions", DECISION, "run"),
    ("POST", "/v1/runs/r/decisions/0/applied", {"step": 12}, "run"),
    ("GET", "/v1/runs/r/reports", None, "read"),
    ("POST", "/v1/runs/r/reports", {"step": 5, "metrics": {"loss": 1.0}}, "run"),
    ("GET", "/v1/replicas", None, "read"),
    ("PUT", "/v1/replicas/p", {"group": "r", "endpoint": "grpc://h:1"}, "run"),
    ("POST", "/v1/replicas/p/beat", {}, "run"),
    ("POST", "/v1/replicas/p/drain", None, "run"),
    ("DELETE", "/v1/replicas/p", None, "run"),
    ("GET", "/v1/events", None, "read"),
    ("GET", "/v1/tokens", None, "admin"),
    ("POST", "/v1/tokens", {"name": "n", "role": "read"}, "admin"),
    ("DELETE", "/v1/tokens/n", None, "admin"),
]


def test_every_operation_asks_for_its_role(client):
    fill(client)
    headers = {role: services.token(client.service.store, role) for role in ROLES}
    client.service.authenticator.forget()
    digest = client.get("/v1/trajectories/t/checkpoints", headers=headers["read"]).json()[0]["digest"]
    for method, path, body, least in OPERATIONS:
        path = path.replace("CHECKPOINT", digest)
        body = json.loads(json.dumps(body).replace("CHECKPOINT", digest))

        def ask(given, method=method, path=path, body=body):
            return client.request(method, path, json=body, headers=given)

        nobody = ask({})
        assert nobody.status_code == 401, (method, path)
        assert nobody.headers["www-authenticate"] == "Bearer"
        assert ask({"Authorization": "Bearer megapd_wrong"}).status_code == 401
        assert ask({"Authorization": "Basic " + headers["admin"]["Authorization"].split()[1]}).status_code == 401
        for role in ROLES:
            if ROLES.index(role) < ROLES.index(least):
                refused = ask(headers[role])
                assert refused.status_code == 403, (method, path, role, refused.text)
                assert "needs a token of role" in refused.json()["detail"]
        done = ask(headers[least])
        assert done.status_code in (200, 201, 204), (method, path, done.status_code, done.text)
    documented = {
        (method.upper(), path) for path, item in client.app.openapi()["paths"].items() for method in item if path != "/health"
    }
    asked = {(method, _template(path)) for method, path, _, _ in OPERATIONS}
    assert documented - asked == {("GET", "/v1/stream")}


def _template(path: str) -> str:
    parts = path.split("/")
    if len(parts) > 3:
        names = {"trajectories": "{reference}", "replicas": "{id}", "checkpoints": "{digest}", "runs": "{name}"}
        parts[3] = names.get(parts[2], "{name}")
        if parts[2] == "checkpoints" and len(parts) == 4:
            parts[3] = "{reference}"
    if len(parts) > 5:
        parts[5] = {"schedules": "{version}", "decisions": "{sequence}"}.get(parts[4], parts[5])
    return "/".join(parts)


def test_revoked_tokens_and_health(client):
    admin = services.token(client.service.store, "admin")
    client.service.authenticator.forget()
    assert client.get("/health").status_code == 200
    assert client.get("/").status_code == 200
    made = client.post("/v1/tokens", json={"name": "r", "role": "run"}, headers=admin).json()["token"]
    given = {"Authorization": f"Bearer {made}"}
    assert client.get("/v1/runs", headers=given).status_code == 200
    assert client.delete("/v1/tokens/r", headers=admin).status_code == 204
    assert client.get("/v1/runs", headers=given).status_code == 401
    assert client.delete("/v1/tokens/admin", headers=admin).status_code == 204
    assert client.get("/v1/runs").status_code == 401  # the last token gone opens nothing


def test_without_tokens_browsers_under_other_names_are_refused(client):
    assert client.get("/v1/runs").status_code == 200
    assert client.get("/v1/runs", headers={"Host": "rebound.example"}).status_code == 421
    assert client.get("/v1/runs", headers={"Host": "localhost:8480"}).status_code == 200
    assert client.get("/v1/runs", headers={"Host": "127.0.0.1.example"}).status_code == 421


# ------------------------------------------------------------------------------------------------------------ refusals


def test_long_bodies_are_refused(tmp_path):
    with services.client(tmp_path, max_body_bytes=2048) as client:
        long = {"run": "x", "location": "/" + "x" * 3000}
        assert client.post("/v1/trajectories", json=long).status_code == 413
        chunks = (b"x" * 512 for _ in range(8))
        assert client.post("/v1/trajectories", content=chunks).status_code == 413
        assert client.post("/v1/replicas/p/beat", content=(b" " * 512 for _ in range(8))).status_code == 413
        assert client.post("/v1/trajectories", json={"run": "x", "location": "/x"}).status_code == 201


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"step": 1, "metrics": {"loss": NaN}}',
        b'{"step": 1, "metrics": {"loss": 1e999}}',
        b'{"step": 1e30, "metrics": {}}',
        b'{"step": 99999999999999999999, "metrics": {}}',
        b'{"step": -1, "metrics": {}}',
        b'{"step": 1, "metrics": {"\\u0000": 1}}',
        b'{"step": 1, "metrics": {}, "more": 1}',
        b'{"step": 1, "metrics": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"\xff\xfe",
        b'{"step": ' + b"1" * 5000 + b"}",
    ],
)
def test_odd_bodies_are_refused_in_one_line(client, body):
    client.put("/v1/runs/r", json={"steps": 100})
    answer = client.post("/v1/runs/r/reports", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert len(answer.json()["detail"]) <= 2000


@pytest.mark.parametrize(
    "evidence", ['{"a": NaN}', '{"a": "\\ud800"}', '{"\\u0000": "\\u0000"}', '{"a": ' + "[" * 30 + "]" * 30 + "}"]
)
def test_trees_that_are_taken_come_back(client, evidence):
    client.put("/v1/runs/r", json={"steps": 100})
    text = json.dumps({**DECISION, "evidence": None}).replace("null", evidence)
    made = client.post("/v1/runs/r/decisions", content=text, headers={"Content-Type": "application/json"})
    if made.status_code == 201:
        assert client.get("/v1/runs/r/decisions").json()[0]["evidence"] == json.loads(evidence)
    else:
        assert made.status_code == 422
        assert client.get("/v1/runs/r/decisions").json() == []


def test_conflicts_tell_what_is_there(client):
    fill(client)
    first = client.put("/v1/runs/r/schedule", json=SCHEDULE)
    assert first.status_code == 201
    again = client.put("/v1/runs/r/schedule", json=SCHEDULE)
    assert (again.status_code, again.json()) == (200, first.json())
    other = client.put("/v1/runs/r/schedule", json={**SCHEDULE, "document": {"policy": "one_shot"}})
    assert other.status_code == 409
    assert other.json()["current"] == first.json()
    assert client.post("/v1/runs/r/decisions", json={**DECISION, "sequence": 1}).status_code == 409
    assert client.get("/v1/runs/none").status_code == 404


def test_no_location_is_ever_opened(client, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for location in (str(secret), "/etc/passwd", "../../etc/passwd", "hf:x/y"):
        client.post("/v1/trajectories", json={"run": "x", "location": location})
        for prefix in ("/v1/trajectories/", "/v1/checkpoints/", "/v1/runs/", "/"):
            answer = client.get(prefix + location.replace("/", "%2F"))
            assert answer.status_code in (404, 422)
            assert "root:" not in answer.text


def test_what_is_asked_most(client):
    fill(client)
    client.put("/v1/runs/r/schedule", json=SCHEDULE)
    client.put("/v1/replicas/p", json={"group": "r", "endpoint": "grpc://h:1"})
    assert client.get("/v1/runs/r/assignment").json() == {"version": 1, "endpoints": ["grpc://h:1"]}
    assert client.get("/v1/runs/r/schedule").json()["version"] == 1
    for kind in ("assignment", "schedule"):
        assert client.get(f"/v1/runs/r/{kind}?unknown=1").json() == client.get(f"/v1/runs/r/{kind}").json()
        assert client.get(f"/v1/runs/none/{kind}").status_code == 404
    beat = client.post("/v1/replicas/p/beat", json={"figures": {"tokens_per_second": 5}})
    assert beat.json() == client.post("/v1/replicas/p/beat?x=1", json={"figures": {"tokens_per_second": 5}}).json()
    assert client.get("/v1/replicas").json()[0]["figures"] == {"tokens_per_second": 5.0}
    assert client.post("/v1/replicas/none/beat", json={}).status_code == 404
    assert client.post("/v1/replicas/p/beat", json={"figures": {"x": "y"}}).status_code == 422
    assert client.post("/v1/replicas/p/beat", content=b"{").status_code == 422
    shown = client.get("/metrics").text
    assert 'megapd_scheduler_requests_total{method="POST",route="/v1/replicas/{id}/beat",status="200"} 2.0' in shown
    assert 'megapd_scheduler_replicas{state="live"} 1.0' in shown


def test_control_over_http(client):
    fill(client)
    client.put("/v1/runs/r/schedule", json=SCHEDULE)
    body = {"action": "pin", "expected": 1, "effective": 30, "checkpoint": 10}
    pinned = client.post("/v1/runs/r/control", json=body)
    assert pinned.status_code == 201
    assert pinned.json()["note"] == "control: pin"
    assert client.post("/v1/runs/r/control", json=body).status_code == 200
    assert client.post("/v1/runs/r/control", json={**body, "checkpoint": 11}).status_code == 409
    assert client.post("/v1/runs/r/control", json={**body, "expected": 2, "checkpoint": 11}).status_code == 422


# --------------------------------------------------------------------------------------------------------------- events


def read_events(response: httpx.Response) -> Iterator[dict]:
    event = {}
    for line in response.iter_lines():
        if not line:
            if "data" in event:
                yield event
            event = {}
        else:
            key, _, value = line.partition(": ")
            event[key] = value


def test_events_arrive_as_they_happen_and_go_on_where_they_stopped(tmp_path):
    settings = SchedulerConfig(database=f"sqlite:///{tmp_path}/s.db", port=0, streams=2)
    with serving(settings) as served, served.http() as client:
        client.put("/v1/runs/a", json={"steps": 1})
        with client.stream("GET", "/v1/stream", params={"after": 0}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = read_events(response)
            first = [next(events)]
            assert client.put("/v1/runs/b", json={"steps": 1}).status_code == 201
            first.append(next(events))
        assert [(e["event"], json.loads(e["data"])["run"]) for e in first] == [("run", "a"), ("run", "b")]
        client.put("/v1/runs/c", json={"steps": 1})
        with client.stream("GET", "/v1/stream", headers={"Last-Event-ID": first[1]["id"]}) as response:
            third = next(read_events(response))
        assert json.loads(third["data"])["run"] == "c"
        assert int(third["id"]) == int(first[1]["id"]) + 1
        with client.stream("GET", "/v1/stream", headers={"Last-Event-ID": "1000"}) as response:
            assert next(read_events(response))["event"] == "reset"
        assert client.get("/v1/stream", headers={"Last-Event-ID": "x"}).status_code == 422
        with contextlib.ExitStack() as stack:
            deadline = time.monotonic() + 10
            while True:  # those closed above end when the server notices
                opened = stack.enter_context(client.stream("GET", "/v1/stream"))
                if opened.status_code == 429 or time.monotonic() > deadline:
                    break
                assert opened.status_code == 200
            assert opened.status_code == 429


def test_events_that_another_process_wrote_arrive(tmp_path, monkeypatch):
    monkeypatch.setattr(service_routes, "FOREIGN_SECONDS", 0.1)
    settings = SchedulerConfig(database=f"sqlite:///{tmp_path}/s.db", port=0)
    with (
        serving(settings) as served,
        contextlib.closing(Store(settings.database.get_secret_value())) as store,
        served.http() as client,
        client.stream("GET", "/v1/stream", params={"after": 0}) as response,
    ):
        store.write(lambda c: catalogue.add_trajectory(c, "t", "/t", ""))
        assert next(read_events(response))["event"] == "trajectory"


def test_an_open_stream_does_not_keep_the_service_from_ending(tmp_path):
    settings = SchedulerConfig(database=f"sqlite:///{tmp_path}/s.db", port=0)
    with contextlib.ExitStack() as stack:
        with serving(settings) as served:
            response = stack.enter_context(httpx.stream("GET", f"{served.url}/v1/stream", timeout=20.0))
            assert response.status_code == 200
            begun = time.monotonic()
        assert time.monotonic() - begun < 4.0


# ------------------------------------------------------------------------------------------------------------- listening


def test_other_machines_need_tls_and_tokens(tmp_path):
    never = threading.Event()
    database = f"sqlite:///{tmp_path}/s.db"
    pair = make_authority(tmp_path / "tls").server
    with pytest.raises(UserError, match=r"in the clear; set scheduler\.certificate.*scheduler\.insecure"):
        serve(SchedulerConfig(database=database, host="0.0.0.0", port=0), never)
    with pytest.raises(UserError, match="megapd scheduler token"):
        serve(SchedulerConfig(database=database, host="0.0.0.0", port=0, insecure=True), never)
    with pytest.raises(UserError, match="megapd scheduler token"):
        serve(SchedulerConfig(database=database, host="0.0.0.0", port=0, certificate=pair.certificate, key=pair.key), never)


def test_tls(tmp_path):
    authority = make_authority(tmp_path / "tls")
    database = f"sqlite:///{tmp_path}/s.db"
    with contextlib.closing(Store(database)) as store:
        given = services.token(store, "read")
    pair = authority.server
    settings = SchedulerConfig(database=database, host="0.0.0.0", port=0, certificate=pair.certificate, key=pair.key)
    with serving(settings) as served:
        url = f"{served.url}/v1/runs"
        trust = ssl.create_default_context(cafile=str(authority.root))
        assert httpx.get(url, verify=trust, headers=given).status_code == 200
        assert httpx.get(url, verify=trust).status_code == 401
        with pytest.raises(httpx.TransportError):
            httpx.get(url, headers=given)
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https:", "http:"), headers=given)


def test_mistakes_of_the_settings_are_told(tmp_path):
    never = threading.Event()
    database = f"sqlite:///{tmp_path}/s.db"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"scheduler\.port"):
            serve(SchedulerConfig(database=database, port=taken.getsockname()[1]), never)
    (tmp_path / "bad.pem").write_text("no certificate")
    bad = tmp_path / "bad.pem"
    with pytest.raises(UserError, match=r"scheduler\.certificate"):
        serve(SchedulerConfig(database=database, port=0, certificate=bad, key=bad), never)
    for wrong in ({"database": "mysql://x"}, {"certificate": bad}, {"url": "ftp://x"}, {"lease_seconds": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "certificate" not in wrong else "key"):
            SchedulerConfig(**wrong)


def test_a_second_service_of_a_store_is_refused(tmp_path):
    settings = SchedulerConfig(database=f"sqlite:///{tmp_path}/s.db", port=0)
    with serving(settings), pytest.raises(UserError, match="another scheduler"):
        serve(settings, threading.Event())


def test_sigterm_ends_it_with_code_0_and_silent_replicas_are_dropped(tmp_path):
    process = services.Process(f"sqlite:///{tmp_path}/s.db", lease_seconds=0.5)
    try:
        with process.http() as client:
            client.put("/v1/runs/r", json={"steps": 1})
            client.put("/v1/replicas/p", json={"group": "r", "endpoint": "grpc://h:1"})
            assert client.get("/v1/runs/r/assignment").json() == {"version": 1, "endpoints": ["grpc://h:1"]}
            deadline = time.monotonic() + 15
            while client.get("/v1/runs/r/assignment").json()["endpoints"] and time.monotonic() < deadline:
                time.sleep(0.1)
            assert client.get("/v1/runs/r/assignment").json() == {"version": 2, "endpoints": []}
            assert client.post("/v1/replicas/p/beat", json={}).status_code == 404
    finally:
        try:
            code = process.stop()
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert code == 0


def test_a_database_that_fails_is_503_and_not_a_lie(tmp_path):
    with services.client(tmp_path) as client:
        client.put("/v1/runs/r", json={"steps": 1})
        with contextlib.closing(client.service.store._writer_engine.raw_connection()) as raw:
            raw.execute("ALTER TABLE runs RENAME TO hidden")
            broken = client.put("/v1/runs/s", json={"steps": 1})
            assert broken.status_code == 503
            assert client.get("/v1/runs/r").status_code == 503
            raw.execute("ALTER TABLE hidden RENAME TO runs")
        assert client.get("/v1/runs/s").status_code == 404
        assert client.put("/v1/runs/s", json={"steps": 1}).status_code == 201


def test_loopback():
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "10.0.0.1", "host")] == [
        *(True, True, True),
        *(False, False, False, False),
    ]


def test_a_body_that_does_not_arrive_is_given_up(client, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)

    async def ask() -> int:
        statuses: list[int] = []

        async def receive():
            await asyncio.sleep(10)

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {
            **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
            **{"path": "/v1/tokens", "raw_path": b"/v1/tokens", "root_path": "", "query_string": b""},
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"10")],
            **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)},
        }
        await client.app(scope, receive, send)
        return statuses[0]

    assert asyncio.run(ask()) == 408

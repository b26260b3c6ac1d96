"""What the web page is made of, and what it asks for, without a browser."""

from __future__ import annotations

import re

import httpx
import pytest

from megapd.scheduler.dashboard import data
from megapd.scheduler.dashboard import page as assets
from tests.scheduler import services
from tests.scheduler.test_dashboard import EQUAL, good, post, put, report, run, trajectory

pytestmark = pytest.mark.slow


@pytest.fixture
def client(tmp_path):
    with services.client(tmp_path) as found:
        trajectory(found, "parity")
        yield found


def pieces(client: httpx.Client, name: str) -> list[tuple[int, int, int, int]]:
    told = good(client.get(f"/v1/page/runs/{name}/timeline"))
    return [(part["start"], part["end"], part["checkpoint"], part["version"]) for part in told["segments"]]


def test_timeline_is_that_of_the_versions_in_force(client):
    run(client, "a", EQUAL)
    begun = [(0, 200, 200, 1), (200, 400, 400, 1), (400, 600, 600, 1)]
    assert pieces(client, "a") == [*begun, (600, 800, 800, 1), (800, 1000, 1000, 1)]
    put(client, "/v1/runs/a/schedule", {"expected": 1, "effective": 700, "document": {"policy": "one_shot"}})
    assert pieces(client, "a") == [*begun, (600, 700, 800, 1), (700, 1000, 1000, 2)]
    # What the ranks agreed on counts, not what was asked for.
    post(client, "/v1/runs/a/schedules/2/applied", {"step": 720})
    assert pieces(client, "a") == [*begun, (600, 720, 800, 1), (720, 1000, 1000, 2)]
    # A version that begins before the one below it does replaces it wholly.
    put(client, "/v1/runs/a/schedule", {"expected": 2, "effective": 650, "document": {"policy": "one_shot", "checkpoint": 300}})
    assert pieces(client, "a") == [*begun, (600, 650, 800, 1), (650, 1000, 300, 3)]


def test_timeline_of_an_adaptive_schedule_follows_its_decisions(client, monkeypatch):
    document = {"policy": "adaptive", "teachers": [300, 600, 1000], "metric": "accuracy"}
    run(client, "a", document, done=10)
    assert pieces(client, "a") == [(0, 1000, 300, 1)]
    assert good(client.get("/v1/page/runs/a/timeline"))["expected"] == [600, 1000]
    for number, (effective, checkpoint) in enumerate([(100, 600), (250, 1000)]):
        decision = {"sequence": number, "step": effective - 10, "effective": effective, "checkpoint": checkpoint}
        post(client, "/v1/runs/a/decisions", {**decision, "reason": "saturated", "evidence": {}})
    assert pieces(client, "a") == [(0, 100, 300, 1), (100, 250, 600, 1), (250, 1000, 1000, 1)]
    assert good(client.get("/v1/page/runs/a/timeline"))["expected"] == []
    # Of a long history the newest decisions are shown, and how many are not.
    for number in range(2, 9):
        decision = {"sequence": number, "step": 250 + number, "effective": 300 + number, "checkpoint": 300 + 100 * (number % 2)}
        post(client, "/v1/runs/a/decisions", {**decision, "reason": "by hand", "evidence": {}})
    whole = pieces(client, "a")
    assert len(whole) == 10
    monkeypatch.setattr(data, "SEGMENTS", 2)
    report(client, "a", 305)
    told = good(client.get("/v1/page/runs/a/timeline"))
    assert pieces(client, "a") == whole[-4:-1]
    assert told["omitted"] == 6  # five decisions, and the segment after those shown


def test_timeline_says_why_it_is_empty(client):
    put(client, "/v1/runs/none", {"steps": 10})
    told = good(client.get("/v1/page/runs/none/timeline"))
    assert (told["segments"], told["problem"]) == ([], "")
    put(client, "/v1/runs/none/schedule", {"expected": 0, "effective": 0, "document": EQUAL})
    told = good(client.get("/v1/page/runs/none/timeline"))
    assert told["segments"] == []
    assert told["problem"].startswith("trajectory: none is registered for none")


def test_curve_of_a_long_run_is_thinned_and_keeps_its_end(client, monkeypatch):
    run(client, "a", EQUAL, done=0)
    monkeypatch.setattr(data, "POINTS", 10)
    for step in range(1, 48):
        report(client, "a", step)
    steps = [point["step"] for point in good(client.get("/v1/page/runs/a/curve"))]
    assert steps == [*range(5, 46, 5), 47]
    monkeypatch.setattr(data, "POINTS", 47)
    assert [point["step"] for point in good(client.get("/v1/page/runs/a/curve"))] == list(range(1, 48))


def test_teachers_curve_holds_the_numbers_alone_and_comes_in_pages(client):
    metrics = {"loss": 1, "held": {"out": {"accuracy": 0.25}}, "note": "text", "good": True, "list": [1, 2]}
    body = {"step": 2000, "location": "x", "weights": "f" * 64, "files": {}, "metrics": metrics}
    post(client, "/v1/trajectories/parity/checkpoints", body)
    found = good(client.get("/v1/page/trajectories/parity/curve", params={"after": 1000}))
    assert [(point["step"], point["metrics"]) for point in found] == [(2000, {"loss": 1, "held.out.accuracy": 0.25})]
    steps = [point["step"] for point in good(client.get("/v1/page/trajectories/parity/curve", params={"limit": 3}))]
    assert steps == [0, 100, 200]


def test_newest_events_are_the_last_ones_in_order(client):
    every = good(client.get("/v1/events", params={"limit": 1000}))
    assert good(client.get("/v1/page/events", params={"limit": 3})) == every[-3:]
    assert good(client.get("/v1/page/events", params={"limit": 500})) == every


def test_page_is_for_everybody_and_its_data_for_those_with_a_token(client):
    read = services.token(client.service.store, "read")
    client.service.authenticator.forget()
    paths = ["caller", "events", "runs/none/timeline", "runs/none/curve", "trajectories/parity/curve"]
    for path in paths:
        assert client.get(f"/v1/page/{path}").status_code == 401
        assert client.get(f"/v1/page/{path}", headers=read).status_code == (404 if "none" in path else 200)
    assert client.get("/v1/page/caller", headers=read).json() == {"name": "read", "role": "read"}
    for bad in ("events?limit=0", "events?limit=x", "runs/%3Cb%3E/timeline", "trajectories/parity/curve?after=-2"):
        assert client.get(f"/v1/page/{bad}", headers=read).status_code == 422
    for path in ["/", "/page/page.css"]:
        assert client.get(path).status_code == 200


def test_assets_are_cached_packed_and_guarded_by_a_policy_without_inline_script(client):
    page = client.get("/")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["form-action"] == "'none'"
    sources = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert all(re.fullmatch(r"/page/[\w.-]+|/openapi\.json", source) for source in sources)
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|https?://", page.text)
    scripts = [name for name in assets.assets() if name.endswith(".js")]
    assert {"page.js", "api.js"} <= set(scripts)
    for name in scripts:  # nothing there makes HTML of text
        text = client.get(f"/page/{name}").text
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|https?://(?!www\.w3\.org)", text
        )
    charts = next(source for source in sources if "plotly" in source)
    plain, packed = (client.get(charts, headers={"Accept-Encoding": kind}) for kind in ("identity", "gzip"))
    assert plain.content == packed.content
    assert b"plotly.js v" in plain.content[:200]
    assert "immutable" in packed.headers["cache-control"]
    assert (plain.headers.get("content-encoding"), packed.headers["content-encoding"]) == (None, "gzip")
    assert int(packed.headers["content-length"]) < 0.4 * int(plain.headers["content-length"])
    again = client.get("/page/page.js", headers={"If-None-Match": client.get("/page/page.js").headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["page.html", "data.py", "..%2Fdata.py", "%2Fetc%2Fpasswd", "plotly-0.0.1.min.js", "plotly-..%2Fx.min.js", ""]
)
def test_no_other_file_is_sent(client, path):
    assert client.get(f"/page/{path}").status_code == 404


def test_service_without_plotly_says_so(client, monkeypatch):
    monkeypatch.setattr(assets, "plotly_version", lambda: "none")
    answer = client.get("/page/plotly-none.min.js")
    assert (answer.status_code, "not installed" in answer.text) == (404, True)

"""The web page in a real Chromium, on a service in a process of its own."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator

import httpx
import pytest
from sqlalchemy import insert

from megapd.config import SchedulerConfig
from megapd.scheduler.store import Store, runs, tokens
from megapd.scheduler.store import events as journal
from megapd.scheduler.store.tables import runs as runs_table
from tests.scheduler import services

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEED = []
if CHROMIUM is None:
    NEED.append("chromium (apt-get install chromium)")
try:
    from playwright.sync_api import Page, expect, sync_playwright
except ImportError:
    NEED.append("playwright (pip install playwright)")
browsed = pytest.mark.skipif(bool(NEED), reason=f"the page is tested in a browser; missing: {', '.join(NEED)}")

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
HERE = ("http://127.0.0.1:", "about:", "data:", "blob:")
EVIL = "<img src=x onerror=\"window.hurt='name'\">"


# ------------------------------------------------------------------------------------------------------------------- data


def accuracy(step: float, jump: float) -> float:
    return round(0.5 + 0.5 / (1 + math.exp((jump - step) / 60)), 4)


def trajectory(http: httpx.Client, name: str, every: int = 100, last: int = 1000) -> None:
    """A teacher that learns all at once, after 600 steps."""
    post(http, "/v1/trajectories", {"run": name, "location": f"/data/{name}", "name": name})
    for step in range(0, last + 1, every):
        metrics = {"accuracy": accuracy(step, 600), "loss": round(1.4 * (1.02 - accuracy(step, 600)), 4)}
        body = {"step": step, "location": f"/data/{name}/step_{step}", "weights": f"{step:064x}", "files": {}, "metrics": metrics}
        post(http, f"/v1/trajectories/{name}/checkpoints", {**body, "probe_loss": metrics["loss"] + 0.01})


def run(http: httpx.Client, name: str, document: dict, *, steps: int = 1000, done: int = 430, teacher: str = "parity") -> None:
    put(http, f"/v1/runs/{name}", {"trajectory": teacher, "group": teacher, "steps": steps})
    put(http, f"/v1/runs/{name}/schedule", {"expected": 0, "effective": 0, "document": document})
    for step in range(10, done + 1, 20):
        report(http, name, step)


def report(http: httpx.Client, name: str, step: int) -> None:
    wave = 0.01 * math.sin(step / 17)
    metrics = {"accuracy": round(min(accuracy(step, 320) + wave, 1.0), 4), "divergence": round(1.1 - accuracy(step, 320), 4)}
    post(http, f"/v1/runs/{name}/reports", {"step": step, "metrics": metrics})


def replica(http: httpx.Client, number: int, teacher: str = "parity") -> None:
    body = {"group": teacher, "endpoint": f"grpc://teacher-{number}.cluster:7{number:03}"}
    put(http, f"/v1/replicas/replica-{number}", body)
    figures = {"tokens_per_second": 184_000.0 + 3_700 * number, "queued": 2.0 + number}
    post(http, f"/v1/replicas/replica-{number}/beat", {"figures": figures})


def post(http: httpx.Client, path: str, body: dict) -> dict:
    return good(http.post(path, json=body))


def put(http: httpx.Client, path: str, body: dict) -> dict:
    return good(http.put(path, json=body))


def good(answer: httpx.Response) -> dict:
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


EQUAL = {"policy": "equal", "checkpoints": 5, "steps": 200}


# --------------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture
def served(tmp_path) -> Iterator[services.Served]:
    with services.serving(SchedulerConfig(database=f"sqlite:///{tmp_path}/scheduler.db", port=0)) as found:
        yield found


@pytest.fixture
def filled(served) -> services.Served:
    fill(served)
    return served


def fill(served: services.Served) -> None:
    """A trajectory, a run at step 430 of an equal schedule, two replicas."""
    with served.http() as http:
        trajectory(http, "parity")
        run(http, "student-a", EQUAL)
        replica(http, 1)
        replica(http, 2)


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield started
        finally:
            started.close()


@contextlib.contextmanager
def browsing(chromium, url: str, viewport: dict = DESKTOP, **given) -> Iterator[Page]:
    """The page in a fresh browser; errors of scripts, and what the content security policy refuses, fail the test.

    Plotly's script begins with the rules of its maps, in a style element, whether there are maps or not: that one is refused.
    """
    context = chromium.new_context(viewport=viewport, reduced_motion="reduce", **given)
    page = context.new_page()
    page.set_default_timeout(15_000)
    faults, foreign = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))

    def heard(said) -> None:
        maps = "Applying inline style" in said.text and "/page/plotly-" in said.location["url"]
        if "Content Security Policy" in said.text and not maps:
            faults.append(f"{said.location}: {said.text}")

    page.on("console", heard)
    page.on("request", lambda asked: None if asked.url.startswith(HERE) else foreign.append(asked.url))
    try:
        page.goto(url)
        yield page
        assert not faults
        assert not foreign, "the page asks other hosts"
    finally:
        context.close()


def enter_token(page: Page, secret: str) -> None:
    page.get_by_role("button", name="Token", exact=True).click()
    page.get_by_label("Bearer token").fill(secret)
    page.get_by_role("button", name="Use it").click()


def make_tokens(served: services.Served) -> dict[str, str]:
    with contextlib.closing(Store(served.database)) as store:
        return {role: store.write(lambda c, role=role: tokens.create_token(c, role, f"my-{role}")) for role in tokens.ROLES}


# ---------------------------------------------------------------------------------------------------------- in a browser


@browsed
def test_page_shows_runs_rotations_curves_and_replicas(filled, chromium):
    with browsing(chromium, filled.url) as page:
        expect(page.locator(".run")).to_contain_text(["student-a"])
        expect(page.locator(".run-where")).to_have_text("step 430 of 1,000 · taught by 600 · 800 from 600")
        expect(page.locator("#timeline-note")).to_have_text("Rotations past: 2, to come: 2.")
        expect(page.locator("#timeline .scatterlayer .trace")).to_have_count(5)
        expect(page.locator("#student .scatterlayer .trace")).to_have_count(1)
        expect(page.locator("#teacher-note")).to_have_text("accuracy at step 1,000: 0.9994")
        page.locator("#teacher-metric").select_option("probe_loss")
        expect(page.locator("#teacher-note")).to_contain_text("probe_loss at step 1,000")
        page.get_by_text("Rotations as a table").click()
        states = page.locator("#rotations td[data-head=State]")
        expect(states).to_have_text(["past", "past", "teaches", "to come", "to come"])
        expect(page.locator("#replicas tbody tr")).to_have_count(2)
        expect(page.locator("#replicas")).to_contain_text("187,700 tokens/s")
        expect(page.locator("#link")).to_have_text("Live")
        expect(page.locator("#who")).to_have_text("no tokens: everybody here is admin")
        # Ages grow on their own between two answers.
        first = page.locator(".lease-age").first.text_content()
        expect(page.locator(".lease-age").first).not_to_have_text(first)


@browsed
def test_event_and_report_arrive_live_over_the_stream(filled, chromium):
    with browsing(chromium, filled.url) as page, filled.http() as http:
        expect(page.locator("#link")).to_have_text("Live")
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        replica(http, 3)
        expect(page.locator("#events")).to_contain_text(
            "replica replica-3 (parity, grpc://teacher-3.cluster:7003) live", timeout=5_000
        )
        expect(page.locator("#replicas tbody tr")).to_have_count(3, timeout=5_000)
        report(http, "student-a", 630)
        expect(page.locator(".run-where")).to_contain_text("step 630 of 1,000 · taught by 800", timeout=8_000)
        expect(page.locator("#student-note")).to_contain_text("at step 630")
        assert not [url for url in asked if "/v1/events" in url], "it polls though the stream is there"


@browsed
def test_events_are_polled_where_no_stream_gets_through(filled, chromium):
    with browsing(chromium, "about:blank") as page:
        page.route("**/v1/stream*", lambda route: route.abort())
        page.goto(filled.url)
        expect(page.locator("#link")).to_have_text("Live, asked for every 3 s")
        with filled.http() as http:
            replica(http, 3)
        expect(page.locator("#events")).to_contain_text("replica replica-3", timeout=8_000)
        page.goto("about:blank")


@browsed
def test_pause_is_confirmed_and_made_with_an_admins_token(filled, chromium):
    secret = make_tokens(filled)
    with browsing(chromium, filled.url) as page:
        expect(page.locator("#banner")).to_contain_text("This service wants a token.")
        expect(page.locator("#runs-empty")).to_have_text("Nothing is shown without a token.")
        enter_token(page, "megapd_of_nobody")
        expect(page.locator("#banner")).to_contain_text("does not know this token")
        enter_token(page, secret["admin"])
        expect(page.locator("#who")).to_have_text("my-admin, role admin")
        expect(page.locator("#banner")).to_be_hidden()
        page.get_by_role("button", name="Pause").click()
        dialog = page.get_by_role("dialog", name="Pause: student-a")
        expect(dialog).to_be_visible()
        expect(dialog.get_by_label("From student step")).to_have_value("440")
        dialog.get_by_role("button", name="Cancel").click()
        expect(dialog).to_be_hidden()
        with filled.http() as http:
            http.headers["Authorization"] = f"Bearer {secret['read']}"
            assert good(http.get("/v1/runs/student-a"))["schedule_version"] == 1, "it changed without being confirmed"
            page.get_by_role("button", name="Pause").click()
            dialog.get_by_label("From student step").fill("450")
            dialog.get_by_role("button", name="Pause it").click()
            expect(dialog.locator("#control-result")).to_have_text(
                "Done: version 2 of the schedule (one_shot) begins at student step 450."
            )
            made = good(http.get("/v1/runs/student-a/schedule"))
        assert (made["effective"], made["author"], made["document"]["checkpoint"]) == (450, "my-admin", 600)
        dialog.get_by_role("button", name="Close").click()
        expect(page.locator("#versions tbody tr")).to_have_count(2)
        expect(page.locator("#versions tbody tr").first).to_contain_text("control: pause")
        expect(page.locator("#timeline-note")).to_have_text("Rotations past: 2, to come: 0.")
        expect(page.locator("#events li").first).to_contain_text(
            "schedule version 2 (one_shot) begins at step 450, set by my-admin"
        )
        # The token is in this tab's sessionStorage, and nowhere else.
        kept = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie, location.href]")
        assert kept == [{"megapd-token": secret["admin"]}, {}, "", f"{filled.url}/"]
        page.reload()
        expect(page.locator("#who")).to_have_text("my-admin, role admin")
        page.get_by_role("button", name="Token", exact=True).click()
        page.get_by_role("button", name="Forget it").click()
        expect(page.locator("#runs-empty")).to_have_text("Nothing is shown without a token.")
        expect(page.locator(".run")).to_have_count(0)
        assert page.evaluate("sessionStorage.length") == 0


@browsed
def test_a_read_token_sees_everything_and_changes_nothing(filled, chromium):
    secret = make_tokens(filled)
    with browsing(chromium, filled.url) as page:
        enter_token(page, secret["read"])
        expect(page.locator("#controls-note")).to_contain_text("Your token is of role read")
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Pause it").click()
        expect(page.locator("#control-error")).to_have_text(
            "authorization: this needs a token of role admin; yours is of role read"
        )
        expect(page.locator("#control-result")).to_be_empty()
        with filled.http() as http:
            http.headers["Authorization"] = f"Bearer {secret['read']}"
            assert good(http.get("/v1/runs/student-a"))["schedule_version"] == 1


@browsed
def test_advance_and_pin_and_what_the_service_refuses(filled, chromium):
    with browsing(chromium, filled.url) as page, filled.http() as http:
        page.get_by_role("button", name="Advance").click()
        page.get_by_role("button", name="Advance it").click()
        expect(page.locator("#control-result")).to_contain_text("version 2 of the schedule (explicit) begins at student step 440")
        page.keyboard.press("Escape")
        expect(page.locator(".run-where")).to_contain_text("taught by 600 · 800 from 440")
        # Somebody else's change between looking and confirming is shown first.
        page.get_by_role("button", name="Pin").click()
        page.get_by_label("Teacher's step").select_option("200")
        other = {"action": "pause", "expected": 2, "effective": 445}
        post(http, "/v1/runs/student-a/control", other)
        page.get_by_role("button", name="Pin it").click()
        expect(page.locator("#control-error")).to_contain_text("at version 3, not 2")
        assert good(http.get("/v1/runs/student-a"))["schedule_version"] == 3
        page.get_by_role("button", name="Pin it").click()
        expect(page.locator("#control-result")).to_contain_text("version 4 of the schedule (one_shot)")
        page.get_by_role("button", name="Close").click()
        # A step that the run has done meanwhile is refused by the service, with its reason.
        page.get_by_role("button", name="Resume").click()
        report(http, "student-a", 700)
        page.get_by_role("button", name="Resume it").click()
        expect(page.locator("#control-error")).to_contain_text("has done step 700; choose a later one")


@browsed
def test_a_flagged_checkpoint_is_pinned_only_when_accepted(filled, chromium):
    with filled.http() as http:
        put_flags = http.put("/v1/trajectories/parity/flags", json={"flags": {"300": {"loss": "its probe loss rises"}}})
        assert put_flags.status_code == 200, put_flags.text
    with browsing(chromium, filled.url) as page:
        page.get_by_role("button", name="Pin").click()
        accept = page.get_by_label("though checkpoints are flagged")
        expect(accept).to_be_hidden()
        page.get_by_label("Teacher's step").select_option("300")
        expect(page.locator("#control-checkpoint option:checked")).to_have_text("300 (flagged: loss)")
        page.get_by_role("button", name="Pin it").click()
        expect(page.locator("#control-error")).to_contain_text("are flagged: step 300 (loss)")
        accept.check()
        page.get_by_role("button", name="Pin it").click()
        expect(page.locator("#control-result")).to_contain_text("version 2")


@browsed
def test_what_the_service_sends_stays_text(filled, chromium):
    with contextlib.closing(Store(filled.database)) as store:  # the API takes no such name; a store may hold one all the same
        row = {"name": EVIL, "trajectory": None, "group": EVIL, "steps": 100, "facts": "{}", "created": time.time()}
        none = {"schedule_version": 0, "decisions": 0, "step": -1, "reported": None, "assignment_version": 0, "endpoints": "[]"}
        store.write(lambda connection: connection.execute(insert(runs_table), {**row, **none}))
        store.write(lambda connection: journal.emit(connection, "run", EVIL, steps=100, group=EVIL))
        store.write(lambda connection: journal.emit(connection, EVIL, EVIL, detail=EVIL))
        metrics = {"<b>accuracy</b><img src=x>": 0.5}
        store.write(lambda connection: runs.add_report(connection, "student-a", 440, metrics))
        changed = {"expected": 1, "effective": 900, "author": EVIL, "note": EVIL}
        store.write(lambda connection: runs.set_schedule(connection, "student-a", EQUAL, **changed))
    with browsing(chromium, filled.url) as page:
        expect(page.locator("#versions")).to_contain_text(EVIL)
        page.locator("#student-metric").select_option("<b>accuracy</b><img src=x>")
        expect(page.locator("#student .ytitle")).to_have_text("<b>accuracy</b><img src=x>")
        expect(page.locator("#events")).to_contain_text(EVIL)
        page.locator(".run", has_text=EVIL).click()
        expect(page.locator("#detail-title")).to_have_text(EVIL)
        expect(page.locator("#timeline-note")).to_contain_text("name: String should match pattern")
        assert page.evaluate("window.hurt") is None
        assert page.locator("img, main script, iframe").count() == 0


@browsed
@pytest.mark.parametrize("state", ["data", "token", "empty"])
def test_a_phone_scrolls_in_one_direction(served, chromium, state):
    with served.http() as http:
        if state != "empty":
            trajectory(http, "parity")
            run(http, "student-with-a-name-that-is-longer-than-a-telephone-is-wide-and-has-no-space-in-it", EQUAL)
            replica(http, 1)
    if state == "token":
        make_tokens(served)
    with browsing(chromium, served.url, PHONE, has_touch=True, is_mobile=True) as page:
        if state == "data":
            expect(page.locator("#timeline .main-svg").first).to_be_visible()
            expect(page.locator("#teacher .main-svg").first).to_be_visible()
            page.get_by_role("button", name="Pin").tap()
            expect(page.get_by_role("dialog")).to_be_visible()
            inside = page.locator("dialog[open]").bounding_box()
            assert inside["x"] >= 0
            assert inside["x"] + inside["width"] <= PHONE["width"]
            page.get_by_role("button", name="Cancel").tap()
            lefts = {
                page.locator(name).bounding_box()["x"] for name in ("#runs", "#detail", "#replicas-section", "#events-section")
            }
            assert len(lefts) == 1, "more than one column"
            small = page.locator("main button:visible").evaluate_all(
                "all => all.filter(b => b.getBoundingClientRect().height < 40).length"
            )
            assert small == 0, "buttons too small for a finger"
        else:
            expect(page.locator("#runs-empty")).not_to_have_text("Loading")
        width = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
        assert width == [PHONE["width"]] * 3


@browsed
def test_keyboard_reaches_the_controls_and_dialogs_keep_the_focus(filled, chromium):
    with browsing(chromium, filled.url) as page:
        expect(page.locator("#student .main-svg").first).to_be_visible()
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            focused = "(e => e.dataset.action || e.id || e.className || e.tagName)(document.activeElement)"
            reached.append(page.evaluate(focused))
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"{reached[-1]}: nobody sees where the focus is"
        assert reached[:4] == ["skip", "token-open", "run", "pause"]
        assert [name for name in reached if name in ("pause", "advance", "pin", "resume")] == [
            "pause",
            "advance",
            "pin",
            "resume",
        ]
        assert "student-metric" in reached
        page.locator("[data-action=pause]").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#control-effective")).to_be_focused()
        inside = (
            "document.querySelector('dialog[open]').contains(document.activeElement) || document.activeElement === document.body"
        )
        for _ in range(8):  # the browser's own controls stand between the last and the first, and count as body
            page.keyboard.press("Tab")
            assert page.evaluate(inside)
        page.keyboard.press("Escape")
        expect(page.locator("[data-action=pause]")).to_be_focused()
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input, select, meter')].filter(e => !e.labels.length && !e.ariaLabel).length"
        )
        assert unnamed == 0
        live = page.evaluate(
            "['banner', 'link', 'events', 'control-error', 'control-result'].map(id => document.getElementById(id).role)"
        )
        assert live == ["alert", "status", "log", "alert", "status"]


@browsed
def test_service_away_is_said_and_the_page_recovers(tmp_path, chromium):
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(contextlib.closing(services.Process(f"sqlite:///{tmp_path}/s.db")))
        fill(process)
        page = stack.enter_context(browsing(chromium, process.url))
        expect(page.locator("#link")).to_have_text("Live")
        process.kill()
        expect(page.locator("#banner")).to_contain_text("The service is away", timeout=10_000)
        expect(page.locator("#link")).to_have_text("Service away")
        expect(page.locator(".run-where")).to_contain_text("step 430")  # what is known stays
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Pause it").click()
        expect(page.locator("#control-error")).to_contain_text("confirming again does not make it twice")
        page.keyboard.press("Escape")
        process.start()
        with process.http() as http:
            report(http, "student-a", 470)
        page.get_by_role("button", name="Try now").click()
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator(".run-where")).to_contain_text("step 470")
        expect(page.locator("#link")).to_have_text("Live", timeout=20_000)
        with process.http() as http:
            replica(http, 4)
        expect(page.locator("#events")).to_contain_text("replica replica-4")


@browsed
def test_a_service_without_runs_says_so_and_shows_the_first(served, chromium):
    with browsing(chromium, served.url) as page:
        expect(page.locator("#runs-empty")).to_contain_text("No run has registered yet.")
        expect(page.locator("#replicas-empty")).to_contain_text("None has a lease")
        expect(page.locator("#events-empty")).to_have_text("None yet.")
        with served.http() as http:
            put(http, "/v1/runs/bare", {"steps": 50})
        expect(page.locator(".run-where")).to_have_text("no step yet, of 50 · no schedule yet")
        expect(page.locator("#controls-note")).to_have_text("This run has no schedule yet.")
        expect(page.locator("[data-action=pause]")).to_be_disabled()
        expect(page.locator("#student-note")).to_have_text("No report yet.")
        expect(page.locator("#teacher-note")).to_have_text("No trajectory is registered for this run.")


@browsed
def test_without_the_package_plotly_the_page_goes_without_charts(filled, chromium):
    with browsing(chromium, "about:blank") as page:
        page.route("**/page/plotly-*", lambda route: route.fulfill(status=404, body="{}"))
        page.goto(filled.url)
        expect(page.locator("#timeline")).to_contain_text("pip install plotly")
        expect(page.locator("#student-note")).to_have_text("accuracy at step 430: 0.9327")
        page.goto("about:blank")


@browsed
def test_adaptive_decisions_and_many_runs(served, chromium):
    document = {"policy": "adaptive", "teachers": [300, 600, 1000], "metric": "accuracy", "window": 2, "lead": 10}
    with served.http() as http:
        trajectory(http, "parity")
        run(http, "adaptive", document, done=900)
        for number in range(60):
            put(http, f"/v1/runs/other-{number:02}", {"steps": 50})
    with browsing(chromium, served.url) as page:
        expect(page.locator(".run")).to_have_count(50)
        page.get_by_role("button", name="Show all 61").click()
        expect(page.locator(".run")).to_have_count(61)
        page.get_by_label("Filter").fill("ADAPT")
        expect(page.locator(".run")).to_have_count(1)
        page.locator(".run").click()
        expect(page.locator("#decisions tbody tr")).to_have_count(2)
        page.locator("#decisions summary").first.click()
        expect(page.locator("#decisions pre").first).to_contain_text('"metric": "accuracy"')

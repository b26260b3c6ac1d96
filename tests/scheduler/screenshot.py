"""The picture of the page in docs/: python -m tests.scheduler.screenshot docs/images/scheduler.png. Its runs are made up."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from tests.scheduler import services
from tests.scheduler.test_dashboard import CHROMIUM, EQUAL, browsing, post, put, replica, report, run, trajectory


def fill(process: services.Process) -> None:
    with process.http() as http:
        trajectory(http, "parity", every=50)
        run(http, "parity-equal-5x200", EQUAL, steps=1200, done=530)
        run(http, "parity-one-shot", {"policy": "one_shot"}, done=970)
        adaptive = {"policy": "adaptive", "checkpoints": 5, "min_dwell": 100, "max_dwell": 300}
        run(http, "parity-adaptive", adaptive, steps=1500, done=920)
        for number in range(1, 4):
            replica(http, number)
        action = {"action": "advance", "expected": 1, "effective": 560}
        post(http, "/v1/runs/parity-equal-5x200/control", action)
        put(http, "/v1/replicas/gpt-1", {"group": "gpt-410m", "endpoint": "grpc://teacher-9.cluster:7009"})
        report(http, "parity-equal-5x200", 542)


def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        with contextlib.closing(services.Process(f"sqlite:///{folder}/s.db")) as process:
            fill(process)
            with browsing(browser, process.url, {"width": 1360, "height": 900}) as page:
                page.locator(".run", has_text="parity-equal-5x200").click()
                expect(page.locator("#student .scatterlayer .trace")).to_have_count(1)
                expect(page.locator("#replicas tbody tr")).to_have_count(4)
                page.screenshot(path=output, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""`python -m tests.schedule.decider FOLDER`: decide on and on in a run's folder, and print each decision once it is on record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megapd.config import AdaptiveConfig
from megapd.schedule.changes import ChangeLog
from megapd.schedule.plan import Decision, Report
from megapd.schedule.reports import ReportLog, subject

CANDIDATES = (100, 200, 300)


def adaptive(**changes: Any) -> AdaptiveConfig:
    return AdaptiveConfig(**{"teachers": CANDIDATES, "window": 3, "lead": 4} | changes)


def main(folder: Path) -> None:
    reports, changes = (
        ReportLog(folder / "reports.jsonl", "r", subject(adaptive(), CANDIDATES)),
        ChangeLog(folder / "changes.json", "r"),
    )
    begin = len(changes.decisions)
    for n in range(begin, begin + 1000):
        reports.append(Report(10 * n + 10, 0.5))
        reports.sync()
        changes.append(Decision(n, 10 * n + 10, 10 * n + 14, 100 + n % 7, "saturated", {}))
        print(n, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

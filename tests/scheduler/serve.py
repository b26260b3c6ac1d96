"""A service in a process of its own: python -m tests.scheduler.serve DATABASE PORT LEASE_SECONDS. Prints its port."""

from __future__ import annotations

import sys

import megapd.commands.schedule
import megapd.commands.scheduler  # noqa: F401 - these verbs and the service start without what only data planes need
from megapd.config import SchedulerConfig
from megapd.interrupts import until_signalled
from megapd.scheduler.server import serve

if __name__ == "__main__":
    assert not {"torch", "transformers", "megapd.teacher"} & sys.modules.keys()
    database, port, lease_seconds = sys.argv[1:]
    settings = SchedulerConfig(database=database, port=int(port), lease_seconds=float(lease_seconds))
    with until_signalled() as stop:
        serve(settings, stop, ready=lambda port: print(port, flush=True))

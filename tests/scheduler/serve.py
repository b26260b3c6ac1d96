"""A service in a process of its own: python -m tests.scheduler.serve DATABASE PORT LEASE_SECONDS. Prints its port."""

from __future__ import annotations

import sys

from megapd.commands.scheduler import until_signalled
from megapd.config import SchedulerConfig
from megapd.scheduler.server import serve

if __name__ == "__main__":
    database, port, lease_seconds = sys.argv[1:]
    settings = SchedulerConfig(database=database, port=int(port), lease_seconds=float(lease_seconds))
    with until_signalled() as stop:
        serve(settings, stop, ready=lambda port: print(port, flush=True))

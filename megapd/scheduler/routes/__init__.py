"""The HTTP API: one router for each thing it is about."""

from megapd.scheduler.routes import replicas, runs, service, trajectories
from megapd.scheduler.routes.common import READ, Serving

ROUTERS = (replicas.routes, runs.routes, service.routes, *trajectories.ROUTERS)  # tried in this order: the busiest first

__all__ = ["READ", "ROUTERS", "Serving"]

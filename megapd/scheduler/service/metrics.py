"""The service's metrics for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """Of one service. Names begin with megapd_scheduler_."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "megapd_scheduler_"
        self._requests = Counter(f"{name}requests", "Answers", ["method", "route", "status"], registry=registry)
        self._seconds = Histogram(f"{name}seconds", "Of an answer", ["route"], registry=registry, buckets=_SECONDS)
        self._series: dict[tuple[str, str, int], tuple[Any, Any]] = {}
        self.replicas = Gauge(f"{name}replicas", "Replicas with a lease", ["state"], registry=registry)
        self.oldest = Gauge(f"{name}oldest_beat_seconds", "Age of the oldest beat of a lease", registry=registry)
        self.streams = Gauge(f"{name}streams", "Event streams that are open", registry=registry)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answer."""
        key = (method if method in ("GET", "POST", "PUT", "DELETE") else "other", route, status)
        if key not in self._series:
            self._series[key] = self._requests.labels(key[0], route, str(status)), self._seconds.labels(route)
        counter, histogram = self._series[key]
        counter.inc()
        histogram.observe(seconds)

"""Carried out of megapd/schedule/auth.py."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Figures:
    """Of one service for Prometheus. Names begin with megapd_scheduler_."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "megapd_scheduler_"
        self.requests = Counter(f"{name}requests", "Answers", ["method", "route", "status"], registry=registry)
        self.seconds = Histogram(f"{name}seconds", "Of an answer", ["route"], registry=registry, buckets=_SECONDS)
        self.replicas = Gauge(f"{name}replicas", "Replicas with a lease", ["state"], registry=registry)
        self.oldest = Gauge(f"{name}oldest_beat_seconds", "Age of the oldest beat of a lease", registry=registry)
        self.streams = Gauge(f"{name}streams", "Event streams that are open", registry=registry)

"""Figures of one teacher replica for Prometheus, and the HTTP server that shows them: /metrics and /health."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from megapd.errors import UserError

log = logging.getLogger(__name__)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SAMPLES = tuple(float(1 << power) for power in range(13))


class Metrics:
    """One registry a server, so that several can live in a process. Names begin with megapd_teacher_."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "megapd_teacher", "registry": self.registry}
        self.requests = Counter("requests", "Calls by outcome: ok, dropped, or why not", ["call", "outcome"], **own)
        self.tokens = Counter("tokens", "Tokens answered", **own)
        self.bytes = Counter("sent_bytes", "Bytes of answers, over the network or into shared memory", **own)
        self.rotations = Counter("rotations", "Times that another checkpoint was taken up", **own)
        self.batch = Histogram("batch_samples", "Samples answered by one forward pass", buckets=_SAMPLES, **own)
        self.seconds = Histogram("seconds", "Of a request in the queue, of a forward pass", ["phase"], buckets=_SECONDS, **own)
        self.queue = Gauge("queue", "Requests that wait", **own)
        self.resident = Gauge("resident", "Checkpoints in memory", **own)
        self.draining = Gauge("draining", "1 once the server is about to end", **own)

    @property
    def answered(self) -> int:
        """Tokens answered since the start."""
        return int(self.registry.get_sample_value("megapd_teacher_tokens_total") or 0)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    timeout = 30  # seconds of a client that sends nothing

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class MetricsServer:
    """Serves a registry on a thread until `close`. port: 0 takes any free one, which `port` then tells."""

    def __init__(self, metrics: Metrics, host: str, port: int, draining: Callable[[], bool]) -> None:
        shown: Callable[..., Iterable[bytes]] = make_wsgi_app(metrics.registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO")
            if path == "/metrics":
                return shown(environ, start_response)
            if path == "/health":
                status, body = ("503 Service Unavailable", b"draining\n") if draining() else ("200 OK", b"ok\n")
            else:
                status, body = "404 Not Found", b"/metrics and /health\n"
            start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
            return [body]

        try:
            self._server = make_server(host, port, app, server_class=_Server, handler_class=_Quiet)
        except OSError as error:
            text = f"cannot listen on {host}:{port}, {error.strerror}; choose another"
            raise UserError(f"teacher.server.metrics_port: {text}") from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="teacher-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

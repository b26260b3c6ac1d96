"""The served teacher's end: one replica behind Arrow Flight, its queue, its figures."""

from megapd.teacher.server.dispatch import Dispatcher, Job, Replica
from megapd.teacher.server.flight import TeacherFlight
from megapd.teacher.server.metrics import Metrics, MetricsServer
from megapd.teacher.server.serve import serve

__all__ = ["Dispatcher", "Job", "Metrics", "MetricsServer", "Replica", "TeacherFlight", "serve"]

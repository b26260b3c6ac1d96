"""A student's end of a served teacher: replicas that are asked until one answers, and the stream of their signals."""

from megapd.teacher.client.replicas import Endpoints, FixedEndpoints
from megapd.teacher.client.served import ServedStream
from megapd.teacher.client.trajectory import RemoteTrajectory

__all__ = ["Endpoints", "FixedEndpoints", "RemoteTrajectory", "ServedStream"]

"""What one scheduler service holds in memory beside its store: leases, known tokens, metrics, word of commits."""

from megapd.scheduler.service.core import CanonicalJSON, Service, problem, unavailable
from megapd.scheduler.service.guard import Guard
from megapd.scheduler.service.lease_table import Lease, LeaseTable

__all__ = ["CanonicalJSON", "Guard", "Lease", "LeaseTable", "Service", "problem", "unavailable"]

"""What the scheduler remembers: a database of trajectories, runs, replicas, tokens and events; see database.py."""

from megapd.scheduler.store.database import Conflict, NotFound, Refused, Store, Unavailable
from megapd.scheduler.store.tables import DIGEST, NAME, canonical
from megapd.scheduler.store.tokens import ROLES

__all__ = ["DIGEST", "NAME", "ROLES", "Conflict", "NotFound", "Refused", "Store", "Unavailable", "canonical"]

"""Resumable state: what a run must find again to go on bitwise."""

from megapd.training.state.files import StateReader, holds_state
from megapd.training.state.store import MANIFEST, CheckpointStore

__all__ = ["MANIFEST", "CheckpointStore", "StateReader", "holds_state"]

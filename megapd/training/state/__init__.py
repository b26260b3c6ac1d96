"""Resumable state: what a run must find again to go on bitwise."""

from megapd.training.state.store import MANIFEST, CheckpointStore

__all__ = ["MANIFEST", "CheckpointStore"]

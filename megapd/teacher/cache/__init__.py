"""The disk cache of signals, and the stream that reads it."""

from megapd.teacher.cache.cache import SignalCache
from megapd.teacher.cache.cached import CachedStream

__all__ = ["CachedStream", "SignalCache"]

"""`megapd prepare`: text of files or of a hub data set -> tokenizer -> packed blocks on disk."""

from __future__ import annotations

from megapd.corpus.prepare import prepare
from megapd.corpus.verify import verify

__all__ = ["prepare", "verify"]

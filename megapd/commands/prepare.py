"""`megapd prepare`: text of files or of a hub data set -> tokenizer -> packed blocks on disk."""

from __future__ import annotations

import sys

from megapd.config import Config
from megapd.corpus import prepare


def prepare_corpus(config: Config) -> int:
    print(prepare(config, progress=sys.stderr.isatty()))
    return 0

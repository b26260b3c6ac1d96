"""Data sets of the Hugging Face hub, streamed: one revision, and again from where a connection broke off."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from megapd.errors import UserError

HTTP = ("aiohttp", "httpx", "httpx2", "requests", "urllib3")
RETRY_SECONDS = (1.0, 3.0, 9.0)  # before each further attempt
log = logging.getLogger(__name__)


def newest_revision(name: str) -> str | None:
    """The commit that the data set's default branch is at; None, and told, where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        found: str | None = HfApi().dataset_info(name).sha
    except Exception as error:
        if not _broke_off(error):
            raise
        log.warning("%s: its newest revision is not known (%s); corpus.sources.revision would pin one", name, _line(error))
        return None
    return found


def rows_of(name: str, config: str | None, split: str, revision: str | None, setting: str) -> Iterator[dict[str, Any]]:
    """The rows of a split. A connection that breaks off is made again after RETRY_SECONDS, and rows that came are skipped.

    Raises UserError, naming the data set, where it cannot be loaded or does not come back. setting: its place in corpus.sources.
    """
    import datasets  # takes seconds, and local files do not need it

    came, waits = 0, iter(RETRY_SECONDS)
    failure: Exception
    while True:
        try:
            rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        except Exception as error:  # offline, unknown data set, configuration or split
            if not (isinstance(error, ValueError) or _broke_off(error)):
                raise
            if came == 0 or isinstance(error, ValueError):
                raise UserError(f"{setting}: {name} cannot be loaded: {_line(error)}") from error
            failure = error
        else:
            try:
                for row in _after(rows, came):
                    yield row
                    came += 1
                    waits = iter(RETRY_SECONDS)
                return
            except Exception as error:
                if not _broke_off(error):
                    raise
                failure = error
        wait = next(waits, None)
        if wait is None:
            what = f"{name} broke off after {came} rows, and {len(RETRY_SECONDS)} further attempts were in vain: {_line(failure)}"
            raise UserError(f"{setting}: {what}; start again when the hub answers, or download it") from failure
        log.warning("%s broke off after %d rows (%s); trying again in %g s", name, came, _line(failure), wait)
        time.sleep(wait)


def _broke_off(error: Exception) -> bool:
    """Whether an error is of the network: which library of HTTP the hub's client uses depends on its version."""
    return isinstance(error, OSError) or any(kind.__module__.partition(".")[0] in HTTP for kind in type(error).__mro__)


def _after(rows: Any, count: int) -> Iterator[dict[str, Any]]:
    """Those after the first `count`, which a data set of the hub need not fetch as a whole."""
    return iter(rows.skip(count)) if count and hasattr(rows, "skip") else islice(iter(rows), count, None)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

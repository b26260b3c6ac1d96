"""The version of megapd's numbers: raised by whatever changes what an unchanged configuration learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megapd.config import Config

# version -> what came with it, and whose resumed runs it changes. What changes only how a run begins changes no resumed one.
CHANGES: Mapping[int, tuple[tuple[str, Callable[[Config], bool]], ...]] = {}
VERSION = max(CHANGES, default=1)


def affected(config: Config, since: int) -> list[str]:
    """What would change the numbers of a run of `config` that began with version `since`, a sentence each."""
    later = (change for version in sorted(CHANGES) if version > since for change in CHANGES[version])
    return [sentence for sentence, changes in later if changes(config)]

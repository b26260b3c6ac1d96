"""Files of the Hugging Face hub's models: a name with its revision, fetched into the hub's own cache, refusals in a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megapd.errors import UserError

HUB = "hf:"
_LIBRARIES = ("huggingface_hub", "httpx", "httpx2", "requests", "urllib3")


def fetch(name: str, patterns: Sequence[str], setting: str) -> Path:
    """The folder with the files of REPO[@REVISION] that match; setting: what named it. UserError where they cannot be fetched.

    Nested files, which are copies for other runtimes, are left out.
    """
    import huggingface_hub

    repo, _, revision = name.removeprefix(HUB).partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    except Exception as error:
        fix = "check name and network, log in where it is gated (hf auth login), or fetch it beforehand"
        raise hub_error(error, f"{setting}: {name} cannot be fetched", fix) from error
    return Path(found)


def hub_error(error: Exception, what: str, fix: str) -> Exception:
    """A UserError for what the hub, the network or the disk reports, whatever library says so; any other error as it is."""
    library = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and library not in _LIBRARIES:
        return error
    return UserError(f"{what}: {' '.join(str(error).split())[:200]}; {fix}")

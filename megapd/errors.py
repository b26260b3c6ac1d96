"""Errors that the command line tells in one line, and what no text may show: passwords and tokens are masked."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from types import TracebackType
from typing import Any

MASK = "**********"
MIN_CHARACTERS = 8  # of a value that is masked wherever it stands: a password such as "a" would leave no text readable

# scheme://user:PASSWORD@host, and ?password=PASSWORD behind it. A slash ends the host: an @ in a path is none of a password.
_USERINFO = re.compile(r"(?<=://)([^\s:/?#@'\"]*):([^\s/'\"]+)@")
_QUERY = re.compile(r"(?i)([?&](?:ssl)?(?:password|passwd|token|api_?key|secret)=)[^&\s'\"]+")
_hidden: set[str] = set()


class UserError(ValueError):
    """A mistake in the configuration or in the files it points to.

    The message is one line that names the setting or the file, and the fix. The command line prints it without a
    traceback and exits with code 2; every other exception is a fault of megapd and keeps its traceback.
    """


class DataDamaged(UserError):
    """What a digest says of a file is not what it holds."""


class DiskFailed(UserError):
    """A disk is full or read-only, or refuses to write: the message names the path and the disk."""


class RunFailed(RuntimeError):
    """A run cannot go on though its settings are right: told in one line, with exit code 1."""


class Diverged(RunFailed):
    """Loss or gradients stayed non-finite for longer than the run allows."""


class TeacherLost(RunFailed):
    """The signal of a step did not come in time, or every replica refuses to give it."""


class SignalMismatch(RunFailed):
    """A signal of another teacher, or for other tokens, than the step asks for."""


class SignalNotFinite(RunFailed):
    """A teacher's answer holds NaN or an infinity."""


class SignalDamaged(RuntimeError):
    """A record whose bytes are not those that were written."""


# ------------------------------------------------------------------------------------------------------------- secrets


def hide(value: str) -> None:
    """From now on `masked` masks this value wherever it stands."""
    if len(value) >= MIN_CHARACTERS:
        _hidden.add(value)


def masked(text: str) -> str:
    """The text without the secrets in it."""
    for value in _hidden:
        text = text.replace(value, MASK)
    return _QUERY.sub(rf"\1{MASK}", _USERINFO.sub(rf"\1:{MASK}@", text)) if "://" in text else text


def masked_tree(tree: Any) -> Any:
    """A JSON tree with its texts masked, keys aside."""
    if isinstance(tree, dict):
        return {key: masked_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [masked_tree(value) for value in tree]
    return masked(tree) if isinstance(tree, str) else tree


class MaskedFormatter(logging.Formatter):
    """Masks whole records, with their tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def mask_process() -> None:
    """Mask what this process shows of itself: the traceback that ends it or a thread, and sys.argv, which trackers keep."""
    sys.argv[1:] = [masked(argument) for argument in sys.argv[1:]]
    sys.excepthook = _show
    threading.excepthook = lambda told: _show(told.exc_type, told.exc_value, told.exc_traceback)


def _show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit):
        print(masked("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="", flush=True)

"""What other packages add to megapd, by name: tasks, models, schedule policies, callbacks, trackers, metrics, signal kinds.

    from megapd.registry import tasks

    @tasks.register("copy")                      its module is found by an entry point of the package:
    class CopyConfig(TaskConfig): ...                [project.entry-points."megapd.tasks"]
                                                     copy = "their_package.settings:CopyConfig"

megapd's own are registered by the same decorator. An entry point is loaded when its name is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from megapd.errors import UserError

Entry = TypeVar("Entry")
Added = TypeVar("Added")


class Registry(Generic[Entry]):
    """Entries of one sort by name.

    group   of the entry points by which other packages add theirs
    noun    what an entry is, for messages
    """

    def __init__(self, group: str, noun: str) -> None:
        self.group, self.noun = group, noun
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Added], Added]:
        """A decorator that adds what it decorates. UserError if the name is taken."""

        def add(entry: Added) -> Added:
            if name in self._entries:
                taken = _origin(self._entries[name])
                raise UserError(f"{self.group}: {taken} is {self.noun} {name!r} already; register {_origin(entry)} under another")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> Entry:
        """The entry of that name, its entry point loaded. UserError if there is none, two packages claim it, or it is broken."""
        claims = [point for point in _installed(self.group) if point.name == name]
        if len(claims) > 1:
            raise UserError(f"{self.group}: {_packages(claims)} all bring {self.noun} {name!r}; uninstall all but one")
        if claims:
            found = self._load(claims[0])
            if self._entries.setdefault(name, found) is not found:
                raise UserError(
                    f"{self.group}: {_packages(claims)} brings {self.noun} {name!r}, which is {_origin(self._entries[name])} "
                    f"already; uninstall the package, or ask its authors for another name"
                )
        if name not in self._entries:
            known = self.names()
            near = "".join(f"the nearest is {match!r}, of " for match in get_close_matches(name, known, n=1, cutoff=0.0))
            raise UserError(f"unknown {self.noun} {name!r}; {near}{', '.join(known) or 'there is none'}")
        entry: Entry = self._entries[name]
        return entry

    def names(self) -> list[str]:
        """All there are, sorted; nothing is loaded."""
        return sorted({*self._entries, *(point.name for point in _installed(self.group))})

    def _load(self, point: EntryPoint) -> Any:
        try:
            return point.load()
        except Exception as error:  # whatever a foreign module raises
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"{self.group}: {self.noun} {point.name!r} of package {_packages([point])} ({point.value}) cannot be loaded: "
                f"{what}; correct or uninstall the package"
            ) from error


tasks: Registry[type[Any]] = Registry("megapd.tasks", "task")
models: Registry[type[Any]] = Registry("megapd.models", "model")
policies: Registry[type[Any]] = Registry("megapd.policies", "schedule policy")
callbacks: Registry[Callable[..., Any]] = Registry("megapd.callbacks", "callback")
trackers: Registry[Callable[..., Any]] = Registry("megapd.trackers", "tracker")
metrics: Registry[type[Any]] = Registry("megapd.metrics", "metric")
signal_kinds: Registry[type[Any]] = Registry("megapd.signal_kinds", "signal kind")


def imported(reference: str) -> Any:
    """What "package.module:name" names, its module imported now: so a registered class can stand for what needs torch."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@cache
def _installed(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _packages(points: list[EntryPoint]) -> str:
    return " and ".join(sorted(point.dist.name if point.dist is not None else point.value for point in points))


def _origin(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"

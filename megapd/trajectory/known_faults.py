"""Published trajectories with checkpoints that are not of their step: known_faults.json, each with where it was reported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib import resources
from itertools import groupby
from typing import NamedTuple

NAMED = 8  # steps that a warning names


class Fault(NamedTuple):
    """What is wrong with some steps of a repository on the hub, and the report's address."""

    repository: str
    what: str
    source: str
    steps: frozenset[int]


@cache
def known_faults() -> tuple[Fault, ...]:
    text = resources.files("megapd.trajectory").joinpath("known_faults.json").read_text(encoding="utf-8")
    found = []
    for entry in json.loads(text)["faults"]:
        ranges = (step for first, last, stride in entry["ranges"] for step in range(first, last + 1, stride))
        found.append(Fault(entry["repository"], entry["what"], entry["source"], frozenset([*entry["steps"], *ranges])))
    return tuple(found)


def known_fault_warnings(name: str, steps: Iterable[int]) -> list[str]:
    """A line a kind of fault that some of `steps` have. name: REPO[@REVISION], or the path of a copy that has its name in it."""
    words = {word.lower() for word in name.partition("@")[0].split("/")}
    faults = [fault for fault in known_faults() if fault.repository.partition("/")[2].lower() in words]
    found = [(fault, step) for fault in faults for step in sorted(fault.steps.intersection(steps))]
    lines = []
    for fault, group in groupby(found, key=lambda pair: pair[0]):
        bad = [step for _, step in group]
        listed = ", ".join(map(str, bad[:NAMED])) + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        what = f"as published, each of these steps of {fault.repository} {fault.what}: {listed}"
        lines.append(f"teacher.trajectory: {what} ({fault.source}); leave them out of the schedule, unless yours were mended")
    return lines

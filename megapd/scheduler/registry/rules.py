"""What is wrong with a trajectory: rules over its records, and over its files as they are now.

    changed    a file is missing, or has another size or sha256 than the record says
    duplicate  the same weights (digest, a file of them, head or probe loss) at different steps
    order      what a checkpoint says of its own progress is less than what an earlier one says, or names another step
    loss       the probe loss is no number, or does not follow the steps

Published trajectories are corrupt in these ways: 86 of pythia-2.8b's 154 revisions hold weights of the end of its training
(EleutherAI/pythia issues 205 and 206).

The loss rule. In training the loss falls, with noise and in jumps, and it never returns to what it was. The noise sigma is
estimated from the second differences of the losses in the order of their steps, 1.4826 * median |l[i-1] - 2 l[i] + l[i+1]| /
sqrt(6), which a jump or an outlier moves little (they are few among the differences, and the median ignores them; sqrt(6) is the
standard deviation of a second difference of independent noise of deviation 1). Tolerance is 8 sigma + 2 % of the range of the
losses: a peak and a dip of pure noise lie up to 5.5 sigma apart in 154 checkpoints, and sigma is known to 20 % (4 sigma flagged
one of 16 noisy flat curves of 40, 8 none of 600). Kept is the longest sequence of checkpoints in which no loss exceeds the one
kept before by more than the tolerance; the rest is flagged: it is the smallest set without which the losses follow the steps.
Those flagged as duplicates are left out of the estimate, and so are steps without a loss; fewer than five losses are not judged.
A steep drop is what a loss may do, so phase transitions are never flagged; neither is noise. A checkpoint of the end in the
middle is, for what comes after it does not follow.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FEWEST = 5  # losses that say something about noise
SIGMAS, SHARE = 8.0, 0.02
PROGRESS = ("step", "global_step", "tokens", "samples", "seconds")  # of metrics, whatever stands before them (train/tokens)
LOSSES = ("eval/loss", "train/loss", "loss")  # in the place of the probe loss where none was measured
Flags = dict[int, dict[str, str]]  # step -> kind -> detail


def judge(records: Sequence[Mapping[str, Any]]) -> Flags:
    """Flags of the kinds duplicate, order and loss for the records of a trajectory, in the order of their steps."""
    found: Flags = defaultdict(dict)
    for step, detail in _duplicates(records):
        found[step]["duplicate"] = detail
    for step, detail in _disorder(records):
        found[step]["order"] = detail
    doubled = {step for step, kinds in found.items() if "duplicate" in kinds}
    losses = _losses(records)
    for step, loss in losses:
        if not math.isfinite(loss):
            found[step]["loss"] = f"its loss is {loss}"
    clean = [(step, loss) for step, loss in losses if math.isfinite(loss) and step not in doubled]
    for step, detail in unruly(clean):
        found[step]["loss"] = detail
    return dict(found)


def unruly(losses: Sequence[tuple[int, float]]) -> list[tuple[int, str]]:
    """(step, detail) of the losses that do not follow the steps, by the rule of the module. O(n^2)."""
    if len(losses) < FEWEST:
        return []
    values = [loss for _, loss in losses]
    seconds = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    sigma = 1.4826 * statistics.median(seconds) / math.sqrt(6.0)
    tolerance = SIGMAS * sigma + SHARE * (max(values) - min(values))
    kept = _longest(values, tolerance)
    flagged = []
    for place, (step, loss) in enumerate(losses):
        if place not in kept:
            around = [f"{values[i]:.4g} before" for i in kept if i < place][-1:]
            around += [f"{values[i]:.4g} after it" for i in kept if i > place][:1]
            detail = f"its loss {loss:.4g} does not follow the steps: {' and '.join(around)}, tolerance {tolerance:.2g}"
            flagged.append((step, detail))
    return flagged


def _longest(values: Sequence[float], tolerance: float) -> list[int]:
    """Places of the longest sequence in which no value exceeds the one before by more than `tolerance`."""
    best = [1] * len(values)
    previous = [-1] * len(values)
    for i, value in enumerate(values):
        for j in range(i):
            if value <= values[j] + tolerance and best[j] + 1 > best[i]:
                best[i], previous[i] = best[j] + 1, j
    # Of two as long the one that ends later: the end of a training is what its author looked at.
    place = max(range(len(values)), key=lambda i: (best[i], i))
    found = []
    while place >= 0:
        found.append(place)
        place = previous[place]
    return found[::-1]


def _duplicates(records: Sequence[Mapping[str, Any]]) -> Iterable[tuple[int, str]]:
    told: set[int] = set()
    probed = "exactly the same probe loss"
    for what, key in (("the same weights", "weights"), ("", "files"), ("the same head", "head"), (probed, "probe_loss")):
        groups: dict[Any, list[int]] = defaultdict(list)
        for record in records:
            for value in _files(record) if key == "files" else [record.get(key)]:
                if value is not None:
                    groups[value].append(record["step"])
        for value, steps in groups.items():
            what = f"the same {value[1]}, sha256 {value[0][:12]}," if key == "files" else what
            if len(steps) > 1:
                for step in steps:
                    if step not in told:
                        told.add(step)
                        others = [other for other in steps if other != step]
                        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
                        yield step, f"{what} as step {', '.join(map(str, others[:3]))}{more}"


def _files(record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """(sha256, name) of each file of weights."""
    for name, file in (record.get("files") or {}).items():
        if name.endswith((".safetensors", ".bin")):
            yield file["sha256"], name


def _disorder(records: Sequence[Mapping[str, Any]]) -> Iterable[tuple[int, str]]:
    """Checkpoints behind an earlier one in their own account, which cannot tell which of the two is misplaced."""
    for name in PROGRESS:
        newest: tuple[int, float] | None = None
        for record in records:
            account = _account(record, name)
            if account is None:
                continue
            if name in ("step", "global_step") and account != record["step"]:
                yield record["step"], f"it says of itself that it is of step {account:g}"
            elif newest is not None and account < newest[1]:
                yield record["step"], f"its {name} are {account:g}, fewer than the {newest[1]:g} of step {newest[0]}"
            if newest is None or account >= newest[1]:
                newest = record["step"], account


def _account(record: Mapping[str, Any], name: str) -> float | None:
    for key, value in (record.get("metrics") or {}).items():
        if key.rpartition("/")[2] == name and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _losses(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) of the records that have one: the probe loss, else the first of LOSSES that any has; never two kinds."""
    probed = [(record["step"], float(record["probe_loss"])) for record in records if record.get("probe_loss") is not None]
    for key in LOSSES if not probed else ():
        values = [(record["step"], (record.get("metrics") or {}).get(key)) for record in records]
        probed = probed or [(s, float(v)) for s, v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return probed

"""What may differ between a run's starts: settings, compared as trees with today's defaults filled in."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from megapd.config import RETIRED_SETTINGS, Config, complete, flatten, public_tree
from megapd.errors import UserError

log = logging.getLogger(__name__)

# What may always differ: nothing here changes what the run learns. Streams are interchangeable, and a resumed run is held to the
# digests of its teachers (schedule.json) and of its data (run.json), wherever they lie. Callbacks look on; one whose state the
# checkpoint carries must be named again.
_TEACHER = "trajectory sharding resident carrier cache endpoints token root_certificate certificate key insecure depth"
_TEACHER += " call_seconds deadline_seconds on_failure server."
_FREE = "checkpoint. telemetry. scheduler. runs_dir corpus. task.corpus evaluation.micro_batch"
_FREE += " training.prefetch training.callbacks schedule.timeout_seconds"
FREE_SETTINGS = (*_FREE.split(), *(f"teacher.{key}" for key in _TEACHER.split()))

# What makes another run with another value, whatever is allowed: the checkpoint's weights, their task, or what is on record of
# its teachers would not fit. A schedule changes by its versions, see `megapd schedule`.
FIXED_SETTINGS = ("name", "task.", "model.", "schedule.")

# What may differ from machine to machine of one run: where things lie. Their content is compared by digests.
LOCAL_SETTINGS = ("runs_dir", "corpus.", "task.corpus", "teacher.trajectory", "teacher.cache", "teacher.root_certificate")


def changed_settings(folder: object, saved: Mapping[str, Any], config: Config, allowed: Sequence[str]) -> dict[str, list[Any]]:
    """name -> [before, now] of what the run's folder has otherwise on record.

    allowed: names, or sections, that may be others (--allow-change). More training.steps need no leave. Raises UserError.
    """
    before_tree, gone = complete(saved)
    for name in gone:
        if name not in RETIRED_SETTINGS:
            log.warning("%s began with the setting %s, which this megapd does not have: left out", folder, name)
    before, now = flatten(before_tree), flatten(public_tree(config))
    pairs: dict[str, list[Any]] = {key: [before.get(key), now.get(key)] for key in sorted(before.keys() | now.keys())}
    different = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    for name in allowed:
        if name not in now and not any(key.startswith(f"{name}.") for key in now):
            raise UserError(f"--allow-change: there is no setting {name}")
    for key, (was, value) in different.items():
        if key.startswith(FREE_SETTINGS):
            continue
        what = f"{key} was {was!r} when {folder} began and is {value!r} now"
        if key.startswith(FIXED_SETTINGS):
            raise UserError(f"{what}; that is another run: restore it, or choose another name")
        if key == "training.steps" and value > was:
            continue
        if not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise UserError(f"{what}; restore it, choose another name, or change it on record: --allow-change {key}")
    return different

"""Another run that goes on from a checkpoint of a run: for a decay that branches off a stable part, for sweeps from one start."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapd.config import Config, flatten, public_tree
from megapd.errors import UserError
from megapd.files import commit_folder, sealed, temporary_folder, unsealed, write_atomic
from megapd.schedule.changes import FILE as CHANGES
from megapd.schedule.record import FILE as SCHEDULE
from megapd.schedule.reports import REPORTS_FILE
from megapd.training.folder.metrics import METRICS, branch_lines
from megapd.training.folder.open import CHECKPOINTS, check_config, write_config
from megapd.training.folder.record import RunRecord, new_record, read_record
from megapd.training.folder.settings import FIXED_SETTINGS, changed_settings

MANIFEST = "manifest.json"  # of a checkpoint; what it says of files and settings stays, the run it names does not


def branch(folder: Path, config: Config, step: int | None, given: Mapping[str, Any]) -> int:
    """Make the folder of `config`, a run that `megapd train` takes up where the run in `folder` was after `step` student steps.

    config: that run's with another name, and with `given`, settings that were named. step: None: the newest checkpoint's. Returns
    the step. The new run has an id of its own, and its parent on record. Raises UserError, with nothing left behind.
    """
    check_config(folder)
    parent = read_record(folder)
    if parent is None or not parent.began:
        raise UserError(f"{folder} holds no run that made a step, or one of an older megapd; resume it once, then branch")
    allowed = [name for name in flatten(dict(given)) if not name.startswith(FIXED_SETTINGS)]
    if config.scheduler.url is not None and (folder / CHANGES).exists():
        raise UserError(f"scheduler.url: the scheduler changes the schedule of {folder}, and knows no branch of it")
    own = config.model_copy(update={"name": parent.settings["name"]})
    changed = changed_settings(folder, parent.settings, own, allowed)
    steps = sorted(int(p.name.removeprefix("step_")) for p in (folder / CHECKPOINTS).glob("step_*") if p.name[5:].isdigit())
    if not steps:
        raise UserError(f"{folder / CHECKPOINTS} holds no checkpoint to branch from")
    at = steps[-1] if step is None else step
    if at not in steps:
        raise UserError(f"--at {at}: {folder / CHECKPOINTS} holds steps {', '.join(map(str, steps))}")
    final = config.folder
    if final.exists():
        raise UserError(f"--as {config.name}: {final} exists; choose another name")
    with temporary_folder(final) as temporary:
        record = new_record(
            temporary,
            parent.digests,
            public_tree(config),
            numerics=parent.numerics,
            parent={"id": parent.id, "folder": str(folder), "step": at, "changed": changed},
            saved=at,
        )
        _checkpoint(folder / CHECKPOINTS / f"step_{at}", temporary / CHECKPOINTS / f"step_{at}", record.id)
        _journal(folder, temporary, record, at)
        record.lines = branch_lines(folder / METRICS, temporary / METRICS, record.id, at)
        record.write()
        write_config(temporary, config)
        commit_folder(temporary, final)
    return at


def _checkpoint(source: Path, target: Path, run: str) -> None:
    """The same files, by hard links where the file system has them: a checkpoint's files never change."""
    target.mkdir(parents=True)
    try:
        manifest = unsealed((source / MANIFEST).read_text())
        for name in manifest["files"]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / name, target / name)
            except OSError:
                shutil.copyfile(source / name, target / name)
    except FileNotFoundError as error:
        what = f"{error.filename} went while it was copied: the run, which goes on, keeps the last checkpoints only"
        raise UserError(f"{what}; branch at a later step, or raise checkpoint.keep") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{source / MANIFEST}: damaged ({error}); branch at another step") from error
    write_atomic(target / MANIFEST, sealed({**manifest, "run": run}))


def _journal(folder: Path, target: Path, record: RunRecord, step: int) -> None:
    """What governs the teacher, as far as the checkpoint of `step` rests on it; what came later the branch decides for itself."""
    carried = unsealed((folder / CHECKPOINTS / f"step_{step}" / "state.json").read_text())["run"]
    known = carried["journal"]["changes"][0], carried["journal"]["reports"][0]
    if (folder / SCHEDULE).exists():
        tree = unsealed((folder / SCHEDULE).read_text())
        steps = min(tree["steps"], record.settings["training"]["steps"])
        rotations = [rotation for rotation in tree["rotations"] if rotation[0] < steps]
        write_atomic(target / SCHEDULE, sealed({**tree, "run": record.id, "steps": steps, "rotations": rotations}))
    if (folder / CHANGES).exists():
        tree = unsealed((folder / CHANGES).read_text())
        write_atomic(target / CHANGES, sealed({**tree, "run": record.id, "changes": tree["changes"][: known[0]]}))
    if (folder / REPORTS_FILE).exists():
        subject, *reports = (folder / REPORTS_FILE).read_text().splitlines(keepends=True)
        own = json.dumps({**json.loads(subject), "run": record.id}) + "\n"
        write_atomic(target / REPORTS_FILE, "".join([own, *reports[: known[1]]]))

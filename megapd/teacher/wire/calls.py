"""What calls hold beside signals, in JSON: the trajectory's description, and which checkpoint is meant."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megapd.errors import masked_tree
from megapd.teacher.wire.refusals import Refused
from megapd.trajectory import Checkpoint

CATALOGUE_FORMAT = "megapd-catalogue/1"
MAX_JSON_BYTES = 64 << 10  # of a question, an action's body or a value of the metadata
_STEP = re.compile(r"0|[1-9][0-9]{0,14}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object; Refused, kind invalid, for anything else."""
    if len(data) > MAX_JSON_BYTES:
        raise Refused("invalid", f"{len(data)} bytes of JSON, {MAX_JSON_BYTES} at most")
    try:
        tree = json.loads(data) if data else {}
    except (ValueError, RecursionError) as error:
        raise Refused("invalid", f"not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise Refused("invalid", "not a JSON object")
    return tree


def parse_teacher(step: object, teacher: object) -> tuple[int, str]:
    """(teacher step, digest) as a call gives them. Only whole numbers name checkpoints, so no call can name a file."""
    if isinstance(step, bool) or not isinstance(step, int | str) or not _STEP.fullmatch(str(step)):
        raise Refused("invalid", f"step: {str(step)[:40]!r} is no teacher step")
    if not isinstance(teacher, str) or not _DIGEST.fullmatch(teacher):
        raise Refused("invalid", f"teacher: {str(teacher)[:80]!r} is no digest, 64 hexadecimal digits")
    return int(step), teacher


def encode_head_question(step: int, teacher: str) -> bytes:
    """Asks for a checkpoint's output layer: the answer is an Arrow stream of megapd.signals.encode_head."""
    return json.dumps({"head": step, "teacher": teacher}).encode()


def parse_head_question(data: bytes) -> tuple[int, str]:
    tree = parse_json(data)
    if tree.keys() != {"head", "teacher"}:
        raise Refused("invalid", "head: it needs head and teacher, and nothing else")
    return parse_teacher(tree["head"], tree["teacher"])


def encode_catalogue(steps: Sequence[int], checkpoints: Iterable[Checkpoint]) -> bytes:
    """What a student without the trajectory's folder needs to resolve its schedule. Equal configurations are sent once."""
    configs: list[dict[str, Any]] = []
    entries = []
    for checkpoint in checkpoints:
        config = masked_tree(checkpoint.config)  # an older megapd wrote passwords there
        if config not in configs[-1:]:  # of neighbours: a run has one
            configs.append(config)
        entry: dict[str, Any] = {"step": checkpoint.step, "digest": checkpoint.digest, "vocabulary": checkpoint.vocabulary}
        entry |= {"forms": list(checkpoint.forms)} if checkpoint.forms else {}
        entries.append({**entry, "config": len(configs) - 1, "metrics": checkpoint.metrics})
    tree = {"format": CATALOGUE_FORMAT, "steps": list(steps), "configs": configs, "checkpoints": entries}
    return json.dumps(tree).encode()


def decode_catalogue(data: bytes, path: Path) -> tuple[tuple[int, ...], dict[int, Checkpoint]]:
    """(steps there are, the checkpoints described, by step). path: what their messages name. Refused if it is not whole."""
    try:
        tree = json.loads(data)
        if tree["format"] != CATALOGUE_FORMAT:
            raise ValueError(f"its format is {tree['format']!r}, not {CATALOGUE_FORMAT!r}")
        found = {}
        for entry in tree["checkpoints"]:
            step, digest = parse_teacher(entry["step"], entry["digest"])
            config = tree["configs"][entry["config"]]
            forms = tuple(map(str, entry.get("forms", ())))
            found[step] = Checkpoint(step, path, digest, str(entry["vocabulary"]), config, entry["metrics"], {}, forms)
        return tuple(sorted(int(step) for step in tree["steps"])), found
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise Refused("failed", f"the teacher's trajectory: not as this megapd reads it: {error}") from error

"""What was measured of a checkpoint after it was written: measured.json beside its weights, which it names.

    {"format", "weights": digest, "measured": {metric: {"settings": {...}, "values": {name: number}}}, "digest"}

Readers see the values among the checkpoint's metrics, as curriculum/NAME.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapd.errors import UserError
from megapd.files import sealed, unsealed, write_atomic

FILE = "measured.json"
FORMAT = "megapd-measured/1"
PREFIX = "curriculum/"

Measured = dict[str, dict[str, Any]]  # metric -> settings and values


def read_measured(file: Path, weights: str) -> Measured:
    """What is on record of the weights of that digest; of other weights, nothing. UserError for a file that is damaged."""
    if not file.exists():
        return {}
    try:
        tree = unsealed(file.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise ValueError(f"its format is {tree['format']!r}, not {FORMAT!r}")
        measured = tree["measured"] if tree["weights"] == weights else {}
        for entry in measured.values():
            if not isinstance(entry["settings"], dict) or not isinstance(entry["values"], dict):
                raise ValueError("an entry without settings and values")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it, `megapd analyse` measures again") from error
    return dict(measured)


def write_measured(file: Path, weights: str, measured: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, sealed({"format": FORMAT, "weights": weights, "measured": measured}))


def as_metrics(measured: Measured) -> dict[str, float]:
    return {PREFIX + name: value for entry in measured.values() for name, value in entry["values"].items()}

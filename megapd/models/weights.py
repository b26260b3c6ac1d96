"""Weights: what the files of a Hugging Face model's folder hold, and the way of whole tensors into a learner."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapd.errors import UserError
from megapd.models.build import Learner
from megapd.trajectory.pickles import load_pickle

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@torch.no_grad()
def copy_weights(learner: Learner, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy `tensors`, one a parameter under its name, over the learner's parameters, whatever the dtype and device of either.

    source: where they come from, for the message. Raises UserError, with nothing copied, unless names and shapes agree.
    """
    own = dict(learner.named_parameters())
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[:3]
        raise UserError(f"{source}: its tensors are not those of the model in its meta.json, e.g. {', '.join(odd)}")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(f"{source}: {name} has shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
    for name, parameter in own.items():
        parameter.copy_(tensors[name], non_blocking=True)


def stored_tensors(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """(file, name, tensor or slice of an open file, see slices.take) of everything that the folder holds.

    Nothing is read until it is taken. Files that torch.save wrote run no code, and are mapped into memory where their format
    allows. Raises UserError if there are no weights, or files are missing or damaged.
    """
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                        yield path, name, file.get_slice(name)
            else:
                for name, tensor in load_pickle(path).items():
                    yield path, name, tensor
        except UserError:
            raise
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged, or no weights file: {' '.join(str(error).split())[:200]}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights, safetensors before others; UserError if there are none, or one is missing."""
    present = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        raise UserError(f"{folder}: no weights; expected {', '.join(WEIGHT_FILES[:3])}")
    files = _shards(present[0]) if present[0].suffix == ".json" else present[:1]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, though {present[0].name} names it; fetch the model again")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if there is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a model saved with save_pretrained")
    try:
        tree = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(tree).__name__}")
    return tree


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: no weight_map; fetch the model again")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index}: {outside[0]!r} is not the name of a file in the same folder")
    return [index.parent / name for name in names]

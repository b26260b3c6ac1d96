"""A run's resumable state on the disk, which any number of ranks at any ZeRO stage can read, and which executes nothing.

state.json                  names and shapes, which elements lie in which file; counters; what the run and its callbacks carry
rank_NNNNN.safetensors      fp32 slices: `weight START NAME`, and `KEY START NAME` of what the optimizer keeps an element
run.safetensors             buffers of the model and tensors of callbacks, if there are any
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megapd.errors import UserError
from megapd.files import sealed, unsealed, write_atomic
from megapd.training.state import pieces as layout
from megapd.world import World

FORMAT = "megapd-state/1"
INDEX = "state.json"
EXTRA = "run.safetensors"
WEIGHT = "weight"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def write_state(folder: Path, engine: Any, learner: nn.Module, world: World, carried: Mapping[str, Any]) -> None:
    """What `read_state` takes. A collective; rank 0 writes the index last.

    engine: DeepSpeed's. carried: JSON and tensors, equal on all ranks; UserError for anything else.
    """
    extra: dict[str, Tensor] = {f"buffer {name}": buffer for name, buffer in _buffers(learner).items()}
    tree = _encode(carried, "", extra)
    optimizer = layout.torch_optimizer(engine)
    mine = layout.pieces(engine, learner, world.rank)
    if engine.zero_optimization_stage() == 0:  # whole on every rank
        mine = mine[world.rank :: world.size]
    tensors: dict[str, Tensor] = {}
    slices = []
    for piece in mine:
        kept = {WEIGHT: piece.flat, **layout.moments(optimizer, piece.flat)}
        tensors |= {f"{key} {piece.start} {piece.name}": piece.of(tensor).cpu() for key, tensor in kept.items()}
        updates = layout.updates(optimizer, piece.flat)
        slices.append((piece.name, piece.shape, [piece.start, piece.count, world.rank, updates, list(kept)[1:]]))
    save_file(tensors, folder / _file(world.rank))
    parameters: dict[str, dict[str, Any]] = {}
    for name, shape, entry in (found for rank in world.gather(slices) for found in rank):
        parameters.setdefault(name, {"shape": shape, "slices": []})["slices"].append(entry)
    if world.rank == 0:
        if extra:
            save_file({name: tensor.contiguous().cpu() for name, tensor in extra.items()}, folder / EXTRA)
        counters = {key: getattr(engine, key) for key in COUNTERS}
        index = {"format": FORMAT, "parameters": parameters, "counters": counters, "scaler": layout.scaler(engine), "run": tree}
        write_atomic(folder / INDEX, sealed(index))
    world.barrier()


def read_state(folder: Path, engine: Any, learner: nn.Module, world: World) -> dict[str, Any]:
    """Give the engine what `write_state` took of another, of the same parameters; returns what was carried. A collective."""
    with StateReader(folder) as state:
        optimizer = layout.torch_optimizer(engine)
        mine = layout.pieces(engine, learner, world.rank)
        shapes = {piece.name: piece.shape for piece in mine}
        for name, shape in shapes.items():
            if state.shape(name) != shape:
                raise UserError(f"{folder}: {name} has shape {state.shape(name)} there and {shape} in this run's model")
        flats = {id(piece.flat): [other for other in mine if other.flat is piece.flat] for piece in mine}
        for group in flats.values():
            flat = group[0].flat
            keys = sorted({key for piece in group for key in state.moments(piece.name)})
            steps = [step for piece in group if (step := state.updates(piece.name)) is not None]
            into = {WEIGHT: flat.data, **layout.set_moments(optimizer, flat, keys, max(steps, default=None))}
            for piece in group:
                for key in (WEIGHT, *state.moments(piece.name)):
                    piece.of(into[key]).copy_(state.read(key, piece.name, piece.start, piece.count))
        if engine.zero_optimization_stage() == 3:
            layout.refresh_stage3(engine.optimizer)
        else:
            for name, parameter in learner.named_parameters():
                parameter.data.copy_(state.weight(name))
        for name, buffer in _buffers(learner).items():
            buffer.copy_(state.extra(f"buffer {name}"))
        layout.set_scaler(engine, state.index["scaler"])
        for key, value in state.index["counters"].items():
            setattr(engine, key, value)
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()  # of this start's ranks
        return state.carried()


def holds_state(folder: Path) -> bool:
    """Whether a whole checkpoint is one of `write_state`; else DeepSpeed wrote it."""
    return (folder / INDEX).exists()


class StateReader:
    """The state in a checkpoint's folder, whose digests were checked. Tensors are read from the disk when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """UserError if its index is damaged."""
        self.folder = folder
        self._opened, self._files = ExitStack(), {}  # type: ignore[var-annotated]
        try:
            self.index = unsealed((folder / INDEX).read_text())
            if self.index["format"] != FORMAT:
                raise ValueError(f"its format is {self.index['format']!r}, this megapd reads {FORMAT!r}")
            self._parameters = {name: (tuple(p["shape"]), sorted(p["slices"])) for name, p in self.index["parameters"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / INDEX}: damaged ({error}); remove {folder}, and an older checkpoint is taken") from error

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        self._files.clear()

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """UserError if the parameter is not there."""
        if name not in self._parameters:
            raise UserError(f"{self.folder}: it has no parameter {name}, which this run's model has")
        return self._parameters[name][0]

    def moments(self, name: str) -> list[str]:
        """What the optimizer kept an element of the parameter."""
        return list(self._parameters[name][1][0][4])

    def updates(self, name: str) -> float | None:
        found: float | None = self._parameters[name][1][0][3]
        return found

    def read(self, key: str, name: str, start: int, count: int) -> Tensor:
        """Elements start ... start + count of the flattened parameter, or of a moment of it. [count] fp32, on the CPU"""
        parts = []
        for first, length, rank, *_ in self._parameters[name][1]:
            begin, end = max(start, first), min(start + count, first + length)
            if begin < end:
                parts.append(self._slice(_file(rank), f"{key} {first} {name}", begin - first, end - first))
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        assert found.numel() == count, f"{name}: {found.numel()} of {count} elements"
        return found

    def weight(self, name: str) -> Tensor:
        """The whole parameter, fp32, on the CPU."""
        shape = self.shape(name)
        return self.read(WEIGHT, name, 0, math.prod(shape)).view(shape)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._parameters:
            yield name, self.weight(name)

    def extra(self, name: str) -> Tensor:
        """A buffer, or a tensor of what was carried."""
        found: Tensor = self._file(EXTRA).get_tensor(name)
        return found

    def carried(self) -> dict[str, Any]:
        """What `write_state` was given, tuples as lists."""
        found: dict[str, Any] = self._decode(self.index["run"])
        return found

    def _slice(self, file: str, key: str, begin: int, end: int) -> Tensor:
        found: Tensor = self._file(file).get_slice(key)[begin:end]
        return found

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = self._opened.enter_context(safe_open(self.folder / name, "pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / name}: {error}; remove {self.folder}, and an older one is taken") from error
        return self._files[name]

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        return self.extra(value["$tensor"]) if "$tensor" in value else {key: self._decode(entry) for key, entry in value.items()}


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of `value`, its tensors put into `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensors[f"carried {path}"] = value.detach()
        return {"$tensor": f"carried {path}"}
    if isinstance(value, (list, tuple)):
        return [_encode(entry, f"{path}[{index}]", tensors) for index, entry in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _encode(entry, f"{path}.{key}".lstrip("."), tensors) for key, entry in value.items()}
    what = f"{path} is of {type(value).__name__}" if not isinstance(value, Mapping) else f"{path} has a key that is no text"
    raise UserError(f"training.callbacks: {what}; a checkpoint carries numbers, text, tensors, lists and dictionaries of them")


def _buffers(learner: nn.Module) -> dict[str, Tensor]:
    """Those that belong to the model's state."""
    found = {}
    for prefix, module in learner.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}".lstrip(".")] = buffer
    return found


def _file(rank: int) -> str:
    return f"rank_{rank:05}.safetensors"

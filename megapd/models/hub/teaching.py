"""Published models of megapd's own architectures as teachers: the model is megapd's, as its own trajectories' are, so that an
exported student teaches bitwise what it taught before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megapd.config import ModelConfig
from megapd.errors import UserError
from megapd.models.hub.folder import described, linked
from megapd.models.hub.layout import Layout
from megapd.models.sharding import whole_shape
from megapd.slices import Part, take


class OwnArchitecture(NamedTuple):
    """How a published model is one of megapd's: layout of its files, configuration, and sizes as build_model takes them."""

    layout: Layout
    section: ModelConfig
    sizes: dict[str, int]


def own_architecture(config_json: Mapping[str, Any], path: Path) -> OwnArchitecture | None:
    """None: transformers has to build it, for megapd has not the architecture, or not one of its options."""
    if "quantization_config" in config_json:
        return None
    try:
        layout, section, vocab_size = described(config_json, path)
    except UserError:
        return None  # whatever it is, transformers says whether it can be built
    length = getattr(section, "max_length", None)
    if not isinstance(length, int):
        return None
    return OwnArchitecture(layout, section, {"vocab_size": vocab_size, "classes": vocab_size, "length": length})


def read_own(own: OwnArchitecture, folder: Path, model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The parts of the folder's tensors under the names of the model's parameters; UserError where the files do not fit.

    Where a parameter is one of their tensors as it is, only what the part needs is read.
    """
    shapes = {name: whole_shape(parameter) for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for link, source in linked(own.layout, own.section, folder, shapes, {}):
        if link.pick is None and link.into is None:
            found[link.ours] = take(source, parts[link.ours])
            continue
        tensor = take(source, None)
        if link.ours not in whole:
            whole[link.ours] = torch.empty(shapes[link.ours], dtype=tensor.dtype)
        link.own(whole).copy_(tensor if link.pick is None else link.pick(tensor))
    return found | {name: take(tensor, parts[name]) for name, tensor in whole.items()}

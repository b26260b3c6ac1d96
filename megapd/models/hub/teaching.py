"""Published models of megapd's own architectures as teachers: the model is megapd's, as its own trajectories' are, so that an
exported student teaches bitwise what it taught before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megapd.errors import UserError
from megapd.models.hub.folder import OwnArchitecture, described, linked
from megapd.models.sharding import whole_shape
from megapd.slices import Part, take


def own_architecture(config_json: Mapping[str, Any], path: Path) -> OwnArchitecture | None:
    """None: transformers has to build it, for megapd has not the architecture, or not one of its options."""
    if "quantization_config" in config_json:
        return None
    try:
        return described(config_json, path)
    except UserError:
        return None  # whatever it is, transformers says whether it can be built


def read_own(own: OwnArchitecture, folder: Path, model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The parts of the folder's tensors under the names of the model's parameters; UserError where the files do not fit.

    Where a parameter is one of their tensors as it is, only what the part needs is read.
    """
    shapes = {name: whole_shape(parameter) for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for link, source in linked(own, folder, shapes):
        if link.pick is None and link.into is None:
            found[link.ours] = take(source, parts[link.ours])
            continue
        tensor = take(source, None)
        if link.ours not in whole:
            whole[link.ours] = torch.empty(shapes[link.ours], dtype=tensor.dtype)
        link.own(whole).copy_(tensor if link.pick is None else link.pick(tensor))
    return found | {name: take(tensor, parts[name]) for name, tensor in whole.items()}

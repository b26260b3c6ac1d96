"""Whole tensors into a learner, in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megapd.errors import UserError
from megapd.models.build import Learner


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

"""Weights that torch.save wrote, read without running code from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megapd.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors in a .bin file by name, on the host, mapped into memory where the file's format allows.

    Raises UserError for a file that cannot be read so, or that holds anything else than tensors under names.
    """
    import torch

    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            found = torch.load(path, map_location="cpu", weights_only=True)  # torch's format before 1.6 cannot be mapped
    except Exception as error:  # the readers of its two formats check nothing: junk ends in errors of any type
        raise UserError(f"{path}: damaged, or no weights file: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: it holds a {type(found).__name__}, not tensors by name; save the model with save_pretrained")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            what = f"{name!r} in it is a {type(value).__name__}, not a tensor under a name"
            raise UserError(f"{path}: {what}; save the weights alone, with save_pretrained")
    return found

"""A teacher's model from its checkpoint's own description: megapd's architectures, or one of transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from megapd.batch import Batch
from megapd.config import ModelConfig
from megapd.errors import UserError
from megapd.models.build import build_model
from megapd.models.hub.folder import OwnArchitecture
from megapd.models.hub.teaching import own_architecture, read_own
from megapd.models.pretrained import Pretrained, build_pretrained, check_head, logit_form, max_length, read_pretrained
from megapd.models.sharding import allocate
from megapd.rng import Stream, integers
from megapd.slices import Part
from megapd.trajectory import Checkpoint
from megapd_kernels import LossOptions

HUGGING_FACE = "hugging_face"  # in a checkpoint's config: the config.json of a model of transformers
CANARY_SAMPLES, CANARY_TOKENS = 2, 32


class Shape(NamedTuple):
    """classes and width of the head, token ids below vocab_size, tokens a sample at most (None: no limit)."""

    classes: int
    width: int
    vocab_size: int
    length: int | None


def checkpoint_shape(checkpoint: Checkpoint) -> Shape:
    """What the checkpoint's description says of its sizes; UserError if it has none."""
    if HUGGING_FACE in checkpoint.config:
        settings = checkpoint.config[HUGGING_FACE]
        width = settings.get("hidden_size", settings.get("n_embd"))
        length = max_length(settings)
        if not isinstance(width, int) or not isinstance(settings.get("vocab_size"), int):
            raise UserError(f"{checkpoint.path / 'config.json'}: it gives no vocab_size or hidden_size; choose another model")
        return Shape(settings["vocab_size"], width, settings["vocab_size"], length)
    model, shapes = _described(checkpoint)
    return Shape(shapes["classes"], model.head_width, shapes["vocab_size"], shapes["length"])


def model_section(checkpoint: Checkpoint) -> ModelConfig | None:
    """megapd's configuration of the checkpoint's model; None: an architecture that only transformers has."""
    if HUGGING_FACE not in checkpoint.config:
        return _described(checkpoint)[0]
    own = _own(checkpoint)
    return None if own is None else own.section


def teacher_logit_form(checkpoint: Checkpoint) -> tuple[float, float | None]:
    """(scale, soft cap) of the logits that its head gives, which the student's loss applies: see LossOptions."""
    if HUGGING_FACE not in checkpoint.config or _own(checkpoint) is not None:
        return 1.0, None  # megapd's own architectures have neither
    return logit_form(checkpoint.config[HUGGING_FACE])


def build_teacher(checkpoint: Checkpoint, chunk_bytes: int | None) -> nn.Module:
    """A model of the checkpoint's architecture in fp32, its weights yet to be loaded: one of transformers' on the meta device,
    where megapd has not the architecture itself.

    It takes a Batch and mode "hidden", and its head has weight [V, D] and bias [V] or None. Raises UserError if the checkpoint
    does not describe a model that can be built.
    """
    options = LossOptions(chunk_bytes=chunk_bytes)
    if HUGGING_FACE in checkpoint.config:
        if (own := _own(checkpoint)) is not None:
            return build_model(own.section, **own.sizes, options=options, seed=0)
        return build_pretrained(checkpoint.config[HUGGING_FACE], torch.float32, torch.device("meta"))
    model, shapes = _described(checkpoint)
    return build_model(model, **shapes, options=options, seed=0)


def read_parts(trajectory: Any, checkpoint: Checkpoint, model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The parts of the checkpoint's tensors under the names of the model's parameters."""
    if HUGGING_FACE in checkpoint.config:
        if (own := _own(checkpoint)) is not None:
            return read_own(own, checkpoint.path, model, parts)
        return read_pretrained(model, checkpoint.path, parts)
    tensors: dict[str, Tensor] = trajectory.read(checkpoint.step, parts)
    return tensors


@torch.no_grad()
def load_teacher(trajectory: Any, checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's model whole on the host in fp32, for a look at it; one that teaches is held by megapd.teacher.engine."""
    model = allocate(build_teacher(checkpoint, None), torch.device("cpu")).requires_grad_(False).eval()
    own = dict(model.named_parameters())
    tensors = read_parts(trajectory, checkpoint, model, dict.fromkeys(own))
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(f"{checkpoint.path}: {name} has shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])
    return model


def check_architecture(model: nn.Module, batch: Batch) -> None:
    """That the model's logits are those of its head, which is all that megapd computes; on all ranks that share it at once."""
    if isinstance(model, Pretrained):
        check_head(model, batch)


def canary(checkpoint: Checkpoint) -> Batch:
    """A small batch of fixed pseudo-random ids with every position labelled, for tests of a teacher."""
    shape = checkpoint_shape(checkpoint)
    # What reads no sequences takes samples of its own length alone, one label each.
    whole = HUGGING_FACE not in checkpoint.config and _described(checkpoint)[0].causal is None
    length = (shape.length or CANARY_TOKENS) if whole else min(CANARY_TOKENS, shape.length or CANARY_TOKENS)
    ids = torch.from_numpy(integers(0, Stream.CANARY, torch.arange(CANARY_SAMPLES * length).numpy(), shape.vocab_size))
    positions = torch.arange(length - 1, ids.numel(), length) if whole else torch.arange(ids.numel())
    return Batch(
        ids=ids.view(CANARY_SAMPLES, length),
        segments=None,
        positions=positions,
        labels=torch.zeros_like(positions),
        sample_ids=torch.arange(CANARY_SAMPLES),
    )


def _own(checkpoint: Checkpoint) -> OwnArchitecture | None:
    return own_architecture(checkpoint.config[HUGGING_FACE], checkpoint.path / "config.json")


def _described(checkpoint: Checkpoint) -> tuple[ModelConfig, dict[str, int]]:
    """Its model, and vocab_size, classes and length."""
    meta = checkpoint.path / "meta.json"
    try:
        model = TypeAdapter[ModelConfig](ModelConfig).validate_python(checkpoint.config["model"])
        shapes = {key: checkpoint.config["shapes"].get(key) for key in ("vocab_size", "classes", "length")}
    except (AttributeError, KeyError, ValidationError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{meta}: no usable model configuration: {what}") from error
    for key, size in shapes.items():
        if not isinstance(size, int):
            raise UserError(f"{meta}: no usable model configuration: shapes.{key} is missing")
    return model, shapes

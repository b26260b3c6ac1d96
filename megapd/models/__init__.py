"""The models: bodies, heads with their loss, and how they are built, read, written and sharded."""

from megapd.models.build import Body, Learner, LossHead, Parts, build_model, parameter_count
from megapd.models.from_checkpoint import (
    HUGGING_FACE,
    Shape,
    build_teacher,
    canary,
    check_architecture,
    checkpoint_shape,
    read_parts,
)
from megapd.models.hub import load_hugging_face, save_hugging_face
from megapd.models.mlp import MLP
from megapd.models.transformer import Transformer
from megapd.models.weights import copy_weights

__all__ = [
    "HUGGING_FACE",
    "MLP",
    "Body",
    "Learner",
    "LossHead",
    "Parts",
    "Shape",
    "Transformer",
    "build_model",
    "build_teacher",
    "canary",
    "check_architecture",
    "checkpoint_shape",
    "copy_weights",
    "load_hugging_face",
    "parameter_count",
    "read_parts",
    "save_hugging_face",
]

"""The models: bodies, heads with their loss, and how they are built, read and written."""

from megapd.models.body import Body, Parts
from megapd.models.build import Learner, ParameterCount, build_model, init_weights, parameter_count
from megapd.models.heads import LossHead
from megapd.models.hub import load_hugging_face, save_hugging_face
from megapd.models.mlp import MLP
from megapd.models.transformer import MaskedTransform, Transformer, document_mask

__all__ = [
    "MLP",
    "Body",
    "Learner",
    "LossHead",
    "MaskedTransform",
    "ParameterCount",
    "Parts",
    "Transformer",
    "build_model",
    "document_mask",
    "init_weights",
    "load_hugging_face",
    "parameter_count",
    "save_hugging_face",
]

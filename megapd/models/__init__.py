"""The models: bodies, heads with their loss, and how they are built, read and written."""

from megapd.models.build import Learner, ParameterCount, build_model, flops_per_token, init_weights, parameter_count
from megapd.models.heads import LossHead
from megapd.models.hub import load_hugging_face, save_hugging_face
from megapd.models.mlp import MLP
from megapd.models.transformer import MaskedTransform, Transformer, document_mask

__all__ = [
    "MLP",
    "Learner",
    "LossHead",
    "MaskedTransform",
    "ParameterCount",
    "Transformer",
    "build_model",
    "document_mask",
    "flops_per_token",
    "init_weights",
    "load_hugging_face",
    "parameter_count",
    "save_hugging_face",
]

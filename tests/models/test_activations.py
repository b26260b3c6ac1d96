"""What a family says that a layer keeps for backward, held against what torch keeps."""

from __future__ import annotations

import pytest
import torch

from megapd.config import LlamaConfig, ModernBertConfig, TransformerConfig
from megapd.models import build_model
from megapd_kernels import LossOptions

LENGTH, SAMPLES = 64, 2
NEOX = {"mlp": "gelu", "norm": "layer", "biases": True}
SECTIONS = {
    "gpt": (TransformerConfig, {"kind": "gpt"}),
    "bert": (TransformerConfig, {"kind": "bert"}),
    "llama": (LlamaConfig, {}),
    "llama shared keys": (LlamaConfig, {"kv_heads": 1}),
    "qwen3": (LlamaConfig, {"kv_heads": 1, "qk_norm": "head"}),
    "olmo2": (LlamaConfig, {"kv_heads": 2, "qk_norm": "whole", "norm_place": "after"}),
    "neox": (LlamaConfig, {**NEOX, "parallel": True, "rotary_share": 0.25}),
    "modernbert": (ModernBertConfig, {"local_window": 128}),
}


def section(name, layers, **changes):
    kind, options = SECTIONS[name]
    return kind(**{"layers": layers, "hidden": 64, "heads": 4, "ffn": 192, **options, **changes})


def kept(config):
    """Values a sample that autograd keeps of the body's forward beside parameters, each tensor's memory once."""
    learner = build_model(config, vocab_size=100, classes=100, length=LENGTH, options=LossOptions(), seed=0)
    own = {parameter.untyped_storage().data_ptr() for parameter in learner.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learner.body(torch.zeros(SAMPLES, LENGTH, dtype=torch.int64))
    return sum(size for size, _ in seen.values()) / 4 / SAMPLES


@pytest.mark.parametrize("name", SECTIONS)
def test_a_layer_keeps_what_it_says(name):
    """But for a few numbers a token: norms' and softmaxes' own."""
    found = (kept(section(name, 5)) - kept(section(name, 2))) / 3
    said = (section(name, 5).activations(LENGTH) - section(name, 2).activations(LENGTH)) / 3
    assert said <= found <= 1.02 * said


@pytest.mark.parametrize("name", SECTIONS)
def test_with_checkpointing_a_layer_keeps_its_input(name):
    found = (kept(section(name, 5, activation_checkpointing=True)) - kept(section(name, 2, activation_checkpointing=True))) / 3
    assert found == LENGTH * 64
    one, several = (section(name, layers, activation_checkpointing=True).activations(LENGTH) for layers in (1, 4))
    assert several - one == 3 * found
    assert one - found == section(name, 1).activations(LENGTH)

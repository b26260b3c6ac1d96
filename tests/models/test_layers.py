"""Layers whose weights collect a gradient from every token, in half precision on a CPU."""

import pytest
import torch
from torch import nn

from megapd.models.layers import Embedding, LayerNorm

TOKENS, WIDTH, ROWS = 40_000, 16, 20


@pytest.fixture(scope="module")
def gradient():
    """Of the result [TOKENS, WIDTH], with a mean that is not 0, as in training."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.1


def relative(found, exact):
    return float((found.float() - exact).norm() / exact.norm())


def gradients(layer, given, gradient, dtype):
    layer = layer.to(dtype)
    layer.zero_grad()
    result = layer(given if given.dtype == torch.int64 else given.to(dtype))
    assert result.dtype == dtype
    result.backward(gradient.to(dtype))
    return [parameter.grad.float() for parameter in layer.parameters()]


def test_a_norm_sums_over_tokens_in_fp32(gradient):
    given = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    exact, found, native = (
        gradients(layer(WIDTH), given, gradient, dtype)
        for layer, dtype in ((LayerNorm, torch.float32), (LayerNorm, torch.bfloat16), (nn.LayerNorm, torch.bfloat16))
    )
    assert max(map(relative, found, exact)) < 0.006
    assert min(map(relative, native, exact)) > 0.05  # else torch does it itself, and the layer can go


def test_an_embedding_sums_over_tokens_in_fp32(gradient):
    ids = torch.randint(ROWS, (TOKENS,), generator=torch.Generator().manual_seed(1))
    exact, found, native = (
        gradients(layer(ROWS, WIDTH), ids, gradient, dtype)[0]
        for layer, dtype in ((Embedding, torch.float32), (Embedding, torch.bfloat16), (nn.Embedding, torch.bfloat16))
    )
    assert relative(found, exact) < 0.006
    assert relative(native, exact) > 0.02


def test_values_are_those_of_torch():
    table, norm = Embedding(ROWS, WIDTH).bfloat16(), LayerNorm(WIDTH).bfloat16()
    hidden = table(torch.arange(ROWS))
    assert torch.equal(hidden, table.weight)
    with torch.no_grad():
        assert torch.equal(table(torch.arange(ROWS)), hidden)
        plain = nn.functional.layer_norm(hidden.float(), (WIDTH,)).bfloat16()
        assert torch.equal(norm(hidden), plain)
    assert torch.equal(LayerNorm(WIDTH)(hidden.float()), nn.LayerNorm(WIDTH)(hidden.float()))

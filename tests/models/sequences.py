"""What the tests of the model families share: weights that disagree, batches of ids with every position labelled."""

from __future__ import annotations

import torch

from megapd.batch import Batch

# Of rows of 12 or 14 tokens: where documents begin.
STARTS = ((0, 5), (0,), (0, 3, 7))


@torch.no_grad()
def spread(model, seed):
    """Add to every parameter, so that no bias or norm is at its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def documents(length):
    """Segments [3, length]."""
    return torch.tensor([[sum(start <= place for start in row) - 1 for place in range(length)] for row in STARTS])


def everywhere(ids, segments=None):
    return Batch(ids, segments, torch.arange(ids.numel()), ids.flatten(), torch.arange(len(ids)))


def logits(learner, ids, segments=None):
    with torch.no_grad():
        return learner(everywhere(ids, segments), mode="logits").view(*ids.shape, -1)


def gradients(learner, ids, segments):
    """The loss, and the gradient of each parameter."""
    loss, _ = learner(everywhere(ids, segments))
    loss.backward()
    return [loss.detach(), *(p.grad for p in learner.parameters())]


def assert_documents_alone(learner, ids, segments, tolerance):
    """Each document of a packed row is what it is in a row of its own."""
    packed = logits(learner, ids, segments)
    for row, (own, numbers) in enumerate(zip(ids, segments, strict=True)):
        for document in numbers.unique():
            alone = logits(learner, own[numbers == document][None])
            torch.testing.assert_close(packed[row][numbers == document], alone[0], atol=tolerance, rtol=tolerance)


def assert_same(found, wanted):
    """Gradients of two learners, bitwise, and none of them missing or zero."""
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in found)

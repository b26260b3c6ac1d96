"""Small trajectories for the tests."""

from pathlib import Path

import torch

from megapd.trajectory import Checkpoint
from megapd.trajectory.writer import write_checkpoint


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(11, 6, generator=generator),
        "block.weight": torch.randn(6, 6, generator=generator).to(torch.bfloat16),
        "block.bias": torch.randn(6, generator=generator).to(torch.float16),
        "head.weight": torch.randn(11, 6, generator=generator, dtype=torch.float64),
        "scale": torch.randn((), generator=generator),
    }


def write(folder: Path, step: int, tensors=None, **changes) -> Checkpoint:
    settings = {"config": {"name": "t"}, "vocabulary": "v1", "metrics": {"loss": 0.5}, "shard_bytes": 1 << 20} | changes
    tensors = weights(step) if tensors is None else tensors
    return write_checkpoint(folder, step, tensors.items() if isinstance(tensors, dict) else tensors, **settings)

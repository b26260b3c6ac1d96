"""The row losses: statistics and gradients of logits that are in memory for a moment, in torch or Triton."""

from .base import Problem, RowLoss, best_of, default_chunk_bytes
from .choose import implementation, make_rows

__all__ = ["Problem", "RowLoss", "best_of", "default_chunk_bytes", "implementation", "make_rows"]

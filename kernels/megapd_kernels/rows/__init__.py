"""The row losses: statistics and gradients of logits that are in memory for a moment, in torch or Triton."""

"""How good a model is on what it did not learn from."""

from megapd.evaluation.held_out import check_samples, held_out

__all__ = ["check_samples", "held_out"]

"""How good a model is on data that it does not learn from."""

from megapd.evaluation.heldout import held_out

__all__ = ["held_out"]

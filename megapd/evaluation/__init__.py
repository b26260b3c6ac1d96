"""How good a model is on what it did not learn from: held-out loss, downstream tasks."""

from megapd.evaluation.downstream import DownstreamTask, label_logprobs, open_downstream
from megapd.evaluation.held_out import check_samples, held_out

__all__ = ["DownstreamTask", "check_samples", "held_out", "label_logprobs", "open_downstream"]

"""Tensor parallelism for inference: a built model is changed from outside, so that every rank holds a part of its matrices."""

from megapd.models.sharding.layers import sum_over_ranks
from megapd.models.sharding.plans import PLANS, Style, plan_for, plan_of
from megapd.models.sharding.split import allocate, shard, vocabulary_shard, whole_shape

__all__ = ["PLANS", "Style", "allocate", "plan_for", "plan_of", "shard", "sum_over_ranks", "vocabulary_shard", "whole_shape"]

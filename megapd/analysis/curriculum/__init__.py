"""Curriculum metrics: what a teacher's checkpoints have learnt, measured one after the other."""

from megapd.analysis.curriculum.metric import Metric as Metric
from megapd.analysis.curriculum.metric import Model as Model
from megapd.analysis.curriculum.walk import analyse as analyse
from megapd.analysis.curriculum.walk import metrics_of as metrics_of

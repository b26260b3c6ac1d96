import itertools
import math

import pytest

from megapd.config import LearningRateConfig
from megapd.training.learning_rate import learning_rate


def curve(steps, **settings):
    return [learning_rate(LearningRateConfig(**settings), 2.0, step, steps) for step in range(steps)]


def test_constant_with_warmup():
    assert curve(8, kind="constant", warmup=3) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_linear_ends_at_final():
    rates = curve(11, kind="linear", final=0.1)
    assert rates[0] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    differences = [a - b for a, b in itertools.pairwise(rates)]
    assert differences == pytest.approx([0.18] * 10)


def test_cosine_is_half_way_in_the_middle():
    rates = curve(101, kind="cosine", warmup=0.0)
    assert rates[50] == pytest.approx(1.0)
    assert rates[25] == pytest.approx(1.0 + math.cos(math.pi / 4))
    assert rates[-1] == pytest.approx(0.0)


def test_warmup_as_a_share_of_the_run():
    assert curve(100, kind="cosine", warmup=0.06) == curve(100, kind="cosine", warmup=6)


def test_wsd_is_stable_then_decays():
    rates = curve(20, kind="wsd", warmup=4, decay=5)
    assert rates[4:16] == [2.0] * 12
    assert rates[16] == pytest.approx(1.5)
    assert rates[-1] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(rates[15:]))

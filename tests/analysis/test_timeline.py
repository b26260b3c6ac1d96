import re

from megapd.analysis.timeline import FIRST, SHOWN, describe_plan
from megapd.config import EqualConfig, MatchedConfig, OneShotConfig
from megapd.schedule.policies import build_plan


def rows(text: str) -> list[tuple[int, int, int, int]]:
    """(rotation, first student step, student steps, teacher step) of each row shown."""
    found = re.findall(r"^ *(\d+) +([\d,]+)(?: - [\d,]+)? +([\d,]+) +([\d,]+)$", text, re.M)
    return [tuple(int(cell.replace(",", "")) for cell in row) for row in found]


def test_every_rotation_of_a_short_plan():
    plan = build_plan(EqualConfig(checkpoints=4, steps=1000), available=range(2500, 10_001, 2500), steps=12_000)
    text = describe_plan(plan)
    assert text.splitlines()[0] == "schedule equal: 4 checkpoints over 12,000 student steps"
    assert "1,000 - 1,999" in text
    assert rows(text) == [(0, 0, 1000, 2500), (1, 1000, 1000, 5000), (2, 2000, 1000, 7500), (3, 3000, 9000, 10_000)]
    assert "warning" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_one_checkpoint():
    assert rows(describe_plan(build_plan(OneShotConfig(), available=[7], steps=1))) == [(0, 0, 1, 7)]


def test_the_middle_of_a_long_plan_is_left_out():
    plan = build_plan(MatchedConfig(refresh=10), available=range(10, 10_001, 10), steps=10_000)
    text = describe_plan(plan)
    assert len(plan.rotations()) == 1000
    expected = [(i, 10 * i, 10, 10 * (i + 1)) for i in range(1000)]
    assert rows(text) == expected[:FIRST] + expected[FIRST - SHOWN :]
    assert "976 more" in text


def test_a_plan_just_too_long_hides_no_single_row():
    plan = build_plan(MatchedConfig(refresh=1), available=range(1, SHOWN + 2), steps=SHOWN + 1)
    assert len(rows(describe_plan(plan))) == SHOWN + 1


def test_warnings_follow_the_table():
    plan = build_plan(MatchedConfig(refresh=10), available=[10, 20, 30], steps=20)
    assert describe_plan(plan).splitlines()[-1] == f"warning: {plan.warnings[0]}"

"""Schedules that grow by decisions: when the student saturates, the next checkpoint follows.

`decide` is the rule of the paper's authors for parity (arXiv 2410.05464), stated for any metric: advance when the metric gained
less than 0.01 over the mean of the last 5 reports, and more than 0.01 since the last advance (else the student is still on its
first plateau, from which the present checkpoint may yet take it), or after max_dwell steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from megapd.config import AdaptiveConfig
from megapd.errors import UserError
from megapd.schedule.plan import Decision, Report


def decide(
    settings: AdaptiveConfig, candidates: Sequence[int], reports: Sequence[Report], decisions: Sequence[Decision], now: int
) -> Decision | None:
    """The decision that the newest report calls for, None if none. Pure.

    candidates   increasing teacher steps; the run begins with the first
    reports      in order of their steps, all of the run
    decisions    all of the run so far
    now          student steps that the run has done: those of the newest report, or more where it came late

    The present checkpoint's dwell begins at its effective step; while that lies ahead nothing is decided. Of the reports after
    it, the k-th is saturated if it gained less than settings.gain over the mean of the settings.window ones before it. A gain is
    a rise of the accuracy, a fall of the divergence. The progress asked for is measured from the last report before the dwell,
    of a divergence from the first one in it: the one before was measured against another teacher.
    """
    start = decisions[-1].effective if decisions else 0
    current = decisions[-1].checkpoint if decisions else candidates[0]
    place = bisect_right(candidates, current)
    dwell = [report for report in reports if report.step > start]
    if place == len(candidates) or not dwell:
        return None
    latest = dwell[-1]
    taught = latest.step - start
    if taught < settings.min_dwell:
        return None
    sign = 1.0 if settings.metric == "accuracy" else -1.0
    evidence: dict[str, Any] = {"metric": settings.metric, "value": latest.value, "from": current, "dwell": taught}

    def decision(reason: str) -> Decision:
        return Decision(len(decisions), latest.step, now + settings.lead, candidates[place], reason, evidence)

    if len(dwell) >= settings.window + settings.patience:
        gains = []
        for k in range(len(dwell) - settings.patience, len(dwell)):
            before = dwell[k - settings.window : k]
            gains.append(sign * (dwell[k].value - math.fsum(report.value for report in before) / settings.window))
        reference = dwell[0]
        if settings.metric == "accuracy":
            reference = next((report for report in reversed(reports) if report.step <= start), reference)
        progress = sign * (latest.value - reference.value)
        evidence |= {"gains": gains, "progress": progress}
        if max(gains) < settings.gain and (settings.progress == 0 or progress > settings.progress):
            return decision("saturated")
    if settings.max_dwell is not None and taught >= settings.max_dwell:
        return decision("max_dwell")
    return None


def reported_kind(settings: AdaptiveConfig) -> str:
    """The kind of metrics line that carries settings.metric as `decide` means it."""
    return "eval" if settings.metric == "accuracy" else "train"


def check_lead(settings: AdaptiveConfig, ahead: int) -> None:
    """UserError unless a decision takes effect later than the steps that ranks ask for `ahead` of the present one."""
    if settings.lead <= ahead:
        raise UserError(
            f"schedule.lead: {settings.lead} student steps, but signals are asked for {ahead} steps ahead (training.prefetch, "
            f"teacher.depth); raise it above that"
        )

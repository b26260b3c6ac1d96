"""The Triton kernels compiled offline, in the types of the linear losses: nothing spills. `make kernels-report` has all types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPORT = Path(__file__).parents[2] / "benchmarks" / "kernels_report.py"


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(REPORT), *arguments], env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_nothing_spills() -> None:
    done = report("--match", r"(all|cross entropy).* fp32 bf16", "--targets", "sm_90", "gfx942")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "_rows" in line]
    # 9 divergences, JSD near its ends, a weighted sum and the student's kernel, bare and with everything, for two targets.
    assert len(lines) == (9 + 2 + 1) * 2 * 2
    registers = [int(line.split()[-3]) for line in lines if "sm_" in line]
    assert len(registers) == (9 + 2 + 1) * 2
    assert all(16 <= count <= 128 for count in registers)


def test_the_gate_can_fail() -> None:
    done = report("--match", r"jsd all fp32 bf16", "--targets", "sm_90", "--registers", "32")
    assert done.returncode == 1
    assert "1 of 1 spill or do not compile" in done.stdout

"""python -m megapd_kernels.benchmark: its numbers, its files, what it refuses, and a contestant that fails."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megapd_kernels.benchmark import __main__ as benchmark
from megapd_kernels.benchmark import contestants, measure
from megapd_kernels.benchmark.measure import Case

QUICK = ["--shapes", "16x256x4x8", "--rounds", "2", "--peers", "megapd", "torch", "--device", "cpu"]
SMALL = Case("linear_softmax_kl", "jsd", 16, 64, 4, 8, "float32", "cpu")


def rows(tmp_path: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    code = benchmark.main([*QUICK, "--no-memory", "--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv"), *more])
    found = json.loads((tmp_path / "a.json").read_text())
    assert {"date", "machine", "load_average", "threads", "versions"} <= set(found)
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [row["implementation"] for row in csv.DictReader(file)] == [row["implementation"] for row in found["rows"]]
    return code, found["rows"]


def test_every_operation_has_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = rows(tmp_path, "--operations", *contestants.OPERATIONS, "--divergences", "forward_kl", "jsd")
    assert code == 0
    assert {row["operation"] for row in found} == set(contestants.OPERATIONS)
    for row in found:
        assert row["status"] == "ok", row
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"])
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        # Plain torch has the rest's mass as 1 - sum, which loses digits.
        bound = 1e-5 if row["implementation"].startswith("megapd") else 1e-2
        assert row["error_loss"] < bound
        assert row["error_gradient"] < bound
        assert row["ratio"] == 1.0 or row["implementation"] != "torch"
    printed = capsys.readouterr().out
    assert "linear_softmax_kl jsd 16x256x4x8 float32 on cpu" in printed


def test_a_wrong_loss_shows_its_error() -> None:
    right = contestants.megapd("linear_softmax_kl", "jsd")
    found = measure.errors(SMALL, {"right": right, "wrong": lambda *tensors: 1.1 * right(*tensors)})
    assert max(found["right"]) < 1e-5
    assert found["wrong"] == (pytest.approx(0.1, rel=1e-3), pytest.approx(0.1, rel=1e-3))


def test_the_reference_keeps_float64() -> None:
    tensors = tuple(t.detach().double() for t in SMALL.tensors())
    assert measure.reference(SMALL)(*tensors).dtype == torch.float64
    assert contestants.plain("linear_softmax_kl", "jsd")(*tensors).dtype == torch.float32


def test_one_that_fails_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise ImportError("no such library\nsecond line")

    available = contestants.available
    monkeypatch.setattr(contestants, "available", lambda *given: {**available(*given), "torch": broken})
    code, found = rows(tmp_path)
    assert code == 0
    assert {row["implementation"]: row["status"] for row in found} == {"megapd": "ok", "torch": "ImportError: no such library"}
    assert found[0]["ratio"] is None
    assert "torch                   ImportError: no such library" in capsys.readouterr().out
    monkeypatch.setattr(contestants, "available", lambda *given: {**available(*given), "megapd": broken})
    assert rows(tmp_path)[0] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rounds", "0"], "--rounds: must be at least 1"),
        (["--shapes", "16x64"], "--shapes: expected positions x classes"),
        (["--dtypes", "int8"], "--dtypes: int8 is not one of"),
        (["--peers", "cce"], "--peers: cce is not one of"),
        (["--csv", "/nowhere/a.csv"], "there is no folder /nowhere"),
    ],
)
def test_bad_options_end_with_2(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*QUICK, *given])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_available_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in printed
    assert "linear_softmax_kl jsd: megapd, torch, megapd recompute, torch.compile, trl, trl chunked, liger chunked" in printed


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own() -> None:
    case = Case("linear_softmax_kl", "forward_kl", 512, 16384, 16, 16, "float32", "cpu")
    ours, plain = (measure.peak_bytes(case, name) for name in ("megapd", "torch"))
    whole = 512 * 16384 * 4
    assert plain > 2 * whole
    assert ours < plain
    assert math.isfinite(ours)
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        measure.peak_bytes(case, "nobody")

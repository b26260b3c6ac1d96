"""Runs over rows of several lengths: any micro-batch, signals of a cache, resumed under ZeRO; tokens counted without padding."""

from __future__ import annotations

import pytest

from megapd.cli import main
from tests.corpus import corpora
from tests.training.runs import metrics

pytestmark = pytest.mark.slow

MODELS = {
    "bert": "kind: bert",
    "modernbert": "kind: modernbert, local_window: 8",
    "gpt": "kind: gpt",
    "llama": "kind: llama, kv_heads: 1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for style in ("gpt", "bert"):
        (folder / style).mkdir()
        corpora.prepared(folder / style, style, "--corpus.packing=single")
        train(folder, "teacher_" + style, style, "--trajectory.every=2", "--seed=1", hidden=32)
    return folder


def train(folder, name, kind, *overrides, hidden=16):
    objective, style = ("clm", "gpt") if kind in ("gpt", "llama") else ("mlm", "bert")
    arguments = [
        f"--runs_dir={folder}",
        f"--name={name}",
        f"--task={{kind: text, objective: {objective}, corpus: {folder}/{style}/corpus}}",
        f"--model={{{MODELS[kind]}, layers: 2, heads: 2, hidden: {hidden}}}",
        "--training={steps: 4, global_batch: 8, micro_batch: 4}",
        "--optimizer.lr=0.01",
        "--telemetry={every: 1, wandb: disabled, progress: false}",
        "--evaluation.samples=6",
        *overrides,
    ]
    assert main(["train", *arguments]) == 0
    return metrics(folder / name)


def taught(folder, name, kind, *overrides):
    style = "gpt" if kind in ("gpt", "llama") else "bert"
    teacher = f"--teacher.trajectory={folder}/teacher_{style}/trajectory"
    return train(folder, name, kind, teacher, "--schedule={policy: matched, refresh: 2}", *overrides)


@pytest.mark.parametrize("kind", MODELS)
def test_the_micro_batch_changes_nothing(folder, kind):
    """It changes the width that rows are padded to."""
    whole, parts = (taught(folder, f"{kind}_{size}", kind, f"--training.micro_batch={size}") for size in (8, 1))
    for one, other in zip(whole, parts, strict=True):
        assert one["kind"] == other["kind"]
        if one["kind"] == "rotation":
            continue
        for name in {"loss", "cross_entropy", "divergence", "accuracy", "grad_norm"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name
        assert one.get("labelled") == other.get("labelled")
    tokens = [line["tokens"] for line in whole if line["kind"] == "train"]
    assert tokens[-1] < 4 * 8 * 32


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_signals_of_a_cache_are_the_teachers(folder, kind, tmp_path):
    cache = f"--teacher.cache={tmp_path}"
    recorded = taught(folder, f"{kind}_recorded", kind, cache)
    replayed = taught(folder, f"{kind}_replayed", kind, cache, "--teacher.carrier=cached", "--training.micro_batch=2")
    for one, other in zip(recorded, replayed, strict=True):
        assert other.get("loss", 0) == pytest.approx(one.get("loss", 0), abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_a_resumed_run_is_bitwise_the_same(folder, kind):
    whole = taught(folder, f"{kind}_whole", kind, "--training.zero_stage=2")
    taught(folder, f"{kind}_parts", kind, "--training.zero_stage=2", "--training.steps=2")
    again = taught(folder, f"{kind}_parts", kind, "--training.zero_stage=2")
    assert [line for line in again if line["kind"] == "train"] == [line for line in whole if line["kind"] == "train"]

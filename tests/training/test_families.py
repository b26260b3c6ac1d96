"""Students of each family train: the same under every ZeRO stage, bitwise when resumed, with and without documents."""

from __future__ import annotations

import pytest
import transformers

from megapd.cli import main
from tests.corpus import corpora
from tests.training.runs import metrics

pytestmark = pytest.mark.slow

FAMILIES = {
    "llama": "kv_heads: 1, tied: true",
    "modernbert": "local_window: 8",
    "neox": "mlp: gelu, norm: layer, parallel: true, biases: true, rotary_share: 0.25",
    "olmo2": "qk_norm: whole, norm_place: after, activation_checkpointing: true",
    "qwen3": "qk_norm: head, head_size: 16, restart_positions: true",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for style in ("gpt", "bert"):
        (folder / style).mkdir()
        corpora.prepared(folder / style, style)
    return folder


def train(corpus, folder, name, family, *overrides):
    kind, objective, style = ("modernbert", "mlm", "bert") if family == "modernbert" else ("llama", "clm", "gpt")
    arguments = [
        f"--runs_dir={folder}",
        f"--name={name}",
        f"--task={{kind: text, objective: {objective}, corpus: {corpus}/{style}/corpus, document_mask: true}}",
        f"--model={{kind: {kind}, layers: 2, heads: 2, hidden: 16, ffn: 24, {FAMILIES[family]}}}",
        "--training={steps: 4, global_batch: 8, micro_batch: 4}",
        "--optimizer.lr=0.01",
        "--checkpoint.every=2",
        "--telemetry={every: 1, wandb: disabled, progress: false}",
        "--evaluation.samples=4",
        *overrides,
    ]
    assert main(["train", *arguments]) == 0
    return [line for line in metrics(folder / name) if line["kind"] == "train"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_zero_stage_learns_the_same(corpus, tmp_path, family):
    lines = [train(corpus, tmp_path, f"zero{stage}", family, f"--training.zero_stage={stage}") for stage in range(4)]
    losses = [[line["loss"] for line in run] for run in lines]
    assert losses[0][0] > losses[0][-1]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_bitwise_the_same(corpus, tmp_path, family):
    whole = train(corpus, tmp_path, "whole", family)
    train(corpus, tmp_path, "parts", family, "--training.steps=2")
    assert train(corpus, tmp_path, "parts", family) == whole


def test_an_exported_modernbert_names_its_special_tokens(corpus, tmp_path):
    """transformers' own defaults are the published model's ids."""
    train(corpus, tmp_path, "run", "modernbert")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    config, tokenizer = (auto.from_pretrained(tmp_path / "out") for auto in (transformers.AutoConfig, transformers.AutoTokenizer))
    assert (config.cls_token_id, config.sep_token_id) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert None not in (config.cls_token_id, config.sep_token_id, config.pad_token_id)

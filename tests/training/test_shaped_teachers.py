"""Teachers that scale or cap their logits after the head: the student's loss does the same to them, dense or hidden."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from megapd.cli import main
from megapd.config import load
from megapd.tasks import build_task
from megapd.training import build_student
from tests.corpus import corpora

pytestmark = pytest.mark.slow

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 32}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
TEACHERS = {
    "gemma2": {"final_logit_softcapping": 1.5, "head_dim": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shaped")
    corpora.prepared(folder, "gpt")
    for kind, more in TEACHERS.items():
        torch.manual_seed(3)
        config = transformers.AutoConfig.for_model(kind, vocab_size=320, max_position_embeddings=32, **SIZES, **SPECIAL, **more)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.4)
        model.save_pretrained(folder / kind)
    return folder


def arguments(folder, kind, name, *overrides):
    return [
        f"--runs_dir={folder}",
        f"--name={name}",
        f"--task={{kind: text, objective: clm, corpus: {folder}/corpus}}",
        "--model={kind: gpt, layers: 1, hidden: 16, heads: 2}",
        f"--teacher={{trajectory: {folder}/{kind}, same_vocabulary: true}}",
        "--schedule={policy: one_shot, checkpoint: 1}",
        "--training={steps: 1, global_batch: 8}",
        "--telemetry={every: 1, wandb: disabled, progress: false}",
        "--evaluation.samples=4",
        *overrides,
    ]


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("signal", ["dense", "hidden"])
def test_the_divergence_is_from_its_own_logits(folder, kind, signal):
    overrides = arguments(folder, kind, f"{kind}-{signal}", f"--teacher.signal={signal}")
    assert main(["train", *overrides]) == 0
    lines = map(json.loads, (folder / f"{kind}-{signal}" / "metrics.jsonl").read_text().splitlines())
    (divergence,) = [line["divergence"] for line in lines if line["kind"] == "train"]
    config = load(None, overrides)
    task = build_task(config)
    batch = task.batch(0, range(8))
    teacher = transformers.AutoModelForCausalLM.from_pretrained(folder / kind).eval()
    with torch.no_grad():
        theirs = teacher(batch.ids).logits.flatten(0, 1)[batch.positions].double().log_softmax(-1)
        own = build_student(config, task)(batch, mode="logits").double().log_softmax(-1)
    wanted = (theirs.exp() * (theirs - own)).sum(-1).mean().item()
    assert divergence == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("signal", "more"), [("topk", "k: 8"), ("sampled", "k: 8")])
def test_signals_of_probabilities_are_refused(folder, capsys, signal, more):
    teacher = f"--teacher={{trajectory: {folder}/gemma2, same_vocabulary: true, signal: {signal}, {more}}}"
    assert main(["train", *arguments(folder, "gemma2", f"refused-{signal}", teacher)]) == 2
    assert f"teacher.signal: {signal} holds probabilities" in capsys.readouterr().err


def test_its_largest_class_is_not_moved(folder):
    argmax = ["--teacher.signal=argmax", "--loss.teacher_temperature=0"]
    assert main(["train", *arguments(folder, "gemma2", "argmax", *argmax)]) == 0

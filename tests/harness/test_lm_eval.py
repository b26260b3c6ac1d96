"""lm-eval runs on an exported student, with a local task, and finds what `megapd evaluate` finds.

It needs lm-eval, which make test-harness installs into an environment of its own; REQUIRE_LM_EVAL=1 makes its absence a
failure.
"""

from __future__ import annotations

import importlib.util
import json
import os
from itertools import pairwise

import pytest

from megapd.cli import main
from tests.corpus import corpora

if importlib.util.find_spec("lm_eval") is None and os.environ.get("REQUIRE_LM_EVAL") != "1":
    pytest.skip("lm-eval is not installed; make test-harness", allow_module_level=True)

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # of what lm-eval imports

TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {validation: %s}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{context}}"
doc_to_choice: "{{options}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_it_finds_what_evaluate_finds(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    corpora.prepared(tmp_path, "gpt")
    texts = [text.split("\n\n")[1][:60].strip() for text in corpora.documents(61, seed=4)]
    questions = tmp_path / "q.jsonl"
    with questions.open("w") as file:
        for i, (a, b) in enumerate(pairwise(texts)):
            options = [f" {text.strip()}" for text in (a[20:], b[5:25], b)]
            file.write(json.dumps({"context": a[:20].rstrip(), "options": options, "answer": i % 3}) + "\n")
    run = [
        f"--runs_dir={tmp_path}",
        "--name=r",
        f"--task={{kind: text, objective: clm, corpus: {tmp_path}/corpus}}",
        "--model={kind: llama, layers: 2, hidden: 32, heads: 2, ffn: 64}",
        "--training={steps: 30, global_batch: 16}",
        "--optimizer.lr=0.01",
        "--telemetry={wandb: disabled, progress: false}",
        f"--evaluation={{samples: 4, tasks: [{{path: {questions}}}]}}",
    ]
    assert main(["train", *run]) == 0
    assert main(["evaluate", str(tmp_path / "r")]) == 0
    assert main(["export", str(tmp_path / "r"), str(tmp_path / "out")]) == 0
    (own,) = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK % questions)
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    arguments = {"pretrained": str(tmp_path / "out"), "max_length": 32}
    found = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=["local"], task_manager=tasks, device="cpu", batch_size=4
    )["results"]["local"]
    assert found["acc,none"] == pytest.approx(own["q/accuracy"])
    assert found["acc_norm,none"] == pytest.approx(own["q/accuracy_norm"])

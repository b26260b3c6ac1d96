"""Teachers that transformers saved, in several revisions, teach two ranks: whole, ZeRO and tensor parallel, here and served."""

import json

import pytest
import torch
import transformers

from megapd.processes.local import free_port
from tests.corpus import corpora
from tests.forked import run_ranks
from tests.teacher.launching import Server
from tests.training.runs import metrics

pytestmark = pytest.mark.slow

STEPS, EVERY = 15, 5
SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
TEACHERS = {"gpt": "gpt_neox", "bert": "bert"}


@torch.no_grad()
def save_revisions(folder, kind):
    """step_5, step_10, step_15: weights large enough that they disagree."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=320, **SIZES)
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    for step in range(EVERY, STEPS + 1, EVERY):
        torch.manual_seed(step)
        model = auto.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.02)
        model.save_pretrained(folder / f"step_{step}")


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    runs, servers = {}, []
    try:
        for style, kind in TEACHERS.items():
            (folder / style).mkdir()
            corpora.prepared(folder / style, style)
            save_revisions(folder / kind, kind)
            common = [
                "--task.kind=text",
                f"--task.objective={'mlm' if style == 'bert' else 'clm'}",
                f"--task.corpus={folder / style / 'corpus'}",
                "--task.document_mask=true",
                f"--model={{kind: {style}, layers: 1, hidden: 16, heads: 2}}",
                f"--runs_dir={folder}",
                f"--training={{steps: {STEPS}, global_batch: 8, micro_batch: 2}}",
                "--optimizer.lr=0.01",
                "--telemetry={every: 1, wandb: disabled, progress: false}",
                "--evaluation.samples=16",
                f"--teacher.trajectory={folder / kind}/step_{{step}}",
                "--teacher.same_vocabulary=true",
                f"--schedule={{policy: matched, refresh: {EVERY}}}",
            ]
            for sharding in ("whole", "zero", "tensor"):
                name = f"{style}-{sharding}"
                runs[name] = [*common, f"--name={name}", f"--teacher.sharding={sharding}"]
            launched = ["--teacher.server.ranks=2"] if style == "gpt" else []  # one through the launcher, as in earnest
            servers.append(Server([*common, "--teacher.sharding=tensor", *launched], free_port(), None if launched else 2))
            endpoint = f"--teacher.endpoints=[{servers[-1].endpoint}]"
            runs[f"{style}-served"] = [*common, f"--name={style}-served", "--teacher.carrier=served", endpoint]
        (folder / "runs.json").write_text(json.dumps(runs))
        for server in servers:
            server.wait()
        run_ranks("tests.teacher.students_worker", [str(folder / "runs.json")])
    finally:
        for server in servers:
            server.stop()
    return {name: [m["loss"] for m in metrics(folder / name) if m["kind"] == "train"] for name in runs}


@pytest.mark.parametrize("holding", ["zero", "tensor", "served"])
@pytest.mark.parametrize("style", TEACHERS)
def test_every_way_to_hold_it_teaches_the_same(losses, style, holding):
    whole = losses[f"{style}-whole"]
    assert len(whole) == STEPS
    assert losses[f"{style}-{holding}"] == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("style", TEACHERS)
def test_revisions_differ(losses, style):
    values = losses[f"{style}-whole"]
    assert min(abs(values[step] - values[step - 1]) for step in range(EVERY, STEPS, EVERY)) > 1e-2

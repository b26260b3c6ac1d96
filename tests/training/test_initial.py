"""model.initial: a run begins with the weights of another, of an export, or of every k-th of their layers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megapd.cli import main
from megapd.config import load
from megapd.models import load_hugging_face
from megapd.training.start import start
from tests.corpus import corpora
from tests.training.runs import metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained GPT of four layers: runs/first, and exported."""
    folder = tmp_path_factory.mktemp("initial")
    corpora.prepared(folder, "gpt")
    assert main(train(folder, "first", "--model.layers=4", "--trajectory.every=3")) == 0
    assert main(["export", str(folder / "runs/first"), str(folder / "out")]) == 0
    return folder


def train(folder, name, *overrides):
    return ["train", *settings(folder, name), *overrides]


def settings(folder, name):
    return [
        f"--name={name}",
        f"--runs_dir={folder}/runs",
        "--task={kind: text, objective: clm}",
        f"--corpus.output={folder}/corpus",
        "--model={kind: gpt, layers: 2, hidden: 16, heads: 2}",
        "--training={steps: 6, global_batch: 8}",
        "--optimizer.lr=0.01",
        "--telemetry={every: 1, wandb: disabled, progress: false}",
        "--evaluation.samples=4",
        "--checkpoint.every=3",
    ]


def weights(folder, name, *overrides):
    run = start(load(None, [*settings(folder, name), *overrides]))
    found = {key: p.detach().clone() for key, p in run.engine.learner.named_parameters()}
    run.close()
    return found


@pytest.mark.parametrize("source", ["runs/first", "runs/first/trajectory", "runs/first/trajectory/step_6", "out"])
def test_it_begins_where_the_other_ended(folder, source):
    _, trained = load_hugging_face(folder / "out")
    found = weights(folder, f"all-{source.replace('/', '-')}", "--model.layers=4", f"--model.initial={folder / source}")
    assert found.keys() == dict(trained.named_parameters()).keys()
    assert all(torch.equal(found[name], p) for name, p in trained.named_parameters())


def test_every_second_layer(folder):
    _, trained = load_hugging_face(folder / "out")
    wanted = dict(trained.named_parameters())
    found = weights(folder, "half", "--model.layers=2", f"--model.initial={folder / 'out'}")
    for name, value in found.items():
        assert torch.equal(value, wanted[name.replace("blocks.1.", "blocks.2.")]), name


def test_a_resumed_run_goes_on_from_its_own_weights(folder):
    """Bitwise, and without the other run at hand."""
    source = shutil.copytree(folder / "runs/first", folder / "gone")
    initial = [f"--model.initial={source}", "--model.layers=4"]
    assert main(train(folder, "whole", *initial)) == 0
    assert main(train(folder, "parts", *initial, "--training.steps=3")) == 0
    record = json.loads((folder / "runs/parts/run.json").read_text())
    assert len(record["digests"]["initial weights"]) == 64
    shutil.rmtree(source)
    assert main(train(folder, "parts", *initial)) == 0
    train_lines = [[line for line in metrics(folder / "runs" / name) if line["kind"] == "train"] for name in ("whole", "parts")]
    assert train_lines[0] == train_lines[1]
    assert json.loads((folder / "runs/parts/run.json").read_text())["digests"] == record["digests"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--model.layers=3"], ["4 blocks", "model.layers"]),
        (["--model.hidden=32"], ["shape", "hidden"]),
        (["--model.tied=false"], ["head.weight", "model.tied"]),
        (["--model.kind=bert", "--task.objective=mlm"], []),
        (["--model.initial=nowhere"], ["nowhere"]),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, capsys, overrides, words):
    arguments = [f"--model.initial={folder / 'out'}", *overrides, f"--runs_dir={tmp_path}"]
    assert main(train(folder, "refused", *arguments)) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words)
    assert not (tmp_path / "refused" / "run.json").exists()


def test_another_vocabulary_is_refused(folder, tmp_path, capsys):
    corpora.prepared(tmp_path, "gpt", "--corpus.tokenizer.kind=unigram")
    arguments = [
        f"--model.initial={folder / 'out'}",
        "--model.layers=4",
        f"--runs_dir={tmp_path}",
        f"--corpus.output={tmp_path}/corpus",
    ]
    assert main(train(folder, "other", *arguments)) == 2
    assert "model.initial" in (told := capsys.readouterr().err)
    assert "vocabulary" in told

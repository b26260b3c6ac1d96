"""A branch is a run of its own that goes on exactly where another was."""

import json
import shutil

import pytest

from megapd.cli import main
from tests.training import runs
from tests.training.test_adaptive import arguments as adaptive
from tests.training.test_adaptive import decisions

WSD = ["--lr={kind: wsd, decay: 5}", "--checkpoint.every=5", "--checkpoint.keep=9", "--training.steps=20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("runs")
    trajectory = runs.teacher(found, steps=20, every=5)
    assert main(runs.student(found, "stable", trajectory, *WSD)) == 0
    return found


def branch(folder, name, *more):
    return main(["branch", str(folder / "stable"), "--as", name, *more])


def train(folder, name, *more):
    return main(["train", str(folder / name / "config.yaml"), *more])


def test_a_branch_goes_on_bitwise(folder, capsys):
    assert branch(folder, "same", "--at", "10") == 0
    assert f"go on with: megapd train {folder / 'same' / 'config.yaml'}" in capsys.readouterr().out
    own, parent = (json.loads((folder / name / "run.json").read_text()) for name in ("same", "stable"))
    assert own["id"] != parent["id"]
    assert own["parent"] == {"id": parent["id"], "folder": str(folder / "stable"), "step": 10, "changed": {}}
    assert train(folder, "same") == 0
    assert runs.metrics(folder / "same") == runs.metrics(folder / "stable")
    assert json.loads((folder / "same" / "run.json").read_text())["segments"][0]["step"] == 10


def test_a_decay_branches_off(folder):
    """As warm-up, stable, decay is used: the stable part goes on, a shorter run ends from its middle."""
    assert branch(folder, "decayed", "--at", "10", "--training.steps=15", "--optimizer.weight_decay=0.1") == 0
    assert train(folder, "decayed") == 0
    lines, before = runs.metrics(folder / "decayed"), runs.metrics(folder / "stable")
    assert lines[-1]["step"] == 15
    assert [line for line in lines if line["step"] < 10] == [line for line in before if line["step"] < 10]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates[9] == max(rates) > rates[11] > rates[14]
    changed = json.loads((folder / "decayed" / "run.json").read_text())["parent"]["changed"]
    assert changed == {"training.steps": [20, 15], "optimizer.weight_decay": [0.0, 0.1]}
    assert train(folder, "stable", "--training.steps=22") == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--as", "stable"], "stable exists; choose another name"),
        (["--as", "b", "--at", "7"], "holds steps 5, 10, 15, 20"),
        (["--as", "b", "--model.width=9"], "that is another run"),
        (["--as", "b", "--optimizer.lrr=9"], "did you mean optimizer.lr"),
    ],
)
def test_refusals(folder, more, told, capsys):
    assert main(["branch", str(folder / "stable"), *more]) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "b").exists()


def test_a_checkpoint_that_goes_meanwhile(folder, tmp_path, capsys):
    shutil.copytree(folder / "stable", tmp_path / "stable")
    next((tmp_path / "stable" / "checkpoints" / "step_10").glob("*.safetensors")).unlink()
    assert branch(tmp_path, "b", "--at", "10") == 2
    assert "went while it was copied" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["stable"]


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert branch(tmp_path, "b") == 2
    assert "no such configuration file" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adaptive_branch_decides_as_its_parent(tmp_path):
    trajectory = runs.teacher(tmp_path, steps=200, every=50)
    given = [*adaptive(tmp_path, "stable", trajectory), "--checkpoint.keep=9"]
    assert main(given) == 0
    assert branch(tmp_path, "same", "--at", "75") == 0
    assert train(tmp_path, "same") == 0
    assert runs.metrics(tmp_path / "same") == runs.metrics(tmp_path / "stable")
    assert decisions(tmp_path / "same") == decisions(tmp_path / "stable")

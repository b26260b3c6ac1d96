"""Descriptions and weights that are not as they must be: one line each, whichever verb reads them."""

import json

import pytest
import torch

from megapd.cli import main
from megapd.errors import UserError
from megapd.trajectory import Trajectory
from megapd.trajectory.pickles import load_pickle

from .checkpoints import write


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metrics": {"loss": float("nan")}}, r"not valid JSON \(NaN is no finite number\)"),
        ({"metrics": {"a": [1, float("-inf")]}}, r"not valid JSON \(-Infinity is no finite number\)"),
        ('{"metrics": {"loss": 1e999}}', r"not valid JSON \(1e999 is no finite number\)"),
        ({"metrics": [1]}, "metrics is a list, not a dict"),
        ({"config": None}, "config is a NoneType, not a dict"),
        ({"step": "2"}, "step is a str, not a int"),
        ({"step": True}, "step is a bool, not a int"),
        ({"vocabulary": 5}, "vocabulary is a int, not a str"),
        ({"files": {"../x": {"sha256": "0", "bytes": 1}}}, r"'\.\./x' is not the name of a file beside it"),
        ({"files": {"x": {"sha256": "0"}}}, "does not give a sha256 and bytes for each"),
        ("[" * 100_000, r"not valid JSON \(nested too deep\)"),
        ("\xff", "not valid JSON"),
    ],
)
def test_damaged_descriptions(tmp_path, capsys, change, told):
    write(tmp_path / "t", 2)
    meta = tmp_path / "t" / "step_2" / "meta.json"
    meta.write_text(change if isinstance(change, str) else json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(UserError, match=rf"step_2/meta\.json: damaged, .*{told}.*; restore the checkpoint$"):
        Trajectory(tmp_path / "t").checkpoint(2)
    database = f"--scheduler.database=sqlite:///{tmp_path / 'scheduler.db'}"
    assert main(["trajectory", "list", str(tmp_path / "t")]) == 2
    assert main(["trajectory", "import", str(tmp_path / "t"), database]) == 2
    assert main(["trajectory", "verify", str(tmp_path / "t")]) == 1
    told_lines = capsys.readouterr()
    assert len(told_lines.err.splitlines()) == 2
    assert told_lines.out.splitlines()[-1].endswith("1 checkpoints, 1 problems")


def test_what_is_verified_is_looked_for_by_every_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["trajectory", "verify", "TYPO"]) == 2
    assert (
        f"TYPO: there is no folder {tmp_path / 'TYPO'}, and no registered trajectory can be looked up: "
        in capsys.readouterr().err
    )
    write(tmp_path / "t", 2)
    assert main(["trajectory", "import", "t"]) == 0
    assert main(["trajectory", "verify", "TYPO"]) == 2
    error = capsys.readouterr().err
    assert (
        f"TYPO: there is no folder {tmp_path / 'TYPO'}, and no registered trajectory of that name or digest; correct it" in error
    )


def test_published_checkpoints_are_verified_by_their_pattern(tmp_path, capsys):
    for step in (1, 2):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "bert"}')
        torch.save({"w": torch.full((2, 2), float(step))}, folder / "pytorch_model.bin")
    assert main(["trajectory", "verify", f"{tmp_path}/step_{{step}}"]) == 0
    torch.save({"w": torch.zeros(2, 2), "epoch": 5}, folder / "pytorch_model.bin")
    assert main(["trajectory", "verify", f"{tmp_path}/step_{{step}}"]) == 1
    assert "step_2/pytorch_model.bin: 'epoch' in it is a int, not a tensor under a name; save" in capsys.readouterr().out
    assert main(["trajectory", "verify", str(tmp_path)]) == 2
    assert f"(2 without meta.json); transformers' checkpoints are named {tmp_path}/step_{{step}}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"a": {"b": torch.zeros(1)}}, [torch.zeros(1)], {}, {5: torch.zeros(1)}, b"junk", b""])
def test_files_of_no_tensors(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: "):
        load_pickle(path)

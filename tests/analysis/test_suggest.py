"""`megapd trajectory`: what it prints and draws of checkpoints on disk, and that what it chooses is the right one to choose."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from megapd.analysis.suggest import describe_found, plot_found, suggest
from megapd.cli import main
from megapd.config import TransitionConfig
from megapd.schedule.transition import find_transition
from tests.trajectory import checkpoints

LOSSES = {0: 0.8, 100: 0.7, 200: 0.69, 300: 0.68, 400: 0.6, 500: 0.3, 600: 0.05, 700: 0.04, 800: 0.035}


@pytest.fixture
def run(tmp_path):
    """The folder of a run that wrote a trajectory."""
    for step, loss in LOSSES.items():
        weights = {"w": torch.full((3,), float(step))}
        checkpoints.write(tmp_path / "teacher" / "trajectory", step, weights, metrics={"eval/loss": loss, "train/loss": 2 * loss})
    return tmp_path / "teacher"


def rows(text):
    """(step, loss, mark) of the table."""
    found = re.findall(r"^ *([\d,]+) +([\d.e-]+)(?: +(-?[\d.e-]+))?(?: +(<- chosen|transition))?$", text, re.M)
    return [(int(step.replace(",", "")), float(loss), mark) for step, loss, _, mark in found]


@pytest.mark.parametrize("within", ["", "trajectory"])
def test_suggest_a_folder(run, within, capsys):
    assert main(["trajectory", "suggest", str(run / within)]) == 0
    text = capsys.readouterr().out
    assert rows(text) == [
        (100, 0.7, ""),
        (200, 0.69, ""),
        (300, 0.68, ""),
        (400, 0.6, "transition"),
        (500, 0.3, "<- chosen"),
        (600, 0.05, "transition"),
        (700, 0.04, ""),
        (800, 0.035, ""),
    ]
    assert "nearest to which is step 500 (0.3)" in text
    assert "(2, T) with the checkpoints 500, 800:  schedule: {policy: transition, steps: T, checkpoints: 2}" in text
    picture = run / "plots" / "transition.png"
    assert text.splitlines()[-1] == str(picture)
    assert matplotlib.image.imread(picture).shape == (550, 1400, 4)


def test_suggest_for_a_students_configuration(run, tmp_path, capsys):
    config = tmp_path / "student.yaml"
    config.write_text(f"""
name: student
runs_dir: {tmp_path / "runs"}
model: {{kind: mlp, width: 8}}
teacher: {{trajectory: {run / "trajectory"}}}
schedule: {{policy: transition, steps: 7, checkpoints: 3}}
""")
    assert main(["trajectory", "suggest", str(config)]) == 0
    assert [step for step, _, mark in rows(capsys.readouterr().out) if mark == "<- chosen"] == [500, 600]
    assert (tmp_path / "runs" / "student" / "plots" / "transition.png").is_file()
    output = tmp_path / "x.png"
    arguments = ["--schedule.checkpoints=4", "--checkpoints=2", f"--output={output}"]
    assert main(["trajectory", "suggest", str(config), *arguments]) == 0
    assert [step for step, _, mark in rows(capsys.readouterr().out) if mark == "<- chosen"] == [500]
    assert output.is_file()
    # Another schedule's settings say nothing of a transition: the default is two checkpoints.
    config.write_text(config.read_text().replace("policy: transition, steps: 7, checkpoints: 3", "policy: one_shot"))
    assert suggest(config, [], None, None)[0].picks == (500,)


def test_suggest_refuses_in_one_line(run, tmp_path, capsys):
    labels = tmp_path / "labels.yaml"
    labels.write_text("model: {kind: mlp}\n")
    bare = tmp_path / "bare"
    for step in (1, 2, 3):
        checkpoints.write(bare, step, {"w": torch.full((3,), float(step))}, metrics={})
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "no such configuration file"),
        ([str(tmp_path)], "no complete checkpoint"),
        ([str(labels)], "teacher: this configuration has none"),
        ([str(bare)], "0 of its checkpoints carry a value of eval/loss"),
        ([str(run), "--checkpoints=1"], "--checkpoints: Input should be greater than or equal to 2"),
        ([str(run), "--metric=degree_1"], "curriculum/degree_1"),
        ([str(run), "--schedule.steps=3"], "settings go with a configuration"),
    ):
        assert main(["trajectory", "suggest", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    assert not (run / "plots").exists()


def test_checkpoints_of_transformers_carry_no_metrics(tmp_path, capsys):
    config = tmp_path / "student.yaml"
    (tmp_path / "model" / "step_7").mkdir(parents=True)
    (tmp_path / "model" / "step_7" / "config.json").write_text("{}")
    (tmp_path / "model" / "step_7" / "model.safetensors").write_bytes(b"x")
    teacher = {"trajectory": str(tmp_path / "model" / "step_{step}")}
    config.write_text(json.dumps({"teacher": teacher, "schedule": {"policy": "one_shot"}}))  # JSON is YAML
    assert main(["trajectory", "suggest", str(config)]) == 2
    assert "checkpoints of transformers carry no metrics" in capsys.readouterr().err


def test_a_long_trajectory_is_shown_around_its_drop(tmp_path):
    values = {s: {"eval/loss": (0.7 if s < 500 else 0.3 if s == 500 else 0.01) - s * 1e-6} for s in range(1, 1001)}
    found = find_transition(TransitionConfig(steps=1), values)
    text = describe_found(found)
    shown = rows(text)
    assert [step for step, _, mark in shown if mark == "<- chosen"] == [500]
    assert len(shown) == 8 + 3 + 8
    assert f"{shown[0][0] - 1} more" in text
    assert f"{1000 - shown[-1][0]} more" in text
    assert plot_found(found, tmp_path / "plot").name == "plot.png"


def test_a_peak_is_drawn_too(tmp_path):
    values = {s: {"curriculum/degree_1": v} for s, v in {10: 0.01, 20: 0.03, 30: 0.09, 40: 0.02, 50: 0.01}.items()}
    found = find_transition(TransitionConfig(steps=1), values)
    assert [step for step, _, mark in rows(describe_found(found)) if mark == "<- chosen"] == [30]
    assert "curriculum/degree_1 peaks at step 30" in describe_found(found)
    plot_found(found, tmp_path / "peak.png")
    assert (tmp_path / "peak.png").stat().st_size > 10_000


def test_list(run, capsys):
    assert main(["trajectory", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run / 'trajectory'}: 9 checkpoints"
    shown = [line.split() for line in lines if re.match(r" *\d+ +[0-9a-f]{12} ", line)]
    assert [int(row[0]) for row in shown] == list(LOSSES)
    assert [float(row[3]) for row in shown] == list(LOSSES.values())
    assert shown[0][4] == "-"  # no accuracy
    (run / "trajectory" / "step_900").mkdir()
    assert main(["trajectory", "list", str(run)]) == 0
    assert "step 900: no meta.json" in capsys.readouterr().out


def test_verify(run, capsys):
    assert main(["trajectory", "verify", str(run)]) == 0
    assert "9 checkpoints, 0 problems" in capsys.readouterr().out
    checkpoints.write(run / "trajectory", 900, {"w": torch.full((3,), 800.0)}, metrics={})
    (shard,) = (run / "trajectory" / "step_300").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["trajectory", "verify", str(run / "trajectory")]) == 1
    text = capsys.readouterr().out
    assert f"{shard}: its sha256 is" in text
    assert "steps 800, 900 have the same weights" in text
    assert "10 checkpoints, 2 problems" in text


def test_the_verbs_of_trajectory_take_no_settings(run, capsys):
    for action, told in (("list", "takes no settings"), ("verify", "settings are for registered trajectories")):
        assert main(["trajectory", action, str(run), "--schedule.steps=3"]) == 2
        assert told in capsys.readouterr().err
        assert main(["trajectory", action, str(run), "--steps=1,2"]) == 2
        assert "which knows its steps" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["trajectory"])
    assert caught.value.code == 2


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_checkpoint_in_the_jump_teaches_best(tmp_path):
    """The demo's teacher and three (2, T) students: minutes on two cores."""
    script = Path(__file__).parents[2] / "benchmarks" / "transition.py"
    output = tmp_path / "transition.json"
    subprocess.run([sys.executable, str(script), f"--output={output}"], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    result = json.loads(output.read_text())
    values = {int(step): value for step, value in result["transition"]["values"].items()}
    students = result["students"]
    pick = students["chosen"]["checkpoint"]
    assert result["transition"]["first"] < pick <= result["transition"]["last"]
    # In the jump: of the loss, from near ln 2 to near 0.
    assert max(values[s] for s in values if s > pick) < values[pick] - 0.1
    assert min(values[s] for s in values if s < pick) > values[pick] + 0.1
    steps = {name: found["steps_to_99"] for name, found in students.items()}
    assert steps["chosen"] is not None
    for other in ("before", "after"):
        assert steps[other] is None or steps["chosen"] < steps[other]

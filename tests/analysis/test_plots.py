import csv
import json
import math
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from megapd.analysis.plots import (
    current,
    plot_plan,
    plot_runs,
    read_metrics,
    rotation_steps,
    running_mean,
    series,
    steps_to_accuracy,
    tidy,
)
from megapd.config import MatchedConfig
from megapd.errors import UserError
from megapd.schedule.policies import build_plan


def run_folder(folder, records, tail=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return folder


def train(step, loss, **more):
    return {"kind": "train", "step": step, "loss": loss, "teacher_step": None, **more}


def evaluation(step, accuracy, loss=0.7):
    return {"kind": "eval", "step": step, "loss": loss, "accuracy": accuracy}


def rotation(step, teacher_step):
    return {"kind": "rotation", "step": step, "teacher_step": teacher_step, "teacher": f"{teacher_step:064x}"}


RUN = [
    rotation(0, 100),
    train(10, 0.1 + 0.2),
    train(20, None, lr=1e-3),
    evaluation(20, 0.5),
    rotation(20, 200),
    train(30, 0.25),
    evaluation(30, 1.0),
]


def rows_of(path):
    with path.open() as file:
        return list(csv.reader(file))


# --------------------------------------------------------------------------------------------------------- metrics


def test_read_metrics_gives_the_lines_back(tmp_path):
    assert read_metrics(run_folder(tmp_path / "r", RUN)) == RUN


@pytest.mark.parametrize("text", ["null", "NaN", "-Infinity", '"nan"', '"inf"', '"-Infinity"', "1e999"])
def test_numbers_that_are_not_finite_are_gaps(tmp_path, text):
    folder = run_folder(tmp_path / "r", [], tail=f'{{"kind": "train", "step": 1, "loss": {text}}}\n')
    assert read_metrics(folder) == [{"kind": "train", "step": 1, "loss": None}]
    steps, values = series(read_metrics(folder), "train", "loss")
    assert steps.tolist() == [1]
    assert np.isnan(values).tolist() == [True]


@pytest.mark.parametrize("tail", ['{"kind": "tr', '{"kind": "train", "step": 4', '{"kind": "t\udcc3'])
def test_a_half_written_last_line_is_left_out(tmp_path, tail):
    folder = run_folder(tmp_path / "r", RUN)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(tail.encode("utf-8", "surrogateescape"))
    assert read_metrics(folder) == RUN


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    assert read_metrics(run_folder(tmp_path / "r", RUN, tail='{"kind": "train", "step": 40}'))[-1]["step"] == 40


@pytest.mark.parametrize(
    "bad", ["", '{"kind": "tr', '{"kind": "train"}', '{"step": 3}', "[1]", '{"kind": "train", "step": 1.5}', "\udcc3"]
)
def test_other_bad_lines_are_named(tmp_path, bad):
    folder = run_folder(tmp_path / "r", RUN[:2])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(bad.encode("utf-8", "surrogateescape") + b"\n" + json.dumps(RUN[2]).encode() + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 3 is no metrics line") as caught:
        read_metrics(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_metrics(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"its metrics\.jsonl is empty"):
        plot_runs([run_folder(tmp_path / "r", [])], tmp_path / "x.png")
    with pytest.raises(UserError, match="no run folder given"):
        plot_runs([], tmp_path / "x.png")


def test_steps_to_accuracy():
    metrics = [train(1, 0.1, accuracy=1.0), evaluation(10, 0.5), evaluation(20, None), evaluation(30, 0.99), evaluation(40, 0.7)]
    assert steps_to_accuracy(metrics, 0.99) == 30
    assert steps_to_accuracy(metrics, 0.5) == 10
    assert steps_to_accuracy(metrics, 0.995) is None


def test_a_resumed_run_keeps_the_later_lines():
    first = [
        rotation(0, 1),
        train(10, 1.0),
        evaluation(10, 0.1),
        rotation(10, 2),
        train(20, 2.0),
        evaluation(20, 0.2),
        train(30, 3.0),
    ]
    resumed = [rotation(15, 2), train(20, 2.5)]
    assert current(first) == first
    assert current(first + resumed) == [*first[:4], evaluation(20, 0.2), rotation(15, 2), train(20, 2.5)]
    from_start = [rotation(0, 1), train(10, 1.5)]
    assert current(first + from_start) == [evaluation(10, 0.1), *from_start]


def test_rotation_steps_are_the_changes():
    records = [rotation(0, 100), rotation(20, 200), rotation(33, 200), train(35, 1.0), rotation(40, 300)]
    assert rotation_steps(records) == [20, 40]
    assert rotation_steps([train(1, 0.1)]) == []


@pytest.mark.parametrize("window", [1, 3, 5, 9])
def test_running_mean_by_brute_force(window):
    values = np.random.default_rng(0).normal(size=30)
    values[[0, 7, 8, 9, 10, 20]] = math.nan
    means = running_mean(values, window)
    for i in range(values.size):
        near = values[max(0, i - window // 2) : i + window // 2 + 1]
        near = near[np.isfinite(near)]
        if near.size:
            assert means[i] == pytest.approx(near.mean(), abs=1e-12)
        else:
            assert math.isnan(means[i])


# ----------------------------------------------------------------------------------------------------------- plots


def test_plot_runs_writes_the_picture_and_its_numbers(tmp_path):
    other = [train(10, 0.7), evaluation(10, 0.6)]
    folders = [run_folder(tmp_path / "progressive", RUN), run_folder(tmp_path / "tau0.5", other)]
    written = plot_runs(folders, tmp_path / "plots" / "curves.png")
    assert written == [tmp_path / "plots" / "curves.png", tmp_path / "plots" / "curves.csv"]
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"curves.png", "curves.csv"}
    picture = matplotlib.image.imread(written[0])
    assert picture.shape[:2] == (550, 1400)
    header, *rows = rows_of(written[1])
    assert header == ["run", "kind", "step", "metric", "value"]
    expected = [("progressive", *row) for row in tidy(RUN)] + [("tau0.5", *row) for row in tidy(other)]
    assert [(r, k, int(s), m, float(v) if v else None) for r, k, s, m, v in rows] == expected
    assert ("progressive", "train", 10, "loss", 0.1 + 0.2) in expected  # exactly: floats are written in full
    assert ["progressive", "train", "20", "loss", ""] in rows
    assert ["progressive", "rotation", "20", "teacher_step", "200"] in rows
    assert not any("teacher" in row for row in rows)  # digests are no numbers


def test_plot_shows_curves_and_rotations_in_the_runs_colours(tmp_path):
    one = matplotlib.image.imread(plot_runs([run_folder(tmp_path / "a", RUN)], tmp_path / "one.png")[0])
    blue = np.array([0x00, 0x72, 0xB2]) / 255
    assert (np.abs(one[..., :3] - blue).max(-1) < 0.02).sum() > 200
    moved = [{**r, "step": 25} if r == rotation(20, 200) else r for r in RUN]
    elsewhere = matplotlib.image.imread(plot_runs([run_folder(tmp_path / "moved" / "a", moved)], tmp_path / "two.png")[0])
    rows, columns = np.nonzero((one != elsewhere).any(-1))
    # A line from bottom to top in each of the two panels left its place for another: four narrow columns, nothing else.
    assert len(np.unique(columns)) < 40
    assert len(np.unique(rows)) > 400


def test_a_picture_is_the_same_each_time(tmp_path):
    folder = run_folder(tmp_path / "a", RUN)
    one, two = (plot_runs([folder], tmp_path / name)[0].read_bytes() for name in ("1.png", "2.png"))
    assert one == two


@pytest.mark.parametrize(
    "records",
    [
        [train(1, 0.5)],
        [evaluation(1, 0.5, loss=None)],
        [train(1, 0.0), train(2, -0.5), train(3, 1.0)],
        [train(1, None), train(2, None)],
        [rotation(0, 5)],
        [train(i, 10.0 ** -(i / 100)) for i in range(1, 800)] + [evaluation(i, i / 800) for i in range(0, 800, 8)],
        [train(i, 0.5) for i in range(1, 10)],
    ],
    ids=["one_point", "only_eval", "not_positive", "all_gaps", "only_rotation", "many_points", "constant"],
)
@pytest.mark.filterwarnings("error")
def test_odd_runs_are_drawn(tmp_path, records):
    picture, numbers = plot_runs([run_folder(tmp_path / "r", records)], tmp_path / "x")
    assert picture.name == "x.png"
    assert matplotlib.image.imread(picture).shape[:2] == (550, 1400)
    assert len(rows_of(numbers)) == 1 + len(list(tidy(records)))


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [run_folder(tmp_path / seed / "progressive", RUN) for seed in ("seed0", "seed1")]
    numbers = plot_runs([*folders, folders[0]], tmp_path / "v1.5")[1]
    assert numbers.name == "v1.5.csv"
    assert {row[0] for row in rows_of(numbers)[1:]} == {"seed0/progressive", "seed1/progressive"}


def test_plot_plan(tmp_path):
    plan = build_plan(MatchedConfig(refresh=100), available=range(100, 1001, 100), steps=1500)
    path = plot_plan(plan, tmp_path / "plots" / "plan.png")
    assert path == tmp_path / "plots" / "plan.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (550, 1400)
    blue = np.array([0x00, 0x72, 0xB2]) / 255
    rows, columns = np.nonzero(np.abs(picture[..., :3] - blue).max(-1) < 0.02)
    # A staircase up to two thirds of the width: right columns are drawn higher (smaller row numbers) than left ones.
    left, right = rows[columns < np.median(columns)], rows[columns > np.median(columns)]
    assert left.mean() > right.mean() + 50
    assert columns.max() - columns.min() > 1000


@pytest.mark.slow
def test_no_pyplot(tmp_path):
    folder = run_folder(tmp_path / "a", RUN)
    code = (
        "import sys; from pathlib import Path; from megapd.analysis.plots import plot_runs;"
        f"plot_runs([Path({str(folder)!r})], Path({str(tmp_path / 'x.png')!r})); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

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
    running_mean,
    runs_figure,
    series,
    steps_to_accuracy,
    taught_spans,
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


def test_spans_of_the_teachers():
    """A checkpoint that is named again, by a resume, goes on."""
    records = [rotation(0, 100), train(10, 0.1), rotation(10, 100), rotation(20, 200), rotation(40, 100), train(50, 0.1)]
    assert list(taught_spans(records)) == [(0, 20, 100), (20, 40, 200), (40, 50, 100)]


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
    assert matplotlib.image.imread(written[0]).shape[1] == 1400
    header, *rows = rows_of(written[1])
    assert header == ["run", "kind", "step", "metric", "value"]
    expected = [("progressive", *row) for row in tidy(RUN)] + [("tau0.5", *row) for row in tidy(other)]
    assert [(r, k, int(s), m, float(v) if v else None) for r, k, s, m, v in rows] == expected
    assert ("progressive", "train", 10, "loss", 0.1 + 0.2) in expected  # exactly: floats are written in full
    assert ["progressive", "train", "20", "loss", ""] in rows
    assert ["progressive", "rotation", "20", "teacher_step", "200"] in rows
    assert not any("teacher" in row for row in rows)  # digests are no numbers


def test_what_has_another_scale_has_a_panel_of_its_own():
    """The held-out loss is on a linear axis; who taught when is a strip, a row a run; no legend lies on data."""
    taught = [*RUN, train(40, 0.01, divergence=0.2), train(50, 0.005, divergence=0.1)]
    figure = runs_figure({"a": taught, "b": [train(10, 0.5), evaluation(10, 0.5)], "c": taught})
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(panels) == ["training loss", "held-out loss", "held-out accuracy", "divergence from the teacher", ""]
    assert {label: axes.get_yscale() for label, axes in panels.items() if label} == {
        "training loss": "log",
        "held-out loss": "linear",
        "held-out accuracy": "linear",
        "divergence from the teacher": "log",
    }
    assert [len(axes.lines) for axes in panels.values()] == [3, 3, 3, 3, 0]
    strip = panels[""]
    assert [label.get_text() for label in strip.get_yticklabels()] == ["a", "c"]
    assert [(bar.get_x(), bar.get_width()) for bar in strip.patches] == [(0, 20), (20, 30)] * 2
    assert [text.get_text() for text in strip.texts] == ["100", "200"] * 2
    assert not any(axes.get_legend() for axes in figure.axes)
    assert all(text.get_fontsize() >= 8 for axes in figure.axes for text in [*axes.texts, *axes.get_xticklabels()])


def test_runs_that_nothing_teaches_have_no_strip():
    figure = runs_figure({"b": [train(10, 0.5), evaluation(10, 0.5)]})
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss", "held-out loss", "held-out accuracy"]


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
    assert matplotlib.image.imread(picture).shape[1] == 1400
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

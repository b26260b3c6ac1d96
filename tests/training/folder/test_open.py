"""What a run's folder must hold for the run to go on: nothing missing, nothing of another run, the same settings and data."""

import json
import shutil

import pytest
import torch
import yaml

from megapd.cli import main
from megapd.config import load
from megapd.errors import UserError
from megapd.processes.local import free_port
from megapd.training.folder import agree, numerics, open_folder
from megapd.world import World
from tests.forked import Forked, environment
from tests.training import runs


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two trajectories of the same steps, and a student of each that has ended."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("two", 1)):
        ends = [f"--runs_dir={folder}", f"--name={name}-teacher", f"--seed={seed}", "--training.steps=10", "--trajectory.every=5"]
        assert main(["train", *runs.COMMON, "--model.width=16", *ends]) == 0
        assert main(student(folder, name)) == 0
    return folder


def student(folder, name, *overrides, teacher=None):
    given = ["--training.steps=20", "--checkpoint.every=5", "--trajectory.every=10", *overrides]
    return runs.student(folder, name, folder / f"{teacher or name}-teacher" / "trajectory", *given)


@pytest.fixture
def folder(teachers, tmp_path):
    shutil.copytree(teachers, tmp_path / "runs")
    return tmp_path / "runs"


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def refused(arguments, run, capsys):
    """The line that `megapd ARGUMENTS` refuses with, nothing in the run's folder changed."""
    before = content(run)
    capsys.readouterr()
    assert main(arguments) == 2
    assert content(run) == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megapd: ")]
    return line


def record(run):
    return json.loads((run / "run.json").read_text())


# ----------------------------------------------------------------------------------------------------------- its identity


def test_every_file_names_the_run(folder):
    run = folder / "one"
    own = record(run)
    assert len(own["id"]) == 32
    named = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["id"]]
    named += [json.loads((run / name).read_text())["run"] for name in ("schedule.json", "trajectory/step_10/meta.json")]
    named += [json.loads(path.read_text())["run"] for path in (run / "checkpoints").glob("step_*/manifest.json")]
    assert set(named) == {own["id"]}
    assert record(folder / "two")["id"] != own["id"]
    assert own["settings"] == yaml.safe_load((run / "config.yaml").read_text())
    assert (own["saved"], own["parent"], own["adopted"]) == (20, None, False)
    assert len(own["digests"]) == 2
    (segment,) = own["segments"]
    assert (segment["step"], segment["ranks"], segment["changed"], segment["numerics"]) == (0, 1, {}, numerics.VERSION)


def test_a_start_that_goes_on_is_a_segment(folder):
    assert main(student(folder, "one", "--training.steps=25", "--checkpoint.keep=3")) == 0
    assert runs.last_step(folder / "one") == 25
    first, second = record(folder / "one")["segments"]
    assert (first["step"], second["step"]) == (0, 20)
    moved = second["changed"].keys() - {"training.steps", "checkpoint.keep"}
    assert moved == {"runs_dir", "teacher.trajectory"}  # the folder is a copy
    assert second["changed"]["training.steps"] == [20, 25]
    assert record(folder / "one")["settings"]["training"]["steps"] == 25


def test_a_start_that_makes_no_step_binds_nobody(tmp_path, capsys):
    arguments = ["train", *runs.COMMON, f"--runs_dir={tmp_path}", "--name=s", "--training.steps=4"]
    assert main([*arguments, "--training.callbacks=[megapd-has-none]"]) == 2
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "stop").touch()
    assert main(arguments) == 0
    assert main([*arguments, "--optimizer.lr=0.5"]) == 0
    assert runs.last_step(tmp_path / "s") == 4


# --------------------------------------------------------------------------------------------------- missing and foreign


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("config.yaml", "config.yaml is missing; run.json beside it has the same settings"),
        ("run.json", "run.json is missing, and metrics.jsonl names a run"),
        ("checkpoints", "holds no checkpoint, but this run saved one at step 20"),
        ("schedule.json", "which says who taught this run, is missing"),
    ],
)
def test_a_missing_piece_is_refused(folder, gone, told, capsys):
    path = folder / "one" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert told in refused(student(folder, "one"), folder / "one", capsys)


@pytest.mark.parametrize("foreign", ["run.json", "metrics.jsonl", "checkpoints", "schedule.json", "trajectory", "config.yaml"])
def test_a_piece_of_another_run_is_refused(folder, foreign, capsys):
    path = folder / "one" / foreign
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = folder / "two" / foreign
    shutil.copytree(other, path) if other.is_dir() else shutil.copy(other, path)
    line = refused(student(folder, "one", "--training.steps=25"), folder / "one", capsys)
    assert "belongs to run" in line or "run.json beside it '" in line


def test_lines_that_are_missing_are_told(folder, caplog):
    (folder / "one" / "metrics.jsonl").unlink()
    assert main(student(folder, "one", "--training.steps=25")) == 0
    assert "the lines that it had are lost, the run itself is not" in caplog.text
    assert runs.last_step(folder / "one") == 25


def test_another_teacher_is_refused(folder, capsys):
    line = refused(student(folder, "one", "--training.steps=25", teacher="two"), folder / "one", capsys)
    assert "this run was taught by" in line


def test_a_run_of_a_megapd_without_run_json_goes_on(folder, caplog):
    """What it wrote names no run; from here on, what is written does."""
    run = folder / "one"
    (run / "run.json").unlink()
    for path in [run / "schedule.json", *run.glob("*/step_*/meta.json"), *run.glob("checkpoints/step_*/manifest.json")]:
        tree = json.loads(path.read_text())
        del tree["run"]
        tree.pop("digest", None) if path.name in ("schedule.json", "manifest.json") else None
        path.write_text(json.dumps(tree))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[1:]))
    assert main(student(folder, "one", "--training.steps=25")) == 0
    own = record(run)
    assert (own["adopted"], len(own["segments"]), own["segments"][0]["step"]) == (True, 1, 20)
    assert runs.metrics(run)[: len(lines) - 1] == [
        {k: v for k, v in json.loads(line).items() if k not in runs.TIMINGS} for line in lines[1:]
    ]
    assert main(student(folder, "one", "--training.steps=30")) == 0
    assert runs.last_step(run) == 30


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "schedule.json"])
@pytest.mark.parametrize("damage", [b"", b"\0" * 60, b"{", b"\xff\xfe"])
def test_a_damaged_record_is_refused(folder, name, damage, capsys):
    (folder / "one" / name).write_bytes(damage)
    line = refused(student(folder, "one", "--training.steps=25"), folder / "one", capsys)
    assert "damaged" in line
    assert name in line


class TwoRanks:
    """Rank 0 of two, whose other says `other`."""

    rank, size = 0, 2

    def __init__(self, other):
        self.other = other

    def gather(self, value):
        return [value, self.other(value)]

    def on_first(self, function):
        return function()


def test_a_folder_that_not_all_ranks_share_is_told(tmp_path):
    config = load(None, [*runs.COMMON, f"--runs_dir={tmp_path}", "--name=s"])
    with pytest.raises(UserError, match="runs_dir: rank 1 does not see it; it must be one folder"):
        open_folder(TwoRanks(lambda _: "rank 1 does not see it"), config, {})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ equal settings and data


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (["--seed=7", "--optimizer.lr=0.1"], "seed is 7 on rank 1 (there) and 0 on rank 0"),
        (["--optimizer.kind=sgd"], "optimizer.kind is 'sgd' on rank 1"),
        (["--runs_dir=elsewhere"], ""),  # a file system may be mounted elsewhere on another machine
    ],
)
def test_all_ranks_have_the_same_settings(other, told):
    mine, others = (load(None, [*runs.COMMON, *given]) for given in ([], other))

    def facts(config):
        found = []
        agree(TwoRanks(lambda value: found.append(value[1]) or value), config, {})
        return "there", found[0]

    if told:
        with pytest.raises(UserError) as raised:
            agree(TwoRanks(lambda _: facts(others)), mine, {})
        assert told in str(raised.value)
    else:
        agree(TwoRanks(lambda _: facts(others)), mine, {})


def test_all_ranks_have_the_same_data():
    config = load(None, runs.COMMON)
    with pytest.raises(UserError, match=r"the digest of the data is 'b' on rank 1 .* and 'a' on rank 0"):
        agree(TwoRanks(lambda value: ("there", value[1] | {"the digest of the data": "b"})), config, {"data": "a"})


@pytest.mark.slow
def test_a_rank_with_other_settings_stops_all(tmp_path):
    """Two processes, each with an environment of its own, as stale copies of a file on two machines give them."""
    arguments = ["train", *runs.COMMON, f"--runs_dir={tmp_path}", "--name=s", "--training.steps=4"]
    output = tmp_path / "output"
    output.touch()
    port = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        Forked("megapd", arguments, {**environment(), **port, "RANK": rank, "LOCAL_RANK": rank, "MEGAPD_SEED": rank}, output)
        for rank in "01"
    ]
    assert [rank.wait(120) for rank in ranks] == [2, 2]
    assert "seed is 1 on rank 1" in output.read_text()
    assert not (tmp_path / "s").exists()


# ------------------------------------------------------------------------------------------------------ changed settings


def test_settings_change_by_name(folder, capsys):
    more, run = ["--training.steps=25", "--optimizer.lr=0.02"], folder / "one"
    assert "change it on record: --allow-change optimizer.lr" in refused(student(folder, "one", *more), run, capsys)
    assert main([*student(folder, "one", *more), "--allow-change", "optimizer.lr"]) == 0
    assert record(run)["segments"][1]["changed"]["optimizer.lr"] == [0.01, 0.02]
    assert main(student(folder, "one", "--training.steps=26", "--optimizer.lr=0.02")) == 0
    assert "optimizer.lr" not in record(run)["segments"][2]["changed"]


@pytest.mark.parametrize(
    ("given", "allowed", "told"),
    [
        ("--model.width=16", "model.width", "that is another run"),
        ("--training.steps=10", "optimizer", "training.steps was 20 when"),
        ("--optimizer.lr=0.5", "optimizer.rl", "--allow-change: there is no setting optimizer.rl"),
    ],
)
def test_what_may_not_change(folder, given, allowed, told, capsys):
    arguments = [*student(folder, "one", given), "--allow-change", allowed]
    assert told in refused(arguments, folder / "one", capsys)


def test_settings_of_another_version(folder, caplog):
    """One that its megapd did not have counts as today's default; one that today's does not have is told."""
    run = folder / "one"
    for path in (run / "run.json", run / "config.yaml"):
        tree = yaml.safe_load(path.read_text())
        tree.pop("digest", None)
        settings = tree["settings"] if path.suffix == ".json" else tree
        del settings["training"]["max_nonfinite"]
        settings["loss"]["gone"] = False
        path.write_text(json.dumps(tree))
    assert main(student(folder, "one", "--training.steps=25")) == 0
    assert "began with the setting loss.gone, which this megapd does not have" in caplog.text


def test_other_numbers_are_refused(folder, capsys):
    """A run of the first version goes on where its numbers are what they were, and is refused where they are not."""
    path = folder / "one" / "run.json"
    tree = record(folder / "one") | {"numerics": 1}
    del tree["digest"]
    path.write_text(json.dumps(tree))
    arguments = student(folder, "one", "--training.steps=25")
    half = ["--training.precision=bf16", "--training.micro_batch=4", "--allow-change=training"]
    line = refused([*arguments, *half], folder / "one", capsys)
    assert f"began with numerics version 1, this megapd has {numerics.VERSION}: gradients of micro-batches and ranks" in line
    assert main(arguments) == 0


GPT = ["--model.kind=gpt", "--model.hidden=8"]
BF16 = ["--training.precision=bf16", "--training.global_batch=8"]
MICRO = ["--training.micro_batch=4"]


@pytest.mark.parametrize(
    ("settings", "ranks", "device", "sums", "norms"),
    [
        ([], 4, "cpu", False, False),
        (MICRO, 1, "cpu", False, False),
        (BF16, 1, "cpu", False, False),
        (BF16, 2, "cpu", True, False),
        ([*BF16, *MICRO], 1, "cuda", True, False),
        ([*BF16, *GPT], 1, "cpu", False, True),
        ([*BF16, *GPT], 1, "cuda", False, False),
        ([*BF16, *GPT, *MICRO], 1, "cpu", True, True),
    ],
)
def test_whose_numbers_the_second_version_changes(settings, ranks, device, sums, norms):
    world = World(0, ranks, torch.device(device), None)
    found = " ".join(numerics.affected(load(None, settings), world, 1))
    assert ("micro-batches and ranks" in found, "norms and embeddings" in found) == (sums, norms)
    assert not numerics.affected(load(None, settings), world, 2)


def test_a_complete_run_started_again_with_other_settings_is_as_it_was(folder):
    before = content(folder / "one")
    for setting in ("--telemetry.every=3", "--telemetry.every=1"):
        assert main(student(folder, "one", setting)) == 0
        assert content(folder / "one") == before


def test_the_seed_of_the_teacher_is_warned_of(folder, caplog):
    assert main(student(folder, "other", "--seed=5", teacher="one")) == 0
    assert "seed: " not in caplog.text
    assert main(student(folder, "same", "--seed=1", teacher="two")) == 0
    assert "seed: 1 is also that of the teacher" in caplog.text


def test_other_data_is_refused(folder, capsys):
    path = folder / "one" / "run.json"
    tree = record(folder / "one")
    del tree["digest"]
    tree["digests"]["data"] = "0" * 64
    path.write_text(json.dumps(tree))
    line = refused(student(folder, "one", "--training.steps=25"), folder / "one", capsys)
    assert "the data that the task reads have digest" in line

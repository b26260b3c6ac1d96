"""Disks that fill up at any moment: one line that names path and disk, exit code 2, nothing half-written, and bitwise on."""

import contextlib
import json
import logging
import shutil
from pathlib import Path

import pytest

from megapd.cli import main
from megapd.config import SchedulerConfig
from megapd.errors import UserError
from megapd.scheduler.store import Store, Unavailable, tokens
from tests.corpus.corpora import documents, write_jsonl
from tests.faults.disks import small_disk
from tests.training import runs

pytestmark = pytest.mark.slow

# An adaptive student writes every kind of file that a run can: reports, changes, who taught it, weights for others.
SCHEDULE = "--schedule={policy: adaptive, teachers: [4, 8, 12], window: 1, min_dwell: 3, max_dwell: 4, lead: 3}"
EVERY = ["--checkpoint.every=5", "--trajectory.every=6", "--evaluation.every=2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return runs.teacher(tmp_path_factory.mktemp("teacher"), steps=12, every=4)


def arguments(folder: Path, teacher: Path) -> list[str]:
    return [*runs.student(folder, "student", teacher, SCHEDULE, *EVERY, "--training.steps=16")[:-1], "--training.steps=16"]


def what_it_learnt(run: Path) -> tuple[object, ...]:
    """Metrics, decisions, reports, and the digests of weights along the way and at the end."""
    weights = {path.parent.name: json.loads(path.read_text())["digest"] for path in run.glob("trajectory/*/meta.json")}
    assert len(weights) == 3
    return runs.metrics(run), weights, json.loads((run / "changes.json").read_text())["changes"]


@pytest.fixture(scope="module")
def undisturbed(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(arguments(folder, teacher)) == 0
    return what_it_learnt(folder / "student")


def told_once(errors: str, disk: Path) -> str:
    """The one line, of which the path and the disk are on the small disk."""
    lines = [line for line in errors.splitlines() if line.startswith("megapd: error: ")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    assert f"the disk at {disk} has" in lines[0], errors
    assert " bytes free" in lines[0]
    assert lines[0].index(str(disk)) < lines[0].index("the disk at")
    return lines[0]


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".tmp-" in path.name or path.name.startswith(".")]


def check_training(disk, limit, teacher, undisturbed, capsys) -> str | None:
    """What a run says where the disk leaves so much, None if that was enough; then it goes on with all the room it wants."""
    command = arguments(disk.path, teacher)
    disk.leave(**limit)
    code = main(command)
    errors = capsys.readouterr().err
    disk.leave()
    said = told_once(errors, disk.path) if code else None
    assert code == (0 if said is None else 2)
    assert left_over(disk.path) == []
    assert main(command) == 0, limit
    assert what_it_learnt(disk.path / "student") == undisturbed, limit
    for path in disk.path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return said


def test_some_moments_of_a_run(tmp_path, teacher, undisturbed, capsys):
    limits = ({"files": 2}, {"pages": 5}, {"pages": 26})
    with small_disk(tmp_path) as disk:
        said = [check_training(disk, limit, teacher, undisturbed, capsys) for limit in limits]
    assert None not in said
    assert "begins again" in said[1]
    assert "goes on from step" in said[2]


@pytest.mark.full
@pytest.mark.parametrize("what", ["files", "pages"])
def test_every_moment_of_a_run(tmp_path, teacher, undisturbed, capsys, what):
    """By the files that can be made, or the pages that can be written: one more each time, until the run has enough."""
    said = []
    with small_disk(tmp_path) as disk:
        while None not in said:
            said.append(check_training(disk, {what: len(said)}, teacher, undisturbed, capsys))
    places = {line.split("error: ")[1].split(": no space")[0].removeprefix("runs_dir: ") for line in said[:-1]}
    assert len(said) > 14
    assert len(places) >= 10, places


def test_a_read_only_disk(tmp_path, teacher, capsys):
    """train, evaluate, plot and prepare, each in one line; a whole run may still be read."""
    with small_disk(tmp_path) as disk:
        command = arguments(disk.path, teacher)
        assert main(command) == 0
        (disk.path / "text.jsonl").write_text('{"text": "x"}\n')
        disk.set_read_only(True)
        run = str(disk.path / "student")
        corpus = [f"--corpus.output={disk.path}/corpus", f"--corpus.sources=[{{path: {disk.path}/text.jsonl}}]"]
        for arguments_ in (command, [*command, "--name=other"], ["evaluate", run], ["plot", run], ["prepare", *corpus]):
            capsys.readouterr()
            assert main(arguments_) == 2, arguments_
            errors = capsys.readouterr().err
            assert errors.count("megapd: error: ") == 1, errors
            assert f": the disk at {disk.path} is read-only; mount it for writing" in errors
        disk.set_read_only(False)
        assert main(["evaluate", run]) == 0


def prepare_command(folder: Path, text: Path) -> list[str]:
    sources = [f"--corpus.sources=[{{path: {text}}}]", "--corpus.tokenizer={vocab_size: 320}", "--corpus.heldout_fraction=0.2"]
    return ["prepare", f"--corpus.output={folder / 'corpus'}", "--corpus.block_length=32", *sources]


def test_some_moments_of_prepare(tmp_path, capsys):
    text = write_jsonl(tmp_path / "text.jsonl", documents())
    assert main(prepare_command(tmp_path, text)) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    needed = sum(-(-len(content) // 4096) for content in whole.values())
    with small_disk(tmp_path) as disk:
        for limit in ({"files": 0}, {"files": 1}, {"files": 3}, {"pages": 1}, {"pages": needed // 2}, {"pages": needed - 1}):
            disk.leave(**limit)
            capsys.readouterr()
            assert main(prepare_command(disk.path, text)) == 2, limit
            assert str(disk.path / "corpus") in told_once(capsys.readouterr().err, disk.path)
            assert [path.name for path in disk.path.iterdir() if path.name != "ballast"] == []
            disk.leave()
        assert main(prepare_command(disk.path, text)) == 0
        assert {path.name: path.read_bytes() for path in (disk.path / "corpus").iterdir()}.keys() == whole.keys()


def test_evaluations_plots_and_recorded_signals(tmp_path, teacher, capsys):
    with small_disk(tmp_path) as disk:
        assert main(arguments(disk.path, teacher)) == 0
        run, cache = str(disk.path / "student"), str(disk.path / "cache")
        matched = runs.student(disk.path, "other", teacher, "--schedule.refresh=4", f"--teacher.cache={cache}")[1:]
        for command in (["evaluate", run], ["plot", run], ["record", *matched]):
            for limit in ({"files": 0}, {"pages": 0}):
                disk.leave(**limit)
                capsys.readouterr()
                assert main(command) == 2, command
                told_once(capsys.readouterr().err, disk.path)
                disk.leave()
                assert left_over(disk.path) == []
            assert main(command) == 0, command


def test_the_schedulers_database(tmp_path, caplog, capsys):
    """A service that runs answers that it cannot write, and goes on when there is room; a command, or a start, ends."""
    with small_disk(tmp_path) as disk:
        database = f"sqlite:///{disk.path}/s.db"
        command = ["scheduler", "token", "run", f"--scheduler.database={database}"]
        disk.leave(pages=1)
        assert main(command) == 2
        told_once(capsys.readouterr().err, disk.path)
        disk.leave()
        with contextlib.closing(Store(database)) as store:
            disk.leave(pages=0)
            caplog.set_level(logging.ERROR)

            def write(*names):
                for name in names:
                    store.write(lambda connection, name=name: tokens.create_token(connection, "run", name))

            with pytest.raises(Unavailable, match=f"s.db: no space left on device: the disk at {disk.path} has 0 bytes free"):
                write(*map(str, range(100)))
            assert main([*command, "--as=x"]) == 2
            assert "scheduler.database: " in told_once(capsys.readouterr().err, disk.path)
            disk.leave()
            write("after")
            names = [token["name"] for token in store.read(tokens.list_tokens)]
        assert "after" in names
        disk.set_read_only(True)
        with pytest.raises(UserError, match=f"the disk at {disk.path} is read-only"):
            Store(SchedulerConfig(database=database).database.get_secret_value())

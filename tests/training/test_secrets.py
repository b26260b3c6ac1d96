"""Planted secrets, and everything that a run, a teacher and a scheduler write, print or answer."""

import contextlib
import json
from pathlib import Path

import pyarrow.flight as flight
import pytest
import yaml

from megapd.cli import main
from megapd.config import load
from megapd.processes.supervisor import Supervisor
from megapd.scheduler.store import Store, tokens
from megapd.trajectory.reader import read_meta
from tests.forked import run_ranks
from tests.scheduler import services
from tests.teacher.serving import DIGESTS, FakeReplica, FakeTrajectory, act, served
from tests.training import runs

PASSWORD, TEACHER_TOKEN, SCHEDULER_TOKEN = "planted-password", "planted-teacher-token", "planted-scheduler-token"
SECRETS = (PASSWORD, TEACHER_TOKEN, SCHEDULER_TOKEN)
DATABASE = f"postgresql://megapd:{PASSWORD}@127.0.0.1:1/megapd"

pytestmark = pytest.mark.slow


def found_in(folder: Path, *besides: Path) -> list[tuple[str, str]]:
    """(file, secret) of all that the files below `folder` hold."""
    files = [path for path in folder.rglob("*") if path.is_file() and path not in besides]
    assert files
    contents = ((path, path.read_bytes()) for path in files)
    return [(str(path), secret) for path, content in contents for secret in SECRETS if secret.encode() in content]


def settings(folder: Path, *more: str) -> list[str]:
    for name, secret in (("teacher", TEACHER_TOKEN), ("scheduler", SCHEDULER_TOKEN)):
        (folder / name).write_text(secret)
    own = [f"--scheduler.database={DATABASE}", f"--scheduler.token={folder / 'scheduler'}", "--trajectory.every=2"]
    return [*runs.COMMON, f"--runs_dir={folder / 'runs'}", "--name=r", *own, *more]


def test_a_run_shows_none(tmp_path, capsys):
    """config.yaml, run.json, meta.json, wandb's files with their command line, what is printed; and the run goes on from them."""
    command = ["train", *settings(tmp_path, "--training.steps=4", "--telemetry.wandb=offline")]
    printed = run_ranks("megapd", command, ranks=1)
    run = tmp_path / "runs" / "r"
    masked = "postgresql://megapd:**********@127.0.0.1:1/megapd"
    assert [secret for secret in SECRETS if secret in printed] == []
    assert found_in(tmp_path, tmp_path / "teacher", tmp_path / "scheduler") == []
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    saved = [yaml.safe_load((run / "config.yaml").read_text()), json.loads((run / "run.json").read_text())["settings"]]
    saved.append(read_meta(run / "trajectory" / "step_4").config)
    assert [tree["scheduler"]["database"] for tree in saved] == [masked] * 3

    config = str(run / "config.yaml")
    assert main(["train", config, "--training.steps=6", "--telemetry.wandb=disabled"]) == 0  # resumed from what is masked
    assert main(["train", *settings(tmp_path, "--training.steps=8")]) == 0
    assert runs.last_step(run) == 8
    assert main(["evaluate", str(run)]) == 0
    assert main(["train", config, "--dry-run"]) == 0
    assert main(["scheduler", "tokens", f"--scheduler={json.dumps(saved[0]['scheduler'])}"]) == 2
    told = capsys.readouterr()
    assert f"database: {masked}" in told.out  # of the dry run
    assert f"scheduler.database: {masked} has no password" in told.err
    assert "MEGAPD_SCHEDULER__DATABASE" in told.err
    assert [secret for secret in SECRETS if secret in told.out + told.err] == []
    assert found_in(tmp_path, tmp_path / "teacher", tmp_path / "scheduler") == []


def test_messages_show_none(tmp_path, capsys):
    """A database that is away, one whose address is none, and a token in the place of its file."""
    for database in (DATABASE, DATABASE.replace(":1/", ":port/"), DATABASE.replace("planted-", "planted@")):
        assert main(["scheduler", "tokens", f"--scheduler.database={database}"]) == 2
        assert "password" not in capsys.readouterr().err.replace("in a password", "").replace("password authentication", "")
    for setting in ("scheduler.token", "teacher.token"):
        token = "megapd_" + "0123456789abcdef" * 3
        assert main(["train", "--teacher.trajectory=x", "--schedule.policy=one_shot", f"--{setting}={token}"]) == 2
        told = capsys.readouterr().err
        assert "this looks like a token" in told
        assert token not in told


def test_a_teacher_serves_none():
    """A checkpoint's meta.json that an older megapd wrote has the address whole."""

    class Older(FakeTrajectory):
        def checkpoint(self, step):
            checkpoint = super().checkpoint(step)
            checkpoint.config["scheduler"] = {"database": DATABASE}
            return checkpoint

    with served(FakeReplica(Older())) as server, flight.FlightClient(server.address) as client:
        catalogue = json.dumps(act(client, "trajectory"))
    assert all(digest in catalogue for digest in DIGESTS.values())
    assert "megapd:**********@" in catalogue
    assert PASSWORD not in catalogue


def test_a_scheduler_keeps_and_answers_none(tmp_path, caplog):
    with services.client(tmp_path) as http:
        header = services.token(http.service.store, "admin")
        token = header["Authorization"].removeprefix("Bearer ")
        answers = [
            http.get(path, headers=header) for path in ("/v1/runs", "/v1/events", "/metrics", "/openapi.json", "/health", "/")
        ]
        answers += [http.get("/v1/runs", headers={"Authorization": f"Bearer {token}x"}), http.put("/v1/runs/a", headers=header)]
        assert [answer for answer in answers if token in answer.text] == []
        stored = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert b"token_created" in stored
    assert token.encode() not in stored
    assert token not in caplog.text


def test_replicas_are_started_without_secrets_in_their_arguments(monkeypatch):
    """Whoever is on the machine sees a process's arguments."""
    started = {}

    class Started:
        def __init__(self, command, env):
            started.update(command=command, env=env)

    monkeypatch.setattr("megapd.processes.supervisor.subprocess.Popen", Started)
    given = ["--teacher.trajectory=x", "--schedule.policy=one_shot"]
    for secret in (f"--scheduler.database={DATABASE}", f"--scheduler={{database: '{DATABASE}', port: 5}}"):
        Supervisor(load(None, [*given, secret]), ["teacher", *given, secret])._start(0)
        assert given[0] in started["command"]
        assert PASSWORD not in " ".join(started["command"])
        with pytest.MonkeyPatch.context() as child:
            for name, value in started["env"].items():
                child.setenv(name, value)
            config = load(None, [argument for argument in started["command"] if argument.startswith("--")][:2])
        assert config.scheduler.database.reveal("") == DATABASE


def test_a_token_is_written_for_its_owner_alone(tmp_path, capsys):
    database, file = f"sqlite:///{tmp_path}/s.db", tmp_path / "token.txt"
    command = ["scheduler", "token", "run", f"--scheduler.database={database}"]
    assert main([*command, f"--output={file}"]) == 0
    assert capsys.readouterr().out == ""
    assert file.stat().st_mode & 0o777 == 0o600
    assert main([*command, f"--output={file}"]) == 2
    assert main([*command, f"--output={tmp_path / 'none' / 'token'}"]) == 2
    with contextlib.closing(Store(database)) as store:
        assert [token["name"] for token in store.read(tokens.list_tokens)] == ["run"]
        found = store.read(lambda connection: tokens.find_token(connection, tokens.token_hash(file.read_text().strip())))
    assert found == ("run", "run")

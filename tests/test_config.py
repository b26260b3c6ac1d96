from typing import Literal

import pytest
import yaml
from pydantic import SecretStr

from megapd.config import Config, ExplicitConfig, RangeConfig, TaskConfig, complete, dump, load, public_tree
from megapd.errors import UserError
from megapd.registry import tasks
from megapd.tasks import build_task
from megapd.training.folder.settings import changed_settings

TAUGHT = "teacher: {trajectory: x}\nschedule: {policy: one_shot}\n"
MODEL = "model: {kind: gpt, layers: 2, hidden: 32, heads: 2}\n"


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path, monkeypatch):
    path = write(tmp_path, MODEL + "training: {steps: 1, global_batch: 2, zero_stage: 3}\n")
    monkeypatch.setenv("MEGAPD_TRAINING__GLOBAL_BATCH", "4")
    monkeypatch.setenv("MEGAPD_TRAINING__STEPS", "5")
    config = load(path, ["--training.steps=7", "--model.layers=3"])
    assert (config.training.steps, config.training.global_batch, config.training.zero_stage) == (7, 4, 3)
    assert (config.model.layers, config.model.hidden) == (3, 32)


def test_dump_is_a_configuration(tmp_path):
    config = load(write(tmp_path, MODEL), ["--loss.alpha=0.5"])
    again = load(write(tmp_path, dump(config)))
    assert again == config
    assert yaml.safe_load(dump(config))["loss"]["alpha"] == 0.5


@pytest.mark.parametrize(
    ("text", "overrides", "setting"),
    [
        ("trainin: {}\n", [], "trainin"),
        ("training: {step: 3}\n", [], "training.step"),
        (MODEL + "", ["--model.hiden=3"], "model.hiden"),
        ("training: {steps: many}\n", [], "training.steps"),
        ("", ["--training.steps=1.5"], "training.steps"),
        ("", ["--training.zero_stage=4"], "training.zero_stage"),
        (MODEL, ["--model.heads=3"], "heads"),
        ("", ["--training.micro_batch=3"], "training.micro_batch"),
        ("", ["--schedule.policy=one_shot"], "teacher"),
        ("", ["--teacher.trajectory=x"], "schedule"),
        ("", ["--task.kind=text"], "model.kind"),
        (MODEL, ["--task.kind=text", "--task.objective=mlm"], "model.kind"),
        ("", ["--task.kind=parity", "--task.degree=51"], "task"),
        ("", ["--loss.divergence=reverse_kl", "--loss.teacher_temperature=0"], "reverse_kl"),
        ("", ["--optimizer.momentum=0.9"], "optimizer.momentum"),
        ("", ["--trajectory.steps=[2000]"], "trajectory.steps"),
        ("", ["--model.width=4"], "model.kind: missing; it says which settings the section has"),
        ("", ["--model.kind=mpl"], "model.kind: unknown model 'mpl'; the nearest is 'mlp', of bert, gpt, llama, mlp, modernbert"),
        ("", ["--task.kind=[text]"], "task.kind: unknown task"),
        ("", ["--model=3"], "model: Input should be a valid dictionary"),
        ("", ["--model.kind=mlp", "--model.width=0"], "model.width: Input should be greater than or equal to 1 (got 0)"),
        ("", ["--optimizer.momentum=0.9"], "optimizer.momentum: AdamW has none"),
        ("", ["--training.micro_batch=3"], "training.micro_batch: 3 does not divide training.global_batch 256"),
        ("teacher: {trajectory: x, signal: argmax}\nschedule: {policy: one_shot}\n", [], "teacher.signal"),
        ("teacher: {trajectory: x}\nschedule: {policy: explicit, ranges: [{start: 1, checkpoint: 1}]}\n", [], "schedule.ranges"),
        ("", ["--trajectory.steps=[0]"], "trajectory.steps"),
        (TAUGHT, ["--teacher.carrier=served"], "endpoints"),
        (TAUGHT, ["--teacher.endpoints=[localhost:8470]"], "endpoints"),
        (TAUGHT, ["--teacher.carrier=cached"], "cache"),
        (TAUGHT, ["--teacher.on_failure=cache"], "on_failure"),
        (TAUGHT, ["--teacher.on_failure=labels"], "on_failure"),
        (TAUGHT, ["--teacher.k=3"], "k:"),
        (TAUGHT, ["--teacher.signal=dense", "--teacher.encoding=int8"], "encoding"),
        (TAUGHT, ["--teacher.key=x"], "certificate"),
        (TAUGHT, ["--teacher.server.client_authority=x"], "client_authority"),
        (TAUGHT, ["--teacher.server.key=x"], "certificate"),
        (TAUGHT, ["--teacher.deadline_seconds=600"], "teacher.deadline_seconds"),
        (TAUGHT, ["--teacher.signal=topk", "--loss.teacher_temperature=0"], "teacher.signal"),
        (TAUGHT, ["--teacher.signal=sampled", "--loss.divergence=jsd"], "teacher.signal"),
        ("teacher: {}\nschedule: {policy: one_shot}\n", [], "trajectory"),
        ("", ["--lr.warmup=5000"], "lr.warmup"),
        ("", ["--lr.kind=wsd", "--lr.decay=1001"], "lr.decay"),
        ("", ["--optimizer.betas=[0.9, 1.5]"], "optimizer.betas"),
        ("", ["--optimizer.lr=.inf"], "optimizer.lr"),
        ("", ["--training.precision=fp16", "--training.zero_stage=0"], "training.precision"),
        ("1: 2\n", [], "run.yaml"),
        ("- a list\n", [], "run.yaml"),
        ("a: [\n", [], "run.yaml"),
        ("", ["training.steps=3"], "training.steps=3"),
        ("", ["--training.steps"], "--section.key=value"),
    ],
)
def test_refusals_name_the_setting_in_one_line(tmp_path, text, overrides, setting):
    with pytest.raises(UserError, match=r".") as refusal:
        load(write(tmp_path, text or "name: given\n"), overrides)
    assert setting in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_an_unknown_variable_is_refused(monkeypatch):
    monkeypatch.setenv("MEGAPD_TRAINNG__STEPS", "3")
    with pytest.raises(UserError, match="MEGAPD_TRAINNG__STEPS"):
        load(None)
    monkeypatch.delenv("MEGAPD_TRAINNG__STEPS")
    monkeypatch.setenv("MEGAPD_TRAINING__STEP", "3")
    with pytest.raises(UserError, match=r"training\.step: unknown"):
        load(None)


def test_a_variable_gives_a_list_of_a_kind(monkeypatch):
    monkeypatch.setenv("MEGAPD_TEACHER__TRAJECTORY", "x")
    monkeypatch.setenv("MEGAPD_SCHEDULE__POLICY", "explicit")
    monkeypatch.setenv("MEGAPD_SCHEDULE__RANGES", '[{"start": 0, "checkpoint": 3}]')
    assert load(None).schedule == ExplicitConfig(ranges=(RangeConfig(start=0, checkpoint=3),))
    monkeypatch.setenv("MEGAPD_SCHEDULE__RANGES", "[3")
    with pytest.raises(UserError, match=r"schedule\.ranges"):
        load(None)


def test_a_variable_that_is_no_section_is_refused(monkeypatch):
    monkeypatch.setenv("MEGAPD_TRAINING", "foo")
    with pytest.raises(UserError, match="training"):
        load(None)


def test_defaults_are_a_whole_run():
    config = load(None)
    assert isinstance(config, Config)
    assert config.folder.name == "run"


@pytest.fixture
def guarded(monkeypatch):
    """A task of another package that has a secret."""

    class GuardedConfig(TaskConfig):
        kind: Literal["guarded"] = "guarded"
        key: SecretStr = SecretStr("")
        source: str = ""

    monkeypatch.setitem(tasks._entries, "guarded", GuardedConfig)


def test_secrets_of_other_packages_are_masked(tmp_path, guarded):
    given = "task: {kind: guarded, key: planted-key, source: 'https://me:planted-word@host/x'}\n"
    config = load(write(tmp_path, given))
    assert config.task.key.get_secret_value() == "planted-key"
    assert "planted" not in dump(config) + str(public_tree(config))
    masked = public_tree(config)
    assert masked["task"]["key"] == "**********"
    assert complete(masked) == (masked, [])
    assert load(write(tmp_path, dump(config))).task.kind == "guarded"
    changed = load(write(tmp_path, given.replace("planted-key", "another-key")))
    assert changed_settings(tmp_path, masked, changed, []) == {}  # it is not compared


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:w0rd@h:1/n", "postgresql://u:**********@h:1/n"),
        ("postgresql://u:w/0@r?d@h/n", "postgresql://u:**********@h/n"),
        ("postgresql://u@h/n?password=w0rd", "postgresql://u@h/n?password=**********"),
        ("sqlite:////a:b@c/d.db", "sqlite:////a:b@c/d.db"),
    ],
)
def test_a_database_is_shown_without_its_password(url, shown):
    config = load(None, [f"--scheduler.database={url}"])
    assert str(config.scheduler.database) == public_tree(config)["scheduler"]["database"] == shown
    assert "w0rd" not in repr(config)
    again = load(None, [f"--scheduler.database={shown}"])
    if shown == url:
        assert again.scheduler.database.reveal("scheduler.database") == url
        return
    with pytest.raises(UserError, match=r"^scheduler\.database: .*MEGAPD_SCHEDULER__DATABASE"):
        again.scheduler.database.reveal("scheduler.database")


@pytest.mark.parametrize("token", ["megapd_" + "x" * 43, "0123456789abcdef" * 4, "abc/" * 10 + "abc="])
def test_a_token_in_the_place_of_its_file(token):
    for setting in ("scheduler.token", "teacher.token"):
        with pytest.raises(UserError, match="this looks like a token") as error:
            load(None, ["--teacher.trajectory=x", "--schedule.policy=one_shot", f"--{setting}={token}"])
        assert token not in str(error.value)
    load(None, ["--scheduler.token=secrets/production/scheduler/administrator"])


# ------------------------------------------------------------------------------------------------- mistakes, told in a line


def told(path, *overrides):
    with pytest.raises(UserError) as raised:
        load(path, list(overrides))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("content", ["", "# nothing\n", "{}\n", "---\n"])
def test_a_file_without_settings(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    assert f"{tmp_path / 'c.yaml'}: holds no settings" in told(tmp_path / "c.yaml")


@pytest.mark.parametrize("content", ["seed: 1\nname: a\nseed: 2\n", "model:\n  kind: mlp\n  width: 3\n  width: 4\n"])
def test_a_key_that_stands_twice(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    key, first, second = ("seed", 1, 3) if content.startswith("seed") else ("width", 3, 4)
    assert f"the key {key!r} stands in line {first} and again in line {second}" in told(tmp_path / "c.yaml")


def test_a_key_that_stands_twice_on_the_command_line():
    assert "--model" in told(None, "--model={kind: mlp, kind: gpt}")


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("--optimizer.lrr=0.1", "optimizer.lr"),
        ("--traning.steps=4", "training"),
        ("--model={kind: gpt, layer: 2}", "model.layers"),
        ("--schedule={policy: equal, checkpints: 2, steps: 3}", "schedule.checkpoints"),
        ("--teacher={trajectory: t, server: {replica: 2}}", "teacher.server.replicas"),
    ],
)
def test_the_setting_that_was_meant(override, meant):
    others = ["--teacher.trajectory=t"] if override.startswith("--schedule") else []
    others += ["--schedule={policy: one_shot}"] if override.startswith("--teacher") else []
    assert f"unknown setting; did you mean {meant}" in told(None, override, *others)


def test_a_setting_like_no_other_is_only_unknown():
    message = told(None, "--optimizer.zzzzzz=1")
    assert "optimizer.zzzzzz: unknown setting" in message
    assert "did you mean" not in message


def test_a_variable_that_was_meant(monkeypatch):
    monkeypatch.setenv("MEGAPD_TRANING__STEPS", "4")
    assert "did you mean TRAINING" in told(None)


def test_another_kind_replaces_the_files_section(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("task: {kind: text, objective: clm}\nmodel: {kind: gpt, layers: 3, hidden: 32, heads: 2}\n")
    config = load(path, ["--model={kind: mlp, width: 9}", "--task.kind=parity"])
    assert (config.model.kind, config.model.width, config.task.kind) == ("mlp", 9, "parity")
    assert (
        load(path, ["--model.kind=gpt", "--model.hidden=64"]).model.layers == 3
    )  # the same kind: the file's other settings stay
    assert "layers" not in load(path, ["--model.kind=mlp", "--task.kind=parity"]).model.model_fields_set
    monkeypatch.setenv("MEGAPD_MODEL__KIND", "mlp")
    monkeypatch.setenv("MEGAPD_TASK__KIND", "parity")
    assert load(path).model.kind == "mlp"


def test_a_corpus_without_a_task(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("corpus: {output: here, sources: [{path: a.txt}]}\n")
    config = load(path)  # enough for `megapd prepare`
    with pytest.raises(UserError, match=r"task: the configuration has a corpus, and no task .*; add task: \{kind: text"):
        build_task(config)

"""Published checkpoints as a trajectory: names, folders, digests; the hub is replaced by a function."""

import hashlib
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from megapd.errors import UserError
from megapd.files import sha256_file
from megapd.trajectory import CheckpointTimeout
from megapd.trajectory.hugging_face import HuggingFaceTrajectory, is_hugging_face

from .checkpoints import write


def save(folder, value=0.0, files=1, **others):
    """A checkpoint with weights of one value; others: contents of further files by name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "vocab_size": 9}))
    tensors = {f"w{i}": torch.full((2,), value + i) for i in range(files)}
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        weight_map = {name: f"model-{i + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(tensors)}
        for name, file in weight_map.items():
            save_file({name: tensors[name]}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, content in others.items():
        (folder / name.replace("_json", ".json").replace("_model", ".model")).write_text(content)
    return folder


# ------------------------------------------------------------------------------------------------------------ local folders


@pytest.mark.parametrize(
    ("pattern", "folders", "steps"),
    [
        ("pythia/step_{step}", {"pythia/step_0": 0, "pythia/step_512": 512, "pythia/step_1000": 1000}, (0, 512, 1000)),
        (
            "bert-step_{kstep}k/hf",
            {"bert-step_0k/hf": 0, "bert-step_20k/hf": 20000, "bert-step_140k/hf": 140000},
            (0, 20000, 140000),
        ),
        ("s{step}/again-{step}", {"s3/again-3": 3, "s12/again-12": 12}, (3, 12)),
        ("odd[x]*/step{step}", {"odd[x]*/step7": 7}, (7,)),
    ],
)
def test_folders_are_found_by_their_pattern(tmp_path, pattern, folders, steps):
    for number, name in enumerate(folders):
        save(tmp_path / name, float(number))
    for name in ("pythia/step_", "pythia/step_007", "pythia/step_5.tmp", "bert-step_3/hf", "s3/again-4", "oddx/step9"):
        save(tmp_path / name)
    (tmp_path / "pythia/step_9").mkdir()
    (tmp_path / "pythia/step_11").write_text("no folder")
    spec = str(tmp_path / pattern)
    if "*" in pattern:
        spec = str(tmp_path) + "/" + pattern
    assert is_hugging_face(spec)
    trajectory = HuggingFaceTrajectory(spec, ())
    assert trajectory.steps == steps
    assert trajectory.incomplete == ()
    for name, step in folders.items():
        assert trajectory.checkpoint(step).path == tmp_path / name
    assert HuggingFaceTrajectory(spec, (steps[-1],)).steps == steps[-1:]
    assert trajectory.verify() == []


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("model", 1),
        ("step3000", 3000),
        ("x-step_20k", 20000),
        ("step-7-final", 7),
        ("stepwise2", 1),
        ("step_4/step_5", 5),
        ("step_4/model", 1),
        ("step0", 0),
    ],
)
def test_one_folder_has_the_step_of_its_name(tmp_path, name, step):
    folder = save(tmp_path / name)
    trajectory = HuggingFaceTrajectory(str(folder), ())
    assert trajectory.steps == (step,)
    assert trajectory.checkpoint(step).path == folder
    told = [
        note
        for note in trajectory.notes(trajectory.steps)
        if f"{folder} names no training step" in note and "called step 1;" in note
    ]
    assert len(told) == len(trajectory.notes(trajectory.steps)) == (step == 1)
    assert HuggingFaceTrajectory(str(folder), (77,)).notes((77,)) == ()
    assert HuggingFaceTrajectory(str(folder), (77,)).checkpoint(77).path == folder
    with pytest.raises(UserError, match=r"^teacher\.steps: 2 steps, but teacher\.trajectory .* has no \{step\}"):
        HuggingFaceTrajectory(str(folder), (1, 2))


def test_a_checkpoint_tells_everything_but_the_weights(tmp_path):
    folder = save(tmp_path / "step_5", files=2, tokenizer_model="pieces", README="not ours")
    checkpoint = HuggingFaceTrajectory(str(tmp_path / "step_{step}"), ()).checkpoint(5)
    assert checkpoint.step == 5
    assert checkpoint.config == {"hugging_face": {"model_type": "gpt_neox", "vocab_size": 9}}
    assert checkpoint.vocabulary == hashlib.sha256(b"pieces").hexdigest()
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(checkpoint.files) == sorted([*weights, "config.json", "tokenizer.model"])
    for name, file in checkpoint.files.items():
        assert (file.sha256, file.bytes) == (sha256_file(folder / name), (folder / name).stat().st_size)
    lines = "".join(f"{name} {sha256_file(folder / name)}\n" for name in weights)
    assert checkpoint.digest == hashlib.sha256(lines.encode()).hexdigest()
    # The digest names the weights alone.
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.model").unlink()
    again = HuggingFaceTrajectory(str(folder), ()).checkpoint(5)
    assert (again.digest, again.vocabulary) == (checkpoint.digest, "")


def test_equal_weights_at_different_steps_are_reported(tmp_path):
    for step, value in ((1, 0.0), (2, 5.0), (3, 0.0)):
        save(tmp_path / f"step_{step}", value)
    (problem,) = HuggingFaceTrajectory(str(tmp_path / "step_{step}"), ()).verify()
    assert "steps 1, 3 have the same weights" in problem


def test_a_copy_that_stopped_midway(tmp_path):
    save(tmp_path / "step_1")
    folder = save(tmp_path / "step_2", files=2)
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    trajectory = HuggingFaceTrajectory(str(tmp_path / "step_{step}"), ())
    assert (trajectory.steps, trajectory.incomplete) == ((1,), (2,))
    assert not trajectory.written(2)
    assert trajectory.verify() == [f"{folder}: it lacks {shard.name}"]
    with pytest.raises(UserError, match=r"^teacher\.trajectory: .* has no checkpoint of step 2; the nearest are 1"):
        trajectory.checkpoint(2)
    with pytest.raises(CheckpointTimeout, match="step 2 after 0 s"):
        trajectory.wait_for(2, 0.0)
    shard.write_bytes(content)
    assert trajectory.wait_for(2, 0.0).step == 2
    assert trajectory.refresh() == (1, 2)
    with pytest.raises(UserError, match=r"no checkpoint of transformers matches .*nothing"):
        HuggingFaceTrajectory(str(tmp_path / "nothing_{step}"), ())


def test_damaged_folders_are_told(tmp_path):
    folder = save(tmp_path / "step_1", files=2)
    index = folder / "model.safetensors.index.json"
    for content, message in (
        ("{", "not valid JSON"),
        ('{"weight_map": {"w": "../x"}}', "no usable weight_map"),
        ("[]", "no JSON"),
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=message):
            HuggingFaceTrajectory(str(folder), ())
    index.unlink()
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text("nothing")
    with pytest.raises(UserError, match=r"config\.json: damaged, not valid JSON"):
        HuggingFaceTrajectory(str(folder), ()).checkpoint(1)


def test_what_is_of_transformers_and_what_is_not(tmp_path):
    write(tmp_path / "own", 5)
    save(tmp_path / "theirs" / "step_1")
    assert not is_hugging_face(str(tmp_path / "own"))
    assert not is_hugging_face(str(tmp_path / "own" / "step_5"))
    assert not is_hugging_face(str(tmp_path / "own" / "step_{step}"))
    assert not is_hugging_face(str(tmp_path / "absent"))
    assert not is_hugging_face(str(tmp_path / "theirs"))
    for spec in ("theirs/step_1", "theirs/step_{step}", "absent/step_{step}"):
        assert is_hugging_face(str(tmp_path / spec))
    assert is_hugging_face("hf:EleutherAI/pythia-160m")


# ------------------------------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with three revisions of one repository, and repositories of .bin files; `asked` are the downloads."""
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision, tuple(allow_patterns)))
        assert ignore_patterns == ["*/*"]
        folder = tmp_path / "cache" / repo.replace("/", "--") / (revision or "main")
        if repo == "no/where":
            raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the requested files\nin the cache")
        if repo == "a/bug":
            raise AttributeError("of ours")
        if not folder.exists():
            save(folder, float(len(asked)))
            if "multiberts" in repo:
                (folder / "model.safetensors").unlink()
        if "multiberts" in repo and "pytorch_model.bin" in allow_patterns:
            torch.save({"w0": torch.full((2,), float(len(asked)))}, folder / "pytorch_model.bin")
        return str(folder)

    def list_repo_refs(self, repo):
        if repo == "no/where":
            raise ConnectionError("no network")
        names = ("main", "step0", "step512", "step1000", "step1000-old")
        return SimpleNamespace(branches=[SimpleNamespace(name=n) for n in names], tags=[SimpleNamespace(name="step143000")])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_refs", list_repo_refs)
    return asked


def test_revisions_are_listed_and_fetched_once(hub, tmp_path):
    trajectory = HuggingFaceTrajectory("hf:EleutherAI/pythia-160m@step{step}", ())
    assert trajectory.steps == (0, 512, 1000, 143000)
    assert hub == []
    assert trajectory.written(512)
    assert not trajectory.written(513)
    first = trajectory.checkpoint(512)
    assert trajectory.wait_for(512, 0.0) == first
    assert first.path == tmp_path / "cache/EleutherAI--pythia-160m/step512"
    ((repo, revision, patterns),) = hub
    assert (repo, revision) == ("EleutherAI/pythia-160m", "step512")
    assert {"config.json", "tokenizer.model", "model.safetensors", "model-*.safetensors"} < set(patterns)
    assert not any(pattern.endswith((".bin", ".msgpack", ".h5")) for pattern in patterns)
    assert trajectory.checkpoint(1000).digest != first.digest
    with pytest.raises(UserError, match="no checkpoint of step 513; the nearest are 0, 512, 1000, 143000"):
        trajectory.checkpoint(513)


def test_repositories_a_step_need_the_steps(hub):
    spec = "hf:google/multiberts-seed_0-step_{kstep}k"
    with pytest.raises(UserError, match=r"^teacher\.steps: .* list the steps in teacher\.steps"):
        HuggingFaceTrajectory(spec, ())
    with pytest.raises(UserError, match=r"^teacher\.steps: 20500 is no multiple of 1000"):
        HuggingFaceTrajectory(spec, (20000, 20500))
    trajectory = HuggingFaceTrajectory(spec, (40000, 20000))
    assert trajectory.steps == (20000, 40000)
    checkpoint = trajectory.checkpoint(20000)
    assert "pytorch_model.bin" in checkpoint.files
    assert [(repo, revision) for repo, revision, _ in hub] == [("google/multiberts-seed_0-step_20k", None)] * 2
    assert ["pytorch_model.bin" in patterns for *_, patterns in hub] == [False, True]


def test_one_revision(hub):
    trajectory = HuggingFaceTrajectory("hf:EleutherAI/pythia-160m@step3000", ())
    assert trajectory.steps == (3000,)
    assert trajectory.checkpoint(3000).step == 3000
    assert hub[0][:2] == ("EleutherAI/pythia-160m", "step3000")
    assert HuggingFaceTrajectory("hf:gpt2", ()).steps == (1,)


def test_what_the_hub_refuses_is_told(hub):
    with pytest.raises(
        UserError, match=r"^teacher\.trajectory: the revisions of no/where cannot be listed: no network; .*teacher\.steps"
    ):
        HuggingFaceTrajectory("hf:no/where@step{step}", ())
    with pytest.raises(UserError, match=r"^teacher\.trajectory: no branch or tag of a/b is called s{step}"):
        HuggingFaceTrajectory("hf:a/b@s{step}", ())
    with pytest.raises(UserError, match=r"no/where@step5 cannot be fetched: cannot find the requested files in the cache; check"):
        HuggingFaceTrajectory("hf:no/where@step{step}", (5,)).checkpoint(5)
    with pytest.raises(AttributeError, match="of ours"):
        HuggingFaceTrajectory("hf:a/bug", ()).checkpoint(1)

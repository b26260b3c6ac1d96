"""Published teachers in, students out: each stand-in through the command line, from the hub's cache to transformers."""

from __future__ import annotations

import json
import shutil

import httpx
import huggingface_hub
import pytest
import torch
import transformers
import yaml

from megapd.cli import main
from megapd.config import load
from megapd.models import load_hugging_face
from megapd.tasks import build_task
from megapd.tasks.blocks import read_meta
from megapd.tokenization import digests, open_tokenizer
from tests import standins
from tests.corpus import corpora

pytestmark = pytest.mark.slow

STYLES = {"pythia": "gpt", "olmo": "gpt", "llama": "gpt", "bert": "bert"}
STUDENTS = {
    "pythia": "kind: gpt",
    "olmo": "kind: llama, ffn: 64, qk_norm: whole, norm_place: after",
    "llama": "kind: llama, ffn: 64, kv_heads: 1, tied: true",
    "bert": "kind: modernbert, local_window: 8",
}
SAMPLES = 16


def families():
    return list(STYLES)


def configuration(folder, family, spec):
    objective = "mlm" if STYLES[family] == "bert" else "clm"
    steps = ", ".join(map(str, standins.STEPS))
    (folder / "run.yaml").write_text(f"""
name: student
runs_dir: {folder}/runs
corpus:
  output: {folder}/corpus
  sources: [{{path: {folder}/text.jsonl}}]
  block_length: {standins.LENGTH}
  heldout_fraction: 0.2
task: {{kind: text, objective: {objective}}}
model: {{{STUDENTS[family]}, layers: 2, heads: 2, hidden: 32}}
teacher: {{trajectory: "{spec}", steps: [{steps}]}}
schedule: {{policy: equal, checkpoints: 3, steps: 2}}
training: {{steps: 6, global_batch: 8}}
checkpoint: {{every: 4}}
trajectory: {{every: 3, export: true}}
evaluation: {{samples: {SAMPLES}}}
telemetry: {{wandb: disabled, progress: false}}
""")
    return str(folder / "run.yaml")


@pytest.fixture(scope="module", params=families())
def made(request, tmp_path_factory):
    """(family, folder) in which a student was taught by a stand-in and exported; the hub is its cache alone."""
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "home" / "hub"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        corpora.write_jsonl(folder / "text.jsonl", corpora.documents(200))
        spec = standins.build(folder / "home", folder / "scratch", family)
        yaml = configuration(folder, family, spec)
        steps = ",".join(map(str, standins.STEPS))
        assert main(["prepare", yaml, "--like"]) == 0
        assert main(["trajectory", "verify", spec, "--steps", steps]) == 0
        assert main(["trajectory", "list", spec, "--steps", steps]) == 0
        assert main(["train", yaml]) == 0
        assert main(["evaluate", str(folder / "runs/student")]) == 0
        assert main(["export", str(folder / "runs/student"), str(folder / "out")]) == 0
        yield family, folder


def test_the_vocabulary_is_proved(made):
    """The corpus has the teacher's tokenizer and number of ids, which nobody had to vouch for."""
    family, folder = made
    meta = read_meta(folder / "corpus")["tokenizer"]
    assert meta["digest"] in digests(folder / "scratch" / family / "1000")
    assert meta["vocab_size"] == standins.MODELS[family][1]
    assert meta["style"] == STYLES[family]
    text = (folder / "runs/student/metrics.jsonl").read_text()
    rotations = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "rotation"]
    assert [line["teacher_step"] for line in rotations] == list(standins.STEPS)


def test_transformers_reads_what_was_exported(made):
    family, folder = made
    out, texts = folder / "out", corpora.documents(40, seed=9)
    theirs, own = transformers.AutoTokenizer.from_pretrained(out), open_tokenizer(str(folder / "corpus"))
    assert theirs(texts, add_special_tokens=False)["input_ids"] == [ids.tolist() for ids in own.encode(texts)]
    assert theirs.model_max_length == standins.LENGTH
    if STYLES[family] == "bert":
        filled = transformers.pipeline("fill-mask", model=str(out), device="cpu")("ka lo [MASK] mi", top_k=3)
        assert len(filled) == 3
        assert all("ka lo" in one["sequence"] for one in filled)
        assert not (out / "generation_config.json").exists()
    else:
        write = transformers.pipeline("text-generation", model=str(out), device="cpu")
        (written,) = write("ka lo", max_new_tokens=5, do_sample=False)
        assert written["generated_text"].startswith("ka lo")
        assert write.model.generation_config.eos_token_id == theirs.eos_token_id == write.model.config.eos_token_id


def test_perplexity_is_that_of_evaluate(made):
    """Plain transformers over the held-out samples, against evaluation.json."""
    family, folder = made
    auto = transformers.AutoModelForMaskedLM if STYLES[family] == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder / "out").eval()
    batch = build_task(load(folder / "run.yaml")).heldout(range(SAMPLES))
    with torch.no_grad():
        logits = model(input_ids=batch.ids).logits.flatten(0, 1)[batch.positions]
    loss = torch.nn.functional.cross_entropy(logits.double(), batch.labels).item()
    (*_, last) = json.loads((folder / "runs/student/evaluation.json").read_text())
    assert last["step"] == 6
    assert loss == pytest.approx(last["loss"], abs=1e-5)


def test_an_export_teaches(made):
    """The exported folder as a teacher: its vocabulary is proved, and what is learnt from it is bitwise what is learnt from the
    trajectory that it was made of."""
    _, folder = made
    shutil.rmtree(folder / "runs/again", ignore_errors=True)
    one_shot = "--schedule={policy: one_shot, checkpoint: 6}"
    teacher = f"--teacher={{trajectory: {folder}/out, steps: [6]}}"
    assert main(["train", str(folder / "run.yaml"), "--name=again", teacher, one_shot, "--training.steps=2"]) == 0
    own = f"--teacher={{trajectory: {folder}/runs/student/trajectory}}"
    assert main(["train", str(folder / "run.yaml"), "--name=own", own, one_shot, "--training.steps=2"]) == 0
    losses = []
    for name in ("again", "own"):
        lines = map(json.loads, (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("step", "source"), [(3, "trajectory"), (4, "checkpoints"), (6, "trajectory")])
def test_any_step_with_weights(made, tmp_path, step, source, capsys):
    _, folder = made
    assert main(["export", str(folder / "runs/student"), str(tmp_path / "out"), "--step", str(step), "--dtype", "bf16"]) == 0
    assert f"{source}/step_{step}" in capsys.readouterr().out
    _, learner = load_hugging_face(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(torch.equal(p, p.bfloat16().float()) for p in learner.parameters())
    card = (tmp_path / "out/README.md").read_text()
    assert f"- step: {step} of 6" in card
    assert "| 0 | 1,000 |" in card
    assert ("| 4 | 3,000 |" in card) == (step > 4)


def test_what_cannot_be_exported(made, tmp_path, capsys):
    _, folder = made

    def refused(*arguments):
        assert main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    student = folder / "runs/student"
    assert "no checkpoint of step 5; there are 3, 4, 6" in refused(student, tmp_path / "out", "--step=5").replace(
        "5; there are 3, 6", ""
    )
    assert "exists already" in refused(student, folder / "out")
    assert "no such configuration file" in refused(folder / "runs/nobody", tmp_path / "out")
    shutil.copytree(folder / "corpus", tmp_path / "corpus")
    moved = shutil.copytree(student, tmp_path / "moved")
    shutil.rmtree(tmp_path / "corpus")
    told = refused(moved, tmp_path / "out", f"--corpus.output={tmp_path / 'corpus'}")
    assert "holds no prepared corpus" in told
    assert not (tmp_path / "out").exists()


def test_every_checkpoint_may_be_exported(made):
    _, folder = made
    exports = folder / "runs/student/exports"
    assert sorted(path.name for path in exports.iterdir()) == ["step_3", "step_6"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (exports / "step_6" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_another_tokenizer_is_refused_with_both_digests(made, tmp_path, capsys):
    family, folder = made
    if family != "pythia":
        pytest.skip("one merge: byte-level BPE")
    other = shutil.copytree(folder / "scratch" / "pythia" / "1000", tmp_path / "teacher")
    tree = json.loads((other / "tokenizer.json").read_text())
    merges = tree["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    teacher = f"--teacher={{trajectory: {other}, steps: [1]}}"
    one_shot = "--schedule={policy: one_shot, checkpoint: 1}"
    assert main(["train", str(folder / "run.yaml"), "--name=other", teacher, one_shot]) == 2
    told = capsys.readouterr().err
    assert digests(other)[0][:12] in told
    assert read_meta(folder / "corpus")["tokenizer"]["digest"][:12] in told
    assert "--like" in told


@pytest.mark.parametrize("offline", [True, False])
def test_a_repository_that_is_not_there(tmp_path, monkeypatch, capsys, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    if not offline:

        def gated(*_, **__):
            raise huggingface_hub.errors.GatedRepoError("403: access is restricted", response=httpx.Response(403, request=ask))

        ask = httpx.Request("GET", "http://127.0.0.1")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    corpora.write_jsonl(tmp_path / "text.jsonl", corpora.documents(50))
    yaml = configuration(tmp_path, "pythia", "hf:nobody/nothing@step{step}")
    for arguments in (
        ["prepare", yaml, "--like"],
        ["prepare", yaml, "--corpus.tokenizer.model=hf:nobody/nothing"],
        ["train", yaml],
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "nobody/nothing" in line or "no prepared corpus" in line
        assert not (tmp_path / "corpus").exists()


def test_one_command(made, tmp_path, capsys):
    """Verify, prepare, train, export; again, nothing is done twice; with other arguments it is refused."""
    family, folder = made
    spec, steps = standins.specification(family), ",".join(map(str, standins.STEPS))
    arguments = ["distil", spec, "--steps", steps, "--student", "1x2x16", "--data", str(folder / "text.jsonl")]
    settings = ["--training.steps=6", "--training.global_batch=8", "--telemetry.wandb=disabled"]
    whole = [*arguments, "--output", str(tmp_path / "out"), *settings]
    assert main(whole) == 0
    told = capsys.readouterr().out
    assert "3 checkpoints verified" in told
    assert "bytes a labelled position" in told
    tree = yaml.safe_load((tmp_path / "out/distil.yaml").read_text())
    assert tree["schedule"]["ranges"] == [{"start": i * 2, "checkpoint": step} for i, step in enumerate(standins.STEPS)]
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert config["model_type"] == standins.MODELS[family][0]  # the teacher's own architecture
    assert config["vocab_size"] == standins.MODELS[family][1]
    assert (tmp_path / "out/model/README.md").is_file()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/model").iterdir()}
    assert main(whole) == 0
    told = capsys.readouterr()
    assert "verified already" in told.out
    assert "exported already" in told.out
    assert "already prepared" in told.err
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/model").iterdir()}
    assert main([*whole, "--optimizer.lr=0.5"]) == 2
    assert "was made with another optimizer.lr" in capsys.readouterr().err
    assert main(["distil", spec, "--steps", steps, "--student", "huge", "--data", "x", "--output", str(tmp_path / "other")]) == 2
    assert "'huge' is no size" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_probe_gives_metrics(made, tmp_path, monkeypatch, capsys):
    """Losses of checkpoints that carry none; measured once."""
    from megapd.evaluation import probe

    _, folder = made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["trajectory", "suggest", str(folder / "run.yaml"), "--output", str(tmp_path / "t.png")]
    assert main(arguments) == 2
    assert "--probe SAMPLES" in capsys.readouterr().err
    code = main([*arguments, "--probe", "8"])  # of random teachers: they may show no transition, and that is told
    told = capsys.readouterr()
    assert "eval/loss" in (told.out if code == 0 else told.err)
    files = sorted((tmp_path / "megapd" / "probes").iterdir())
    assert len(files) == len(standins.STEPS)
    losses = sorted(json.loads(file.read_text())["loss"] for file in files)
    assert all(1 < loss < 20 for loss in losses)
    assert len(set(losses)) == len(losses)
    monkeypatch.setattr(probe, "load_teacher", lambda *_: pytest.fail("measured again"))
    assert main([*arguments, "--probe", "8"]) == code
    assert capsys.readouterr() == told


def test_like_a_run_of_megapds_own(made, tmp_path, capsys):
    """The corpus that the run learnt on has its tokenizer, whatever it was."""
    family, folder = made
    corpora.write_jsonl(tmp_path / "text.jsonl", corpora.documents(60, seed=8))
    objective = "mlm" if STYLES[family] == "bert" else "clm"
    base = [
        f"--corpus.output={tmp_path}/corpus",
        f"--corpus.sources=[{{path: {tmp_path}/text.jsonl}}]",
        "--corpus.block_length=16",
        "--corpus.heldout_fraction=0.3",
        f"--task={{kind: text, objective: {objective}}}",
        f"--model={{{STUDENTS[family]}, layers: 1, heads: 2, hidden: 16}}",
    ]
    assert main(["prepare", "--like", str(folder / "runs/student/trajectory"), *base]) == 0
    own, theirs = (read_meta(path / "corpus")["tokenizer"] for path in (tmp_path, folder))
    assert all(own[key] == theirs[key] for key in ("digest", "vocab_size", "roles", "style"))
    capsys.readouterr()
    assert main(["prepare", *base, "--like"]) == 2
    assert "--like: name a teacher, or set teacher.trajectory" in capsys.readouterr().err
    assert main(["prepare", "--like", str(folder / "out"), *base, "--corpus.tokenizer.model=other.json"]) == 2
    assert "corpus.tokenizer.model: other.json, but --like would take" in capsys.readouterr().err


def test_the_student_is_of_its_teachers_family(made):
    """Of megapd's own trajectory, too: masked or causal by what the family is, with its options and without its sizes."""
    from megapd.commands.distil import _student
    from megapd.trajectory import Trajectory

    family, folder = made
    trajectory = Trajectory(folder / "runs/student/trajectory")
    causal, section = _student(trajectory.checkpoint(6), "1x2x16")
    assert causal == (STYLES[family] == "gpt")
    options = {
        "pythia": {"kind": "gpt"},
        "olmo": {"kind": "llama", "qk_norm": "whole", "norm_place": "after"},
        "llama": {"kind": "llama", "tied": True},
        "bert": {"kind": "modernbert", "local_window": 8},
    }
    assert section == {**options[family], "layers": 1, "heads": 2, "hidden": 16}

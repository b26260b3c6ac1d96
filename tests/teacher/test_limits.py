"""A teacher's limits are held against the task in one place, whatever carries its signals, before a run's folder is made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megapd.commands.dry_run import dry_run
from megapd.commands.record import record_signals
from megapd.config import load
from megapd.errors import SignalNotFinite, UserError
from megapd.models import Shape, build_teacher, checkpoint_shape
from megapd.models.pretrained import OFFSET_POSITIONS
from megapd.schedule.plan import Plan
from megapd.tasks import build_task
from megapd.teacher.engine.holders import Holder
from megapd.teacher.limits import Demands, check_teachers, excess
from megapd.training import train
from megapd.trajectory import Checkpoint
from tests.corpus import corpora
from tests.teacher.serving import FakeReplica, FakeTrajectory, batches_of, served, stream_of

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
MODELS = Path(transformers.__file__).parent / "models"
LENGTH = 32  # of the corpus' blocks


def model(kind, classes=320, positions=LENGTH, **others):
    """A checkpoint of transformers, described and without weights."""
    tree = {"model_type": kind, "vocab_size": classes, "max_position_embeddings": positions, **SIZES, **others}
    return Checkpoint(7, Path("there"), "", "", {"hugging_face": tree}, {}, {})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    corpora.prepared(folder, "bert")
    return folder / "corpus"


@pytest.fixture
def configured(corpus, tmp_path):
    """overrides -> a student's configuration over the corpus, whose ids are below 320."""

    def make(*overrides):
        common = [
            "--task={kind: text, objective: mlm, corpus: " + str(corpus) + "}",
            "--model={kind: bert, layers: 1, hidden: 16, heads: 2}",
            "--training={steps: 2, global_batch: 4}",
            "--evaluation.samples=8",
            "--telemetry={wandb: disabled, progress: false}",
            f"--runs_dir={tmp_path / 'runs'}",
            "--teacher.same_vocabulary=true",
            "--schedule.policy=one_shot",
        ]
        return load(None, [*common, *overrides])

    return make


def write(folder, checkpoint):
    """Its config.json beside a file that stands for weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(checkpoint.config["hugging_face"]))
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def save_bert(folder):
    """One that transformers saves, its weights random."""
    tree = {key: value for key, value in model("bert").config["hugging_face"].items() if key != "model_type"}
    transformers.BertForMaskedLM(transformers.BertConfig(**tree)).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("shape", "largest", "length", "told"),
    [
        (Shape(5, 2, 500, 64), 499, 64, ""),
        (Shape(5, 2, 500, 64), 500, 64, "id 500 is outside the teacher's vocabulary of 500"),
        (Shape(5, 2, 500, 64), 499, 65, "samples have 65 tokens, the teacher has positions for 64"),
        (Shape(5, 2, 500, None), 0, 1 << 20, ""),
    ],
)
def test_what_samples_exceed(shape, largest, length, told):
    assert excess(shape, largest, length) == told


@pytest.mark.parametrize(
    ("teacher", "common", "told"),
    [
        (model("bert"), False, None),
        (
            model("bert", 319),
            False,
            r"^teacher\.trajectory: there \(step 7\): id 319 .* of 319, and the task has 320 ids; choose",
        ),
        (model("bert", 319), True, r"^teacher\.trajectory: .*id 319 is outside"),
        (
            model("bert", 400),
            False,
            r"^loss\.common_vocabulary: there \(step 7\) has 400 classes, the student's task 320",
        ),
        (model("bert", 400), True, None),
        (
            model("bert", positions=31),
            False,
            r"^teacher\.trajectory: .*32 tokens.* positions for 31; shorten corpus\.b",
        ),
        (model("roberta", positions=33), False, r"positions for 31"),
        (model("roberta", positions=34), False, None),
        (model("roberta", positions=34, pad_token_id=2), False, r"positions for 31"),
        (model("roberta", positions=33, pad_token_id=0), False, None),
        (model("gpt2", n_positions=40), False, None),
        (model("t5", positions=None), False, None),
    ],
)
def test_a_task_is_held_against_a_teacher(teacher, common, told):
    demands = Demands("words", True, ids=320, length=LENGTH, classes=320, common_vocabulary=common)
    if told is None:
        return demands.check(teacher)
    with pytest.raises(UserError, match=told):
        demands.check(teacher)


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "bert"])
def test_the_limit_is_the_models_own(kind):
    checkpoint = model(kind, positions=40, pad_token_id=1)
    found = build_teacher(checkpoint, None)
    table = next(m for name, m in found.named_modules() if name.endswith(("position_embeddings", "body.positions")))
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    longest = table.num_embeddings if kind == "bert" else found.max_length  # megapd's own model, the others transformers'
    assert longest - (0 if kind != "bert" else first) == checkpoint_shape(checkpoint).length == 40 - first


def test_the_models_with_an_offset_are_those_of_transformers():
    """Where a model with a head for masked or next tokens counts positions from its padding id on."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    heads = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    found = set()
    for kind in heads:
        name = model_type_to_module_name(kind)
        for path in (MODELS / name).glob(f"modeling_{name}*.py"):
            text = path.read_text()
            if "position_embeddings = nn.Embedding" in text and "create_position_ids_from_input_ids" in text:
                found.add(kind)
    assert "roberta" in found
    assert found <= set(OFFSET_POSITIONS)


# ------------------------------------------------------------------------------------------------------------- every carrier

SMALL = model("bert", 300)


@pytest.mark.parametrize("common", ["false", "true"])
@pytest.mark.parametrize("carrier", ["colocated", "served", "shared_memory", "cached"])
def test_a_teacher_with_fewer_ids_is_refused_before_a_folder_is_made(configured, tmp_path, carrier, common):
    write(tmp_path / "t" / "step_3", model("bert"))
    write(tmp_path / "t" / "step_9", SMALL)
    others = {"cached": [f"--teacher.cache={tmp_path / 'cache'}"]}.get(carrier, [])
    if carrier in ("served", "shared_memory"):
        others = ["--teacher.endpoints=[grpc://127.0.0.1:9]"]  # where nobody is: it is refused before anybody is asked
    config = configured(
        f"--teacher.trajectory={tmp_path}/t/step_{{step}}",
        f"--teacher.carrier={carrier}",
        f"--loss.common_vocabulary={common}",
        *others,
    )
    for verb in (train, dry_run) + ((record_signals,) if carrier == "cached" else ()):
        with pytest.raises(UserError, match=r"^teacher\.trajectory: .*step_9 \(step 9\): id 319 .* of 300, .*320 ids"):
            verb(config)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()


def test_a_later_checkpoint_of_the_plan_is_looked_at_too(configured, tmp_path):
    write(tmp_path / "t" / "step_1", model("bert"))
    write(tmp_path / "t" / "step_2", SMALL)
    config = configured(f"--teacher.trajectory={tmp_path}/t/step_{{step}}", "--schedule={policy: matched, refresh: 1}")
    with pytest.raises(UserError, match=r"step_2 \(step 2\)"):
        train(config)


def test_the_catalogue_tells_a_students_limits(configured, tmp_path):
    """A student without the trajectory's folder refuses a served teacher by what its catalogue says."""
    with served(FakeReplica(FakeTrajectory(vocabulary=""))) as server:
        config = configured(f"--teacher.endpoints=[{server.address}]", "--teacher.carrier=served")
        with pytest.raises(UserError, match=r"id 319 is outside the teacher's vocabulary of 300"):
            train(config)
    assert not (tmp_path / "runs").exists()


def test_ids_that_the_student_lacks_cannot_be_named_to_it(configured, tmp_path):
    write(tmp_path / "t" / "step_9", model("bert", 400))
    common = [f"--teacher.trajectory={tmp_path}/t/step_{{step}}", "--loss.common_vocabulary=true"]
    with pytest.raises(UserError, match=r"^teacher\.signal: topk names classes by ids up to 399, the student has 320; choose"):
        dry_run(configured(*common, "--teacher.signal=topk"))
    dry_run(configured(*common, "--teacher.signal=hidden"))


def test_what_is_not_written_yet_is_not_looked_at(configured, tmp_path):
    class Nothing(FakeTrajectory):
        remote = False

        def written(self, step):
            return False

    config = configured("--teacher.trajectory=x")
    check_teachers(config, build_task(config), Nothing(), Plan("follow", 2, ((0, 10),)))


def test_a_finished_model_teaches(configured, tmp_path, caplog):
    """A folder without a training step in its name, as most published models are."""
    save_bert(tmp_path / "some-bert-base")
    result = train(configured(f"--teacher.trajectory={tmp_path / 'some-bert-base'}"))
    assert (result.step, result.metrics["train/teacher_step"]) == (2, 1)
    assert "some-bert-base names no training step: it teaches as one finished model, called step 1" in caplog.text


# ------------------------------------------------------------------------------------------------------- what is no number


@pytest.mark.parametrize(
    ("kind", "temperature"), [("dense", 1.0), ("hidden", 1.0), ("topk", 1.0), ("argmax", 0.0), ("sampled", 1.0)]
)
def test_a_signal_that_is_no_number_is_told_with_both_steps(configured, tmp_path, monkeypatch, kind, temperature):
    """Not as a loss of NaN; and the ids that an argmax of NaN gives look right."""
    save_bert(tmp_path / "step_9")
    config = configured(
        f"--teacher={{trajectory: '{tmp_path}/step_{{step}}', same_vocabulary: true, signal: {kind}}}",
        f"--loss.teacher_temperature={temperature}",
    )
    answers = []
    hidden = Holder.hidden

    def broken(self, batch):
        found = hidden(self, batch)
        answers.append(batch)
        return found if len(answers) < 2 else torch.where(torch.arange(len(found))[:, None] == 1, torch.nan, found)

    monkeypatch.setattr(Holder, "hidden", broken)
    with pytest.raises(SignalNotFinite, match=r"^step [01]: the signal of the teacher's step 9 holds NaN or an infinity; `m"):
        train(config)


def test_a_served_signal_that_is_no_number_is_told(monkeypatch):
    monkeypatch.setattr("megapd.teacher.client.replicas.BACKOFF", (0.02, 0.1))
    replica = FakeReplica()
    expected = replica.expected
    replica.expected = lambda *asked: replace(expected(*asked), values=expected(*asked).values * torch.nan)
    with served(replica) as server, stream_of(server) as stream:
        with pytest.raises(SignalNotFinite, match=r"^step 5: the signal of the teacher's step 20 holds NaN"):
            stream.signals(5, batches_of(5))
        assert stream.counts["refused"] > 0

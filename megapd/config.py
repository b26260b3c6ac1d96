"""The typed tree of a run: YAML file, then environment, then command line.

    model:                             MEGAPD_MODEL__WIDTH=100          --model.width=100
      width: 50

Later sources win. A key the tree does not know is an error, wherever it comes from. The resolved tree is saved in
the run's folder and with every checkpoint of its trajectory.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from megapd.errors import UserError

ENV_PREFIX = "MEGAPD_"


class Section(BaseModel):
    """A branch of the tree: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# ---------------------------------------------------------------------------------------------------------- corpus


class Source(Section):
    """One input of a corpus: local files (parquet, JSONL or text, by suffix; globs allowed) or a data set of the hub."""

    path: str | None = Field(None, description="file, folder or glob of local files")
    hub: str | None = Field(None, description="name of a data set on the Hugging Face hub, e.g. wikimedia/wikipedia")
    hub_config: str | None = Field(None, description="configuration of the hub data set, e.g. 20231101.en")
    split: str = "train"
    text_column: str = "text"
    window_chars: int | None = Field(
        None, ge=1000, description="split longer documents (books) into windows of about this many characters"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        return self


class Tokenizer(Section):
    """The sentencepiece model that `prepare` trains, or an existing one that it copies."""

    kind: Literal["unigram", "bpe"] = "unigram"
    style: Literal["bert", "gpt"] = Field("bert", description="special tokens: [PAD] [UNK] [CLS] [SEP] [MASK], or <|endoftext|>")
    vocab_size: int = Field(8192, ge=64)
    model: Path | None = Field(None, description="use this sentencepiece model instead of training one")
    training_sentences: int = Field(1_000_000, ge=100, description="lines that the tokenizer is trained on at most")


class Corpus(Section):
    """What `megapd prepare` builds."""

    output: Path = Path("corpora/default")
    sources: tuple[Source, ...] = ()
    tokenizer: Tokenizer = Tokenizer()
    block_length: int = Field(128, ge=8, description="tokens a block")
    heldout_fraction: float = Field(0.01, gt=0.0, lt=0.5, description="share of the documents kept for evaluation")
    seed: int = 0


# ------------------------------------------------------------------------------------------------------------ task


class ParityTask(Section):
    """Sparse parity: x uniform in {-1,+1}^dimension, y the product over a hidden support of `degree` coordinates."""

    kind: Literal["parity"] = "parity"
    dimension: int = Field(50, ge=1)
    degree: int = Field(5, ge=1)
    seed: int = Field(0, description="chooses the hidden support; teacher and student must share it")

    @model_validator(mode="after")
    def _support_fits(self) -> ParityTask:
        if self.degree > self.dimension:
            raise ValueError(f"degree {self.degree} exceeds dimension {self.dimension}")
        return self


class HierarchicalParityTask(Section):
    """A binary tree of parities with disjoint supports; the label is the leaf whose path agrees best."""

    kind: Literal["hierarchical_parity"] = "hierarchical_parity"
    dimension: int = Field(100, ge=1)
    degree: int = Field(5, ge=1)
    labels: int = Field(8, ge=2)
    seed: int = 0

    @model_validator(mode="after")
    def _supports_fit(self) -> HierarchicalParityTask:
        if self.labels & (self.labels - 1):
            raise ValueError(f"labels must be a power of two, got {self.labels}")
        needed = (self.labels - 1) * self.degree
        if needed > self.dimension:
            raise ValueError(
                f"{self.labels - 1} disjoint supports of degree {self.degree} need dimension >= {needed}, got {self.dimension}"
            )
        return self


class TextTask(Section):
    """Masked (mlm) or next-token (clm) prediction over a prepared corpus."""

    kind: Literal["text"] = "text"
    objective: Literal["mlm", "clm"] = "mlm"
    corpus: Path | None = Field(None, description="folder that `megapd prepare` wrote; default: corpus.output")
    mask_rate: float = Field(0.3, gt=0.0, lt=1.0, description="share of the positions selected for prediction (mlm)")
    mask_token_share: float = Field(0.8, ge=0.0, le=1.0, description="of the selected, share replaced by the mask token")
    random_token_share: float = Field(0.1, ge=0.0, le=1.0, description="of the selected, share replaced at random")
    document_mask: bool = Field(False, description="attention does not cross document boundaries")

    @model_validator(mode="after")
    def _shares_fit(self) -> TextTask:
        if self.mask_token_share + self.random_token_share > 1.0 + 1e-9:
            raise ValueError("mask_token_share + random_token_share must not exceed 1")
        return self


Task = Annotated[ParityTask | HierarchicalParityTask | TextTask, Field(discriminator="kind")]


# ----------------------------------------------------------------------------------------------------------- model


class MLPModel(Section):
    """One hidden ReLU layer over +-1 inputs."""

    kind: Literal["mlp"] = "mlp"
    width: int = Field(50, ge=1)


class TransformerModel(Section):
    """GPT (causal, pre-LN) or BERT (bidirectional, post-LN)."""

    kind: Literal["gpt", "bert"]
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    hidden: int = Field(256, ge=1)
    ffn: int | None = Field(None, ge=1, description="width of the feed-forward layer; default 4 * hidden")
    max_length: int | None = Field(None, ge=1, description="learned positions; default: the task's length")
    tied: bool = Field(True, description="the head shares the embedding's weight")
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile each block")

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerModel:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        return self

    @property
    def ffn_width(self) -> int:
        return self.ffn if self.ffn is not None else 4 * self.hidden


Model = Annotated[MLPModel | TransformerModel, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------- teacher, schedule, loss


class TeacherServer(Section):
    """What `megapd teacher` listens on and how it answers."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all, which needs teacher.token")
    port: int = Field(8470, ge=0, lt=1 << 16, description="replica i listens on port + i; 0: any free one")
    metrics_port: int | None = Field(None, ge=0, lt=1 << 16, description="HTTP /metrics and /health, replica i on + i; none: off")
    replicas: int = Field(1, ge=1, description="independent copies of the teacher that one command starts")
    ranks: int = Field(1, ge=1, description="processes that share one replica's weights, see teacher.sharding")
    token_budget: int = Field(1 << 16, ge=1, description="small requests are answered together, up to this many tokens")
    queue: int = Field(64, ge=1, description="requests that wait at most; more are told to come again")
    certificate: Path | None = Field(None, description="PEM of the server's TLS certificate; with it, key is needed")
    key: Path | None = Field(None, description="PEM of its private key")
    client_authority: Path | None = Field(None, description="PEM; clients must show a certificate that it signed (mutual TLS)")
    drain_seconds: float = Field(25.0, gt=0.0, description="after SIGTERM, longest time for requests that are already here")

    @model_validator(mode="after")
    def _tls(self) -> TeacherServer:
        if (self.certificate is None) != (self.key is None):
            missing = "certificate" if self.certificate is None else "key"
            raise ValueError(f"{missing}: certificate and key go together; give both, or neither")
        if self.client_authority is not None and self.certificate is None:
            raise ValueError("client_authority: clients' certificates are checked over TLS alone; set certificate and key")
        return self


class Teacher(Section):
    """The trajectory that teaches, how its signals are made and what carries them."""

    trajectory: str | None = Field(
        None,
        description="folder of a teacher run's trajectory, runs/NAME/trajectory; or a Hugging Face model, as a folder or "
        "hf:REPO[@REVISION], with {step} or {kstep} where the step stands; none: what the endpoints serve",
    )
    steps: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="steps of a trajectory that is written with {step}")
    same_vocabulary: bool = Field(False, description="trust that the teacher's ids mean what the task's do, if nothing proves it")
    signal: Literal["auto", "dense", "hidden", "topk", "sampled", "argmax"] = Field("auto", description="auto: cheapest exact")
    k: int | None = Field(None, ge=1, description="classes of topk, default 64; draws of sampled, default 12")
    encoding: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field("auto", description="auto: the teacher's precision")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="of the teacher; default: training.precision")
    sharding: Literal["whole", "zero", "tensor"] = Field("whole", description="how ranks hold it: all of it each, ZeRO-3, tensor")
    resident: int | None = Field(
        None, ge=1, description="checkpoints held at once, so that students steps apart do not swap them; default 1, served 2"
    )
    carrier: Literal["colocated", "served", "shared_memory", "cached"] = "colocated"
    cache: Path | None = Field(None, description="folder of recorded signals: read first, and what it lacks is added")
    endpoints: tuple[str, ...] = Field((), description="grpc://HOST:PORT or grpc+tls://HOST:PORT of the replicas")
    token: Path | None = Field(None, description="file with the bearer token that server and clients share")
    root_certificate: Path | None = Field(None, description="PEM of the authority that signed the server's certificate")
    certificate: Path | None = Field(None, description="PEM of the client's certificate (mutual TLS)")
    key: Path | None = Field(None, description="PEM of its private key")
    depth: int = Field(2, ge=1, description="steps whose signals are asked for ahead")
    call_seconds: float = Field(60.0, gt=0.0, description="longest wait for one answer before another replica is asked")
    deadline_seconds: float = Field(
        300.0, gt=0.0, le=540.0, description="longest wait for a signal before on_failure; below the process group's 600"
    )
    on_failure: Literal["wait", "cache", "labels"] = Field(
        "wait", description="at the deadline: stop the run; or read the cache, used for this alone; or learn from the labels"
    )
    server: TeacherServer = TeacherServer()

    @model_validator(mode="after")
    def _possible(self) -> Teacher:
        remote = self.carrier in ("served", "shared_memory")
        if remote and not self.endpoints:
            raise ValueError(f"endpoints: carrier {self.carrier} needs the address of a teacher, grpc://HOST:PORT")
        if self.trajectory is None and not remote:
            raise ValueError(f"trajectory: carrier {self.carrier} needs the folder of a teacher run, runs/NAME/trajectory")
        for endpoint in self.endpoints:
            if not re.fullmatch(r"grpc(\+tls)?://[^/:]+:\d+", endpoint):
                raise ValueError(f"endpoints: {endpoint!r} is not grpc://HOST:PORT or grpc+tls://HOST:PORT")
        if self.carrier == "cached" and self.cache is None:
            raise ValueError("cache: carrier cached needs the folder that `megapd record` wrote")
        if self.on_failure == "cache" and (self.cache is None or self.carrier == "cached"):
            raise ValueError("on_failure: cache needs teacher.cache, and a carrier that can fail; set both, or choose wait")
        if self.on_failure == "labels" and not remote:
            raise ValueError(f"on_failure: labels is for a served teacher; carrier {self.carrier} cannot be lost, choose wait")
        if self.k is not None and self.signal not in ("topk", "sampled"):
            raise ValueError(f"k: has no meaning for signal {self.signal}; choose topk or sampled")
        if self.encoding == "int8" and self.signal not in ("hidden", "auto"):
            raise ValueError(f"encoding: int8 is for hidden states, not for signal {self.signal}; choose fp16")
        if (self.certificate is None) != (self.key is None):
            missing = "certificate" if self.certificate is None else "key"
            raise ValueError(f"{missing}: certificate and key go together; give both, or neither")
        return self


class OneShot(Section):
    """One checkpoint for the whole run; by default the last of the trajectory."""

    policy: Literal["one_shot"] = "one_shot"
    checkpoint: int | None = Field(None, ge=0, description="step of the teacher's checkpoint")


class Equal(Section):
    """(N, T)-progressive: N equally spaced checkpoints, T student steps each, then the last one."""

    policy: Literal["equal"] = "equal"
    checkpoints: int = Field(ge=1, description="N")
    steps: int = Field(ge=1, description="T, student steps a checkpoint")


class Matched(Section):
    """Student step s in [iR, (i+1)R) is taught by the teacher's step (i+1) * R * speed, capped at the last."""

    policy: Literal["matched"] = "matched"
    refresh: int = Field(ge=1, description="R, student steps between rotations")
    speed: float = Field(1.0, gt=0.0)


class Range(Section):
    """From student step `start` on, the checkpoint of the teacher's step `checkpoint` teaches."""

    start: int = Field(ge=0)
    checkpoint: int = Field(ge=0)


class Explicit(Section):
    """A list of ranges; the first starts at 0, each lasts until the next starts."""

    policy: Literal["explicit"] = "explicit"
    ranges: tuple[Range, ...] = Field(min_length=1)

    @field_validator("ranges")
    @classmethod
    def _ordered(cls, ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        starts = [r.start for r in ranges]
        if starts[0] != 0:
            raise ValueError(f"the first range must start at 0, not {starts[0]}")
        if any(b <= a for a, b in itertools.pairwise(starts)):
            raise ValueError(f"the starts must increase, got {starts}")
        return ranges


class Follow(Section):
    """Teacher and student train together: R steps a checkpoint as in `matched`, waiting for each to be written."""

    policy: Literal["follow"] = "follow"
    refresh: int = Field(ge=1)
    speed: float = Field(1.0, gt=0.0)
    last: int = Field(ge=1, description="the last step of the teacher run, whose checkpoint ends the trajectory")
    timeout_seconds: float = Field(3600.0, gt=0.0, description="longest wait for one checkpoint")


class Geometric(Section):
    """N checkpoints at geometrically growing teacher steps, from `first` to the last one, each for an equal part of the run."""

    policy: Literal["geometric"] = "geometric"
    checkpoints: int = Field(ge=1, description="N")
    first: int | None = Field(None, ge=1, description="the first one's step; default: the trajectory's first after step 0")
    steps: int | None = Field(None, ge=1, description="T, student steps a checkpoint")
    total: int | None = Field(None, ge=1, description="student steps that the N checkpoints share equally, instead of `steps`")

    @model_validator(mode="after")
    def _one_length(self) -> Geometric:
        if (self.steps is None) == (self.total is None):
            raise ValueError("steps: give either steps, of each checkpoint, or total, of all together")
        if self.total is not None and self.total < self.checkpoints:
            raise ValueError(f"total: {self.total} student steps are too few for {self.checkpoints} checkpoints; raise it")
        return self


class Transition(Section):
    """(N, T)-progressive around the teacher's phase transition: N - 1 checkpoints from inside it, T student steps each, then the
    last one."""

    policy: Literal["transition"] = "transition"
    steps: int = Field(ge=1, description="T, student steps a checkpoint")
    checkpoints: int = Field(2, ge=2, description="N, the last checkpoint included")
    metric: Literal["auto", "loss", "degree_1", "m_robust_3"] = Field(
        "auto", description="what shows the transition; auto: a curriculum metric where one is recorded, else the loss"
    )


class Adaptive(Section):
    """Go on to the next of N checkpoints when the student's accuracy or divergence no longer improves."""

    policy: Literal["adaptive"] = "adaptive"
    checkpoints: int | None = Field(None, ge=1, description="N, chosen by `spacing`")
    spacing: Literal["equal", "geometric"] = "equal"
    teachers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="the checkpoints' steps, instead of `checkpoints`")
    metric: Literal["accuracy", "divergence"] = Field("accuracy", description="held out; or of the training steps reported")
    window: int = Field(5, ge=1, description="reports whose mean the next one is compared with")
    gain: float = Field(0.01, ge=0.0, description="a report that improves on that mean by less is saturated")
    patience: int = Field(1, ge=1, description="saturated reports in a row that advance")
    progress: float = Field(0.01, ge=0.0, description="improvement since the last advance that the next one needs; 0: none")
    min_dwell: int = Field(1, ge=1, description="student steps that each checkpoint teaches at least")
    max_dwell: int | None = Field(None, ge=1, description="student steps after which the next one follows in any case")
    lead: int = Field(10, ge=1, description="student steps between a decision and its effect")

    @model_validator(mode="after")
    def _consistent(self) -> Adaptive:
        if (self.checkpoints is None) == (not self.teachers):
            raise ValueError("checkpoints: give either checkpoints, a number, or teachers, a list of steps")
        if any(b <= a for a, b in itertools.pairwise(self.teachers)):
            raise ValueError(f"teachers: the steps must increase, got {list(self.teachers)}")
        if self.max_dwell is not None and self.max_dwell < self.min_dwell:
            raise ValueError(f"max_dwell: {self.max_dwell} is below min_dwell {self.min_dwell}; raise it")
        return self


Schedule = Annotated[
    OneShot | Equal | Matched | Explicit | Follow | Geometric | Transition | Adaptive, Field(discriminator="policy")
]

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy"]


class Loss(Section):
    """alpha * CE(labels) + (1 - alpha) * divergence(teacher, student) + z_loss * (log normaliser)^2, averaged over the labelled
    positions; see megapd.kernels.LossOptions."""

    divergence: Divergence = "forward_kl"
    teacher_temperature: float = Field(1.0, ge=0.0, description="0: the teacher's argmax, exactly")
    student_temperature: float = Field(1.0, gt=0.0)
    alpha: float = Field(0.0, ge=0.0, le=1.0, description="weight of the labels' cross entropy")
    beta: float = Field(0.5, gt=0.0, lt=1.0, description="the teacher's share in the mixture of the JSD")
    scale_t2: bool = Field(False, description="multiply the divergence by student_temperature ** 2")
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of the uniform distribution in the labels")
    z_loss: float = Field(0.0, ge=0.0, description="weight of the squared log of the softmax's normaliser; 1e-4 is usual")
    common_vocabulary: bool = Field(
        False, description="teacher and student of different vocabulary sizes: learn over the classes that both have"
    )
    recompute: bool = Field(False, description="form the logits again in backward instead of holding the head's gradient")
    chunk_bytes: int | None = Field(
        None,
        ge=1 << 10,
        description="most bytes of logits alive at once in the fused loss; none: 64 MiB on a CPU, 2 GiB on a GPU",
    )

    @model_validator(mode="after")
    def _finite(self) -> Loss:
        if self.divergence == "reverse_kl" and self.teacher_temperature == 0.0:
            raise ValueError("reverse_kl is infinite against an argmax teacher: raise teacher_temperature above 0")
        return self


# -------------------------------------------------------------------------------------------------------- training


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optimizer(Section):
    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0.0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0, description="applied to matrices, not to biases and norms")
    momentum: float = Field(0.0, ge=0.0, lt=1.0)


class LearningRate(Section):
    """Warm-up, then a decay to `final` times the peak."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup: float = Field(0.0, ge=0.0, description="steps; below 1, a share of the run")
    final: float = Field(0.0, ge=0.0, le=1.0, description="learning rate at the end, as a share of the peak")
    decay: float = Field(0.2, gt=0.0, description="wsd: steps of the decay at the end; below 1, a share of the run")


class Training(Section):
    steps: int = Field(1000, ge=1)
    global_batch: int = Field(256, ge=1, description="samples a step, over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="samples a forward and rank; default: no accumulation")
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip: float = Field(0.0, ge=0.0, description="largest gradient norm; 0: no clipping")
    max_nonfinite: int = Field(10, ge=1, description="stop after this many non-finite steps in a row")
    prefetch: int = Field(2, ge=1, description="steps whose batches are built ahead")
    deepspeed: Path | None = Field(None, description="JSON merged under what megapd sets; default configs/deepspeed")


class Checkpoint(Section):
    """Resumable checkpoints: parameters, optimizer, counters."""

    every: int = Field(1000, ge=0, description="steps between checkpoints; 0: only when stopped and at the end")
    keep: int = Field(2, ge=1)
    resume: bool = Field(True, description="continue the run's folder where it stopped")


class TrajectoryWriter(Section):
    """Weights-only checkpoints for later students."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only those of `steps`")
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="further steps at which one is written")
    shard_bytes: int = Field(2 << 30, ge=1 << 12)


class Evaluation(Section):
    every: int = Field(0, ge=0, description="steps between evaluations on held-out data; 0: only at the end")
    samples: int = Field(1024, ge=1)
    micro_batch: int | None = Field(None, ge=1, description="samples a forward; default: the training micro-batch")


class Telemetry(Section):
    every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    wandb: Literal["auto", "offline", "disabled"] = Field("auto", description="auto: online when logged in, else offline")
    project: str = "megapd"
    progress: bool = True
    peak_tflops: float | None = Field(None, gt=0.0, description="a device's peak, for the MFU; default: known by its name")


class Config(BaseSettings):
    """A run. `load` builds it from its three sources."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, validate_default=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder is runs_dir/name")
    runs_dir: Path = Path("runs")
    seed: int = Field(0, ge=0, lt=1 << 63, description="initial weights, order of the data, masks")
    corpus: Corpus = Corpus()
    task: Task = ParityTask()
    model: Model = MLPModel()
    teacher: Teacher | None = None
    schedule: Schedule | None = None
    loss: Loss = Loss()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    lr: LearningRate = LearningRate()
    checkpoint: Checkpoint = Checkpoint()
    trajectory: TrajectoryWriter = TrajectoryWriter()
    evaluation: Evaluation = Evaluation()
    telemetry: Telemetry = Telemetry()

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    @model_validator(mode="after")
    def _possible(self) -> Config:
        text, mlp = self.task.kind == "text", self.model.kind == "mlp"
        if text and mlp:
            raise ValueError("model.kind: an mlp cannot learn task.kind text; choose gpt or bert")
        if isinstance(self.task, TextTask) and not mlp:
            wanted = "bert" if self.task.objective == "mlm" else "gpt"
            if self.model.kind != wanted:
                raise ValueError(f"model.kind: task.objective {self.task.objective} needs {wanted}, not {self.model.kind}")
        if (self.teacher is None) != (self.schedule is None):
            missing = "teacher" if self.teacher is None else "schedule"
            raise ValueError(f"{missing}: teacher and schedule go together; give both (distillation) or neither (labels only)")
        if self.training.micro_batch is not None and self.training.global_batch % self.training.micro_batch:
            micro, total = self.training.micro_batch, self.training.global_batch
            raise ValueError(f"training.micro_batch: {micro} does not divide training.global_batch {total}")
        if self.optimizer.kind == "adamw" and self.optimizer.momentum:
            raise ValueError("optimizer.momentum: AdamW has none; set optimizer.betas, or choose sgd")
        argmax_asked = self.teacher is not None and self.teacher.signal == "argmax"
        if argmax_asked and (self.loss.teacher_temperature > 0 or self.loss.divergence == "reverse_kl"):
            raise ValueError("teacher.signal: argmax is exact at loss.teacher_temperature 0 alone; set that, or choose auto")
        if self.teacher is not None and self.teacher.signal in ("topk", "sampled"):
            sampled = self.teacher.signal == "sampled"
            if self.loss.teacher_temperature == 0:
                raise ValueError("teacher.signal: at loss.teacher_temperature 0 the argmax is all there is; choose auto")
            if sampled and self.loss.divergence not in ("forward_kl", "soft_cross_entropy"):
                raise ValueError(f"teacher.signal: sampled is unbiased for forward_kl, not {self.loss.divergence}; choose topk")
        for key in ("warmup", "decay"):
            if getattr(self.lr, key) > self.training.steps:
                raise ValueError(f"lr.{key}: {getattr(self.lr, key):g} steps exceed training.steps {self.training.steps}")
        late = [s for s in self.trajectory.steps if s > self.training.steps]
        if late:
            raise ValueError(f"trajectory.steps: {late} lie beyond training.steps {self.training.steps}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, _yaml_file)


_yaml_file: Path | None = None  # set by `load` alone, for the one construction it makes


def load(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Build a Config from a YAML file (or none), MEGAPD_* variables and `--section.key=value` overrides.

    Raises UserError, one line that names the setting, for whatever the tree refuses.
    """
    global _yaml_file
    if path is not None:
        _check_yaml(Path(path))
    _check_environment()
    _yaml_file = Path(path) if path is not None else None
    try:
        return Config(**_parse_overrides(overrides or []))
    except ValidationError as error:
        raise UserError(_one_line(error, path)) from error
    except SettingsError as error:  # a variable that should hold a section, as JSON, and does not
        raise UserError(f"{ENV_PREFIX}*: {' '.join(str(error).split())}; set one key as {ENV_PREFIX}SECTION__KEY") from error
    finally:
        _yaml_file = None


def dump(config: Config) -> str:
    """The whole tree as YAML, defaults included: what config.yaml in a run's folder holds."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _check_yaml(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, got a {type(tree).__name__}")
    odd = [key for key in tree or {} if not isinstance(key, str)]
    if odd:
        raise UserError(f"{path}: {odd[0]!r} is no name of a section")


def _check_environment() -> None:
    known = {name.upper() for name in Config.model_fields}
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX):
            section = variable[len(ENV_PREFIX) :].split("__")[0]
            if section.upper() not in known:
                raise UserError(f"{variable}: the configuration has no section {section.lower()!r}; unset the variable")


def _parse_overrides(overrides: list[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        name, equals, value = override.removeprefix("--").partition("=")
        if not override.startswith("--") or not equals or not name:
            raise UserError(f"{override!r}: an override is written --section.key=value")
        *sections, leaf = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise UserError(f"--{name}: {section!r} is given a value elsewhere on the command line")
        try:
            branch[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{name}: {value!r} is not valid YAML") from error
    return tree


def _one_line(error: ValidationError, path: str | Path | None) -> str:
    tags = {"mlp", "gpt", "bert", "parity", "hierarchical_parity", "text", "one_shot", "equal", "matched", "explicit", "follow"}
    tags |= {"geometric", "transition", "adaptive"}
    parts = []
    for problem in error.errors():
        # The location of a tagged union carries the tag as its second element; users do not write it.
        where = ".".join(str(p) for i, p in enumerate(problem["loc"]) if not (i == 1 and p in tags))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "union_tag_not_found":
            field = problem["ctx"]["discriminator"].strip("'")
            where, message = f"{where}.{field}", "missing; it says which settings the section has"
        elif problem["type"] == "extra_forbidden":
            message = "unknown setting"
        elif problem["type"] not in ("value_error", "missing") and not isinstance(problem["input"], dict):
            message += f" (got {problem['input']!r})"
        parts.append(f"{where}: {message}" if where else message)
    source = f"{path}: " if path is not None else ""
    return source + "; ".join(parts)

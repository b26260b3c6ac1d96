"""The typed tree of a run: YAML file, then environment, then command line.

    model:                             MEGAPD_MODEL__WIDTH=100          --model.width=100
      width: 50

Later sources win; a section of which they have another kind (model.kind, schedule.policy) they replace. A key that the tree does
not know, or a file has twice, is an error, wherever it comes from. The resolved tree is saved in
the run's folder and with every checkpoint of its trajectory.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from megapd.config import text
from megapd.config.base import OpenSection, Section, problem, public_tree
from megapd.config.distillation import LossConfig, ScheduleConfig, SchedulerConfig, TeacherConfig
from megapd.config.learning import CorpusConfig, MLPConfig, ModelConfig
from megapd.config.tasks import ParityConfig, TaskConfig
from megapd.errors import UserError

ENV_PREFIX = "MEGAPD_"

# Settings that there were. A run's config.yaml may name them: they are dropped, and a resumed run does not compare them.
RETIRED_SETTINGS = ("teacher.data_port", "teacher.server.data_port")


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Section):
    kind: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum")
    lr: float = Field(1e-3, gt=0.0, allow_inf_nan=False, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW: decay of its two moments")
    eps: float = Field(1e-8, gt=0.0, description="AdamW: added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0.0, description="applied to matrices, not to biases and norms")
    momentum: float = Field(0.0, ge=0.0, lt=1.0, description="of SGD")

    @model_validator(mode="after")
    def _has_momentum(self) -> OptimizerConfig:
        if self.kind == "adamw" and self.momentum:
            raise problem("momentum", "AdamW has none; set optimizer.betas, or choose sgd", self.momentum)
        return self


class LearningRateConfig(Section):
    """Warm-up, then a decay to `final` times the peak."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = Field("constant", description="how it goes after the warm-up")
    warmup: float = Field(0.0, ge=0.0, description="steps; below 1, a share of the run")
    final: float = Field(0.0, ge=0.0, le=1.0, description="learning rate at the end, as a share of the peak")
    decay: float = Field(0.2, gt=0.0, description="wsd: steps of the decay at the end; below 1, a share of the run")

    def check_steps(self, steps: int) -> None:
        """ValueError unless warm-up and decay fit into a run of `steps`."""
        for key, phase in (("warmup", self.warmup), ("decay", self.decay)):
            if phase > steps:
                raise ValueError(f"lr.{key}: {phase:g} steps exceed training.steps {steps}")


class TrainingConfig(Section):
    steps: int = Field(1000, ge=1, description="student steps; may grow when a run goes on")
    global_batch: int = Field(256, ge=1, description="samples a step, over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="samples a forward and rank; default: no accumulation")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what ZeRO shards: nothing, optimizer, gradients too, weights too")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of weights and activations; the optimizer's are fp32")
    clip: float = Field(0.0, ge=0.0, description="largest gradient norm; 0: no clipping")
    max_nonfinite: int = Field(10, ge=1, description="stop after this many non-finite steps in a row")
    prefetch: int = Field(2, ge=1, description="steps whose batches are built ahead")
    deepspeed: Path | None = Field(None, description="JSON merged under what megapd sets; default configs/deepspeed")
    callbacks: tuple[str, ...] = Field((), description="names of callbacks that installed packages register")

    @model_validator(mode="after")
    def _divides(self) -> TrainingConfig:
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            message = f"{self.micro_batch} does not divide training.global_batch {self.global_batch}"
            raise problem("micro_batch", message, self.micro_batch)
        return self

    @model_validator(mode="after")
    def _scales_its_loss(self) -> TrainingConfig:
        if self.precision == "fp16" and self.zero_stage == 0:
            raise problem("precision", "at zero_stage 0 DeepSpeed does not scale fp16's loss; choose stage 1, or bf16", "fp16")
        return self


class CheckpointConfig(Section):
    """Resumable checkpoints: parameters, optimizer, counters."""

    every: int = Field(1000, ge=0, description="steps between checkpoints; 0: only when stopped and at the end")
    keep: int = Field(2, ge=1, description="how many stay, the newest")
    resume: bool = Field(True, description="continue the run's folder where it stopped")


class TrajectoryWriterConfig(Section):
    """Weights-only checkpoints for later students."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only those of `steps`")
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="further steps at which one is written")
    shard_bytes: int = Field(2 << 30, ge=1 << 12, description="largest file of a checkpoint's weights")
    export: bool = Field(False, description="also as transformers reads it, in exports/step_N of the run's folder")

    def check_steps(self, steps: int) -> None:
        """ValueError unless every checkpoint asked for lies within a run of `steps`."""
        late = [step for step in self.steps if step > steps]
        if late:
            raise ValueError(f"trajectory.steps: {late} lie beyond training.steps {steps}")


class DownstreamConfig(Section):
    """Questions with a right answer, scored by log-likelihood: HellaSwag's, ARC's, PIQA's or BLiMP's layout."""

    path: Path = Field(description="JSONL, a question a line")
    name: str | None = Field(None, description="what metrics call it: NAME/accuracy; default: the file's name")
    samples: int | None = Field(None, ge=1, description="questions, the first of the file; default: all")


class EvaluationConfig(Section):
    every: int = Field(0, ge=0, description="steps between evaluations on held-out data; 0: only at the end")
    samples: int = Field(1024, ge=1, description="held-out samples of an evaluation, at most those that there are")
    micro_batch: int | None = Field(None, ge=1, description="samples a forward; default: the training micro-batch")
    tasks: tuple[DownstreamConfig, ...] = Field((), description="downstream tasks that are scored at each evaluation")


class TelemetryConfig(Section):
    every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    wandb: Literal["auto", "offline", "disabled"] = Field("auto", description="auto: online when logged in, else offline")
    project: str = Field("megapd", description="of the run's page at wandb")
    progress: bool = Field(True, description="a bar on a terminal, lines elsewhere")
    trackers: tuple[str, ...] = Field(("wandb", "progress"), description="where metrics go beside metrics.jsonl")
    statistics: int = Field(
        128, ge=0, description="labelled positions a rank on which each line compares student and teacher; 0: none"
    )
    peak_tflops: float | None = Field(None, gt=0.0, description="a device's peak, for the MFU; default: known by its name")


class Config(BaseSettings):
    """A run. `load` builds it from its three sources."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, validate_default=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder is runs_dir/name")
    runs_dir: Path = Field(Path("runs"), description="where the folders of runs lie; a run is runs_dir/name")
    seed: int = Field(0, ge=0, lt=1 << 63, description="initial weights, order of the data, masks")
    corpus: CorpusConfig = CorpusConfig()
    task: TaskConfig = ParityConfig()
    model: ModelConfig = MLPConfig()
    teacher: TeacherConfig | None = None
    schedule: ScheduleConfig | None = None
    scheduler: SchedulerConfig = SchedulerConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr: LearningRateConfig = LearningRateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trajectory: TrajectoryWriterConfig = TrajectoryWriterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        """What no section can tell alone."""
        self.task.check_model(self.model)
        if (self.teacher is None) != (self.schedule is None):
            missing = "teacher" if self.teacher is None else "schedule"
            raise ValueError(f"{missing}: teacher and schedule go together; give both (distillation) or neither (labels only)")
        if self.teacher is not None:
            self.teacher.check_found(self.scheduler)
            self.teacher.check_loss(self.loss)
        if self.trajectory.export and self.model.causal is None:
            raise ValueError(f"trajectory.export: an {self.model.kind} has no layout in transformers; set it to false")
        self.lr.check_steps(self.training.steps)
        self.trajectory.check_steps(self.training.steps)
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
        return init_settings, env_settings, InitSettingsSource(settings_cls, _from_file)


class _Saved(Config):
    """A tree alone: no environment variable lays anything over it."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


_from_file: dict[str, Any] = {}  # set by `load` alone, for the one construction it makes


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Build a Config from a YAML file (or none), MEGAPD_* variables and `--section.key=value` overrides.

    Raises UserError, one line that names the setting, for whatever the tree refuses.
    """
    global _from_file
    tree = {} if path is None else _read_yaml(Path(path))
    _check_environment()
    given = parse_overrides(overrides or [])
    _from_file = _of_another_kind(tree, given)
    try:
        return Config(**given)
    except ValidationError as error:
        raise UserError(_one_line(error, path)) from error
    except SettingsError as error:  # a variable that should hold a section, as JSON, and does not
        raise UserError(f"{ENV_PREFIX}*: {' '.join(str(error).split())}; set one key as {ENV_PREFIX}SECTION__KEY") from error
    finally:
        _from_file = {}


def complete(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A saved tree with the settings that it lacks at today's defaults, and the names of those that there are no more.

    Raises UserError where what is left is no configuration of today.
    """
    saved = copy.deepcopy(dict(tree))
    gone: list[str] = []
    while True:
        try:
            return public_tree(_Saved(**saved)), gone
        except ValidationError as error:
            unknown = [found["loc"] for found in error.errors() if found["type"] == "extra_forbidden"]
            if not unknown:
                raise UserError(f"settings on record: {_one_line(error, None)}") from error
            for *sections, leaf in unknown:
                branch: Any = saved
                for section in sections:
                    branch = branch[section]
                del branch[leaf]
                gone.append(".".join(map(str, (*sections, leaf))))


def dump(config: Config) -> str:
    """The whole tree as YAML, defaults included and secrets masked: what config.yaml in a run's folder holds."""
    return yaml.safe_dump(public_tree(config), sort_keys=False)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file's tree, without RETIRED_SETTINGS."""
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        tree: Any = text.parse(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree in (None, {}):
        raise UserError(f"{path}: holds no settings; write some, or leave the file out for the defaults")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, got a {type(tree).__name__}")
    for key in tree:
        if not isinstance(key, str):
            raise UserError(f"{path}: {key!r} is no name of a section")
    for setting in RETIRED_SETTINGS:
        *sections, leaf = setting.split(".")
        branch: Any = tree
        for section in sections:
            branch = branch.get(section) if isinstance(branch, dict) else None
        if isinstance(branch, dict):
            branch.pop(leaf, None)
    return tree


def _check_environment() -> None:
    known = {name.upper() for name in Config.model_fields}
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX):
            section = variable[len(ENV_PREFIX) :].split("__")[0]
            if section.upper() not in known:
                near = text.meant(section.upper(), iter(known))
                raise UserError(f"{variable}: the configuration has no section {section.lower()!r}; unset the variable{near}")


def _of_another_kind(tree: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The file's tree without the sections of which the environment or the command line has another kind."""
    kept = dict(tree)
    for name, field in Config.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if not (isinstance(part, type) and issubclass(part, OpenSection) and isinstance(tree.get(name), dict)):
                continue
            section, variable = given.get(name), f"{ENV_PREFIX}{name}__{part.tag}".upper()
            chosen = section.get(part.tag) if isinstance(section, dict) else None
            chosen = chosen or os.environ.get(variable)
            if chosen is not None and chosen != tree[name].get(part.tag):
                kept.pop(name, None)
    return kept


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`--section.key=value`, the value as YAML, as a tree. Raises UserError."""
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
            branch[leaf] = text.parse(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{name}: {value!r} is not valid YAML") from error
    return tree


def _one_line(error: ValidationError, path: str | Path | None) -> str:
    parts = []
    for found in error.errors():
        where = ".".join(map(str, found["loc"]))
        message = found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            message = "unknown setting" + text.meant(where, text.names(Config))
        elif found["type"] not in ("value_error", "missing") and not isinstance(found["input"], dict):
            message += f" (got {found['input']!r})"
        parts.append(f"{where}: {message}" if where else message)
    source = f"{path}: " if path is not None else ""
    return source + "; ".join(parts)

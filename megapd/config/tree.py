"""The typed tree of a run: YAML file, then environment, then command line.

    model:                             MEGAPD_MODEL__WIDTH=100          --model.width=100
      width: 50

Later sources win. A key the tree does not know is an error, wherever it comes from. The resolved tree is saved in
the run's folder and with every checkpoint of its trajectory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from megapd.config.corpus import CorpusConfig
from megapd.config.distillation import LossConfig, TeacherConfig
from megapd.config.model import MLPConfig, ModelConfig
from megapd.config.schedule import ScheduleConfig
from megapd.config.scheduler import SchedulerConfig
from megapd.config.task import ParityConfig, TaskConfig
from megapd.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LearningRateConfig,
    OptimizerConfig,
    TelemetryConfig,
    TrainingConfig,
    TrajectoryWriterConfig,
)
from megapd.errors import UserError

ENV_PREFIX = "MEGAPD_"

# Settings that there were. A run's config.yaml may name them: they are dropped, and a resumed run does not compare them.
RETIRED_SETTINGS = ("teacher.data_port", "teacher.server.data_port")


class Config(BaseSettings):
    """A run. `load` builds it from its three sources."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, validate_default=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder is runs_dir/name")
    runs_dir: Path = Path("runs")
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
        return init_settings, env_settings, _File(settings_cls, _yaml_file)


class _File(YamlConfigSettingsSource):
    """The YAML file, without RETIRED_SETTINGS."""

    def _read_file(self, file_path: Any) -> dict[str, Any]:
        tree = super()._read_file(file_path)
        for setting in RETIRED_SETTINGS:
            *sections, leaf = setting.split(".")
            branch: Any = tree
            for section in sections:
                branch = branch.get(section) if isinstance(branch, dict) else None
            if isinstance(branch, dict):
                branch.pop(leaf, None)
        return tree


_yaml_file: Path | None = None  # set by `load` alone, for the one construction it makes


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Build a Config from a YAML file (or none), MEGAPD_* variables and `--section.key=value` overrides.

    Raises UserError, one line that names the setting, for whatever the tree refuses.
    """
    global _yaml_file
    if path is not None:
        _check_yaml(Path(path))
    _check_environment()
    _yaml_file = Path(path) if path is not None else None
    try:
        return Config(**parse_overrides(overrides or []))
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
            branch[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{name}: {value!r} is not valid YAML") from error
    return tree


def _one_line(error: ValidationError, path: str | Path | None) -> str:
    parts = []
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown setting"
        elif problem["type"] not in ("value_error", "missing") and not isinstance(problem["input"], dict):
            message += f" (got {problem['input']!r})"
        parts.append(f"{where}: {message}" if where else message)
    source = f"{path}: " if path is not None else ""
    return source + "; ".join(parts)

"""Section `task`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megapd.config.base import OpenSection
from megapd.config.model import ModelConfig
from megapd.registry import Registry, imported, tasks


class TaskConfig(OpenSection):
    """What is learnt. `builder(section, seed, global_batch)` gives its megapd.tasks.Task."""

    registry: ClassVar[Registry[type[Any]]] = tasks
    tag: ClassVar[str] = "kind"

    kind: str

    def build(self, seed: int, global_batch: int, corpus: Path) -> Any:
        """The megapd.tasks.Task; corpus: folder that `megapd prepare` fills, where the section names no other."""
        return imported(self.builder)(self, seed, global_batch)

    def check_model(self, model: ModelConfig) -> None:
        """ValueError if a model of that kind cannot learn the task."""


@tasks.register("parity")
class ParityConfig(TaskConfig):
    """Sparse parity: x uniform in {-1,+1}^dimension, y the product over a hidden support of `degree` coordinates."""

    builder = "megapd.tasks.parity:ParityTask"

    kind: Literal["parity"] = "parity"
    dimension: int = Field(50, ge=1)
    degree: int = Field(5, ge=1)
    seed: int = Field(0, description="chooses the hidden support; teacher and student must share it")

    @model_validator(mode="after")
    def _support_fits(self) -> ParityConfig:
        if self.degree > self.dimension:
            raise ValueError(f"degree {self.degree} exceeds dimension {self.dimension}")
        return self


@tasks.register("hierarchical_parity")
class HierarchicalParityConfig(TaskConfig):
    """A binary tree of parities with disjoint supports; the label is the leaf whose path agrees best."""

    builder = "megapd.tasks.parity:HierarchicalParityTask"

    kind: Literal["hierarchical_parity"] = "hierarchical_parity"
    dimension: int = Field(100, ge=1)
    degree: int = Field(5, ge=1)
    labels: int = Field(8, ge=2)
    seed: int = 0

    @model_validator(mode="after")
    def _supports_fit(self) -> HierarchicalParityConfig:
        if self.labels & (self.labels - 1):
            raise ValueError(f"labels must be a power of two, got {self.labels}")
        needed = (self.labels - 1) * self.degree
        if needed > self.dimension:
            raise ValueError(
                f"{self.labels - 1} disjoint supports of degree {self.degree} need dimension >= {needed}, got {self.dimension}"
            )
        return self


@tasks.register("text")
class TextConfig(TaskConfig):
    """Masked (mlm) or next-token (clm) prediction over a prepared corpus."""

    builder = "megapd.tasks.text:TextTask"

    kind: Literal["text"] = "text"
    objective: Literal["mlm", "clm"] = "mlm"
    corpus: Path | None = Field(None, description="folder that `megapd prepare` wrote; default: corpus.output")
    mask_rate: float = Field(0.3, gt=0.0, lt=1.0, description="share of the positions selected for prediction (mlm)")
    mask_token_share: float = Field(0.8, ge=0.0, le=1.0, description="of the selected, share replaced by the mask token")
    random_token_share: float = Field(0.1, ge=0.0, le=1.0, description="of the selected, share replaced at random")
    document_mask: bool = Field(False, description="attention does not cross document boundaries")

    @model_validator(mode="after")
    def _shares_fit(self) -> TextConfig:
        if self.mask_token_share + self.random_token_share > 1.0 + 1e-9:
            raise ValueError("mask_token_share + random_token_share must not exceed 1")
        return self

    def build(self, seed: int, global_batch: int, corpus: Path) -> Any:
        return imported(self.builder)(self, self.corpus or corpus, seed, global_batch)

    def check_model(self, model: ModelConfig) -> None:
        if model.causal is None:
            raise ValueError(f"model.kind: an {model.kind} cannot learn task.kind text; choose gpt or bert")
        if model.causal != (self.objective == "clm"):
            wanted = "bert" if self.objective == "mlm" else "gpt"
            raise ValueError(f"model.kind: task.objective {self.objective} needs {wanted}, not {model.kind}")

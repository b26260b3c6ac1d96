"""Section `task`: what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megapd.config.base import OpenSection, problem
from megapd.config.learning import ModelConfig
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
    dimension: int = Field(50, ge=1, description="d, coordinates of x")
    degree: int = Field(5, ge=1, description="k, coordinates in a support")
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
    dimension: int = Field(100, ge=1, description="d, coordinates of x")
    degree: int = Field(5, ge=1, description="k, coordinates in a support")
    labels: int = Field(8, ge=2, description="classes of y")
    seed: int = Field(0, description="chooses the hidden supports; teacher and student must share it")

    @model_validator(mode="after")
    def _supports_fit(self) -> HierarchicalParityConfig:
        if self.labels & (self.labels - 1):
            raise ValueError(f"labels must be a power of two, got {self.labels}")
        needed = (self.labels - 1) * self.degree
        if needed > self.dimension:
            supports = f"{self.labels - 1} disjoint supports of degree {self.degree}"
            raise ValueError(f"{supports} need dimension >= {needed}, got {self.dimension}")
        return self


class SequenceConfig(TaskConfig):
    """Masked (mlm) or next-token (clm) prediction over rows of tokens."""

    objective: Literal["mlm", "clm"] = Field("mlm", description="masked tokens (BERT), or the next token (GPT)")
    mask_rate: float = Field(0.3, gt=0.0, lt=1.0, description="share of the positions selected for prediction (mlm)")
    mask_token_share: float = Field(0.8, ge=0.0, le=1.0, description="of the selected, share replaced by the mask token")
    random_token_share: float = Field(0.1, ge=0.0, le=1.0, description="of the selected, share replaced at random")

    @model_validator(mode="after")
    def _shares_fit(self) -> SequenceConfig:
        if self.mask_token_share + self.random_token_share > 1.0 + 1e-9:
            raise ValueError("mask_token_share + random_token_share must not exceed 1")
        return self

    def check_model(self, model: ModelConfig) -> None:
        if model.causal is None:
            fitting = "choose gpt, llama, bert or modernbert"
            raise ValueError(f"model.kind: an {model.kind} cannot learn task.kind {self.kind}; {fitting}")
        if model.causal != (self.objective == "clm"):
            wanted = "a bidirectional model (bert, modernbert)" if self.objective == "mlm" else "a causal model (gpt, llama)"
            raise ValueError(f"model.kind: task.objective {self.objective} needs {wanted}, not {model.kind}")


@tasks.register("text")
class TextConfig(SequenceConfig):
    """Masked or next-token prediction over a prepared corpus."""

    builder = "megapd.tasks.text:TextTask"

    kind: Literal["text"] = "text"
    corpus: Path | None = Field(None, description="folder that `megapd prepare` wrote; default: corpus.output")
    document_mask: bool = Field(False, description="attention does not cross document boundaries")

    def build(self, seed: int, global_batch: int, corpus: Path) -> Any:
        return imported(self.builder)(self, self.corpus or corpus, seed, global_batch)


@tasks.register("grammar")
class GrammarConfig(SequenceConfig):
    """Sentences of a probabilistic context-free grammar (Allen-Zhu and Li, "Physics of language models, part 1")."""

    builder = "megapd.tasks.grammar:GrammarTask"

    kind: Literal["grammar"] = "grammar"
    grammar: Literal["cfg3b", "cfg3b_released", "cfg3f", "cfg3g", "cfg3h", "cfg3i"] = Field(
        "cfg3b", description="which; cfg3b_released lacks the rule 9 -> 2 1, as the code that was published with the paper"
    )
    root: int = Field(22, ge=7, le=22, description="symbol that every sentence grows from; 22: whole sentences")
    bos: bool = Field(True, description="a token of its own opens each row")
    boundaries: tuple[int, ...] = Field(
        (), description="levels (1: symbols 7-9, .. 6: 22) at whose right ends alone tokens are predicted; empty: everywhere"
    )
    sentences: int | None = Field(None, ge=1, description="different training sentences; default: every sample is a new one")
    heldout_samples: int = Field(4096, ge=1, description="sentences that evaluations may use")
    seed: int = Field(0, description="chooses the held-out sentences, and the training sentences where they are finitely many")

    @model_validator(mode="after")
    def _levels_are(self) -> GrammarConfig:
        depth = (self.root - 4) // 3
        if outside := [level for level in self.boundaries if not 1 <= level <= depth]:
            raise problem("boundaries", f"root {self.root} has the levels 1 to {depth}, not {outside[0]}", self.boundaries)
        return self

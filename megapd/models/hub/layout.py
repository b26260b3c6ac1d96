"""How a family's models lie in transformers' files: what config.json says, and the names of the tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from megapd.config import LanguageModelConfig
from megapd.errors import UserError
from megapd.models.build import Learner

Pick = Callable[[Tensor], Tensor]


class Link(NamedTuple):
    """One of our parameters, or a part of it, and where it lies in theirs; both directions copy between the two views.

    into    our parameter -> the view of it that is meant; None: all of it
    pick    a tensor of theirs -> the view of it that is ours; None: all of it
    shape   of theirs; None: that of pick, which is its own inverse, applied to ours
    """

    theirs: str
    ours: str
    into: Pick | None = None
    pick: Pick | None = None
    shape: tuple[int, ...] | None = None

    def own(self, parameters: Mapping[str, Tensor]) -> Tensor:
        parameter = parameters[self.ours].detach()
        return parameter if self.into is None else self.into(parameter)

    def their_shape(self, parameters: Mapping[str, Tensor]) -> tuple[int, ...]:
        own = self.own(parameters)
        return self.shape or tuple(own.shape if self.pick is None else self.pick(own).shape)


def pair(theirs: str, ours: str, *, bias: bool = True, **how: Any) -> list[Link]:
    """The links of a weight and its bias."""
    return [Link(f"{theirs}.{leaf}", f"{ours}.{leaf}", **how) for leaf in (("weight", "bias") if bias else ("weight",))]


class Layout(ABC):
    """A model_type of transformers that a kind of megapd's models can be.

    model_type, architecture   as config.json has them
    prefix                     of the tensors of the body
    heads                      prefixes of those that are not of the body
    unused                     endings of stored names that megapd's models do not have: buffers, other heads
    options                    options of theirs that change the function, with the values that it has here; absent from
                               config.json, an option has the first
    """

    kind: ClassVar[str]
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ("lm_head.",)
    unused: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @abstractmethod
    def section(self, settings: Mapping[str, Any], path: Path) -> LanguageModelConfig:
        """Our configuration of the model that a config.json describes; raises UserError, or pydantic's ValidationError."""

    @abstractmethod
    def settings(self, section: LanguageModelConfig, learner: Learner) -> dict[str, Any]:
        """What config.json says of ours, beside what every model says."""

    @abstractmethod
    def links(self, section: LanguageModelConfig) -> list[Link]:
        """All of the learner's parameters."""

    def misfit(self, section: LanguageModelConfig) -> str:
        """The setting of ours that the model_type does not have; "": it has all."""
        return ""

    def canonical(self, stored: str) -> str | None:
        """The name in today's layout of a stored tensor; None for what megapd's models do not have."""
        name = stored if stored.startswith((self.prefix, *self.heads)) else self.prefix + stored  # saved from the bare body
        return None if name.endswith(self.unused) else name

    def check_options(self, settings: Mapping[str, Any], path: Path) -> None:
        """UserError where config.json has an option that megapd's model does not have."""
        for option, allowed in self.options.items():
            if settings.get(option, allowed[0]) not in allowed:
                what = f"{option} {settings[option]!r} is not supported; megapd's {self.kind} has {allowed[0]!r}"
                raise UserError(f"{path}: {what}")


def required(settings: Mapping[str, Any], names: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Our names -> the values of theirs. UserError where one is missing."""
    missing = [theirs for theirs in names.values() if settings.get(theirs) is None]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; save the model again with save_pretrained")
    return {ours: settings[theirs] for ours, theirs in names.items()}

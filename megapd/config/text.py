"""Settings as text: YAML in which a key stands once, and the name that was meant."""

from __future__ import annotations

import contextlib
import difflib
import typing
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from megapd.config.base import OpenSection
from megapd.errors import UserError


class _OnceLoader(yaml.SafeLoader):
    """Of two equal keys of a mapping, YAML's readers take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(f"the key {key.value!r} stands in line {lines[key.value]} and again in line {line}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """A document of YAML. Raises yaml.YAMLError, also where a mapping has a key twice."""
    return yaml.load(text, _OnceLoader)


def names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings, and of the sections, beneath `section`; of an open one, those of every kind."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in sections(field.annotation):
            yield from names(kind, f"{prefix}{name}.")


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section that a setting is, as its annotation says; of an open one, every registered kind."""
    if isinstance(annotation, type) and issubclass(annotation, OpenSection) and "registry" in annotation.__dict__:
        for name in annotation.registry.names():
            with contextlib.suppress(UserError):  # another package's, which is broken: told where it is asked for
                yield annotation.registry.get(name)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in typing.get_args(annotation):
            yield from sections(part)


def meant(name: str, known: Iterator[str]) -> str:
    """`; did you mean ...?` where a known name is like `name`, else nothing."""
    close = difflib.get_close_matches(name, sorted(set(known)), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""

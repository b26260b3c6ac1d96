"""`megapd settings [SECTION]`: every setting with its type, default and meaning."""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator
from types import UnionType
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megapd.config import Config
from megapd.config.base import OpenSection
from megapd.config.text import meant, sections
from megapd.errors import UserError

FILE_COLUMNS = 200


class Setting(NamedTuple):
    """name, dotted; kind: of an open section, the kinds that have it. default: "" where it must be given."""

    name: str
    kind: str
    type: str
    default: str
    meaning: str


def show_settings(section: str | None) -> int:
    """`megapd settings [SECTION]`."""
    found = list(settings())
    chosen = [one for one in found if section is None or one.name == section or one.name.startswith(f"{section}.")]
    if not chosen:
        raise UserError(f"settings: there is no section or setting {section}{meant(str(section), names(found))}")
    table = Table(box=None, pad_edge=False)
    for column in ("setting", "type", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "setting")
    for one in chosen:
        own = f"{one.name} ({one.kind})" if one.kind else one.name
        table.add_row(*map(escape, (own, one.type, one.default, one.meaning)))
    Console(width=None if sys.stdout.isatty() else FILE_COLUMNS).print(table, highlight=False)
    return 0


def settings(section: type[BaseModel] = Config, prefix: str = "", kind: str = "") -> Iterator[Setting]:
    """All, in the order of the tree; an open section's kind by kind, what several share once."""
    for name, field in section.model_fields.items():
        parts = list(dict.fromkeys(sections(field.annotation)))
        if not parts:
            yield Setting(prefix + name, kind, _type(field.annotation), _default(field), _meaning(section, name, field))
        kinds: dict[Setting, list[str]] = {}
        for part in parts:
            tag = part.model_fields[part.tag].annotation if issubclass(part, OpenSection) else None
            for one in settings(part, f"{prefix}{name}.", kind):
                kinds.setdefault(one, []).extend(typing.get_args(tag))
        yield from (one._replace(kind=", ".join(own) or one.kind) for one, own in kinds.items())


def names(found: list[Setting]) -> Iterator[str]:
    """Of settings, and of the sections above them."""
    for one in found:
        parts = one.name.split(".")
        yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _meaning(section: type[BaseModel], name: str, field: FieldInfo) -> str:
    """Of the setting that names a section's kind, what the kind is."""
    if issubclass(section, OpenSection) and name == section.tag:
        return " ".join((section.__doc__ or "").split("\n\n")[0].split())
    return field.description or ""


def _type(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if origin in (typing.Union, UnionType):
        return " | ".join(_type(part) for part in parts if part is not type(None))
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin is tuple:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return "mapping"
    name = str(annotation.__name__)
    return {"str": "text", "bool": "true | false"}.get(name, name.lower())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)

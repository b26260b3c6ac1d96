"""What all sections of the configuration have in common."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar, Self, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, Secret, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from megapd.errors import MASK, UserError, hide, masked, masked_tree
from megapd.registry import Registry

# Hexadecimal, base64 or what `megapd scheduler token` prints; no name of a file, which has a folder or a suffix.
_TOKEN = re.compile(r"[\w+-]{32,}=*|[\w+/-]{30,}={1,2}", re.ASCII)


class Section(BaseModel):
    """A branch of the tree: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class OpenSection(Section):
    """A section of several kinds, each with settings of its own; `registry` has their classes, also those of other packages.

    A direct subclass sets `registry` and `tag`, the setting that names the kind. As the type of a field it takes a mapping whose
    tag is registered, and gives an instance of that kind. A kind subclasses it, with its name or names as a Literal:

        builder   "package.module:function" that makes what the section describes, imported when it is needed: configurations are
                  read without torch
    """

    registry: ClassVar[Registry[type[Any]]]
    tag: ClassVar[str]
    builder: ClassVar[str]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        if "registry" not in cls.__dict__:
            return handler(source)  # a kind
        own = core_schema.simple_ser_schema("any")  # with the settings of its kind
        return core_schema.no_info_plain_validator_function(cls._of_its_kind, serialization=own)

    @classmethod
    def _of_its_kind(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise PydanticKnownError("model_attributes_type")
        if cls.tag not in value:
            raise problem(cls.tag, "missing; it says which settings the section has", value)
        try:
            kind = cls.registry.get(str(value[cls.tag]))
        except UserError as error:
            raise problem(cls.tag, str(error), value) from error
        if not (isinstance(kind, type) and issubclass(kind, cls)):
            raise problem(cls.tag, f"{kind!r}, which {cls.registry.group} has by that name, is no {cls.__name__}", value)
        return kind.model_validate({key: _decoded(kind, key, given) for key, given in value.items()})


class DatabaseURL(Secret[str]):
    """A database's address. `str` and saved trees have it with its password masked."""

    def __init__(self, secret_value: str) -> None:
        super().__init__(secret_value)
        scheme, _, place = secret_value.partition("://")
        self._password = "" if scheme == "sqlite" else place.rpartition("@")[0].partition(":")[2]
        hide(self._password)

    def _display(self) -> str:
        url: str = self.get_secret_value()
        return masked(url.replace(f":{self._password}@", f":{MASK}@", 1) if self._password else url)

    def reveal(self, setting: str) -> str:
        """The whole address. UserError, which names the setting, where a saved tree had it, without its password."""
        url: str = self.get_secret_value()
        variable = f"MEGAPD_{setting.upper().replace('.', '__')}"
        if MASK in url:
            what = f"{self} has no password: a run's folder keeps it masked"
            raise UserError(f"{setting}: {what}; give the whole address by the environment, {variable}, or in a file of your own")
        if re.search("[@/?#]", self._password):
            raise UserError(f"{setting}: in a password, @ is written %40, / %2F, ? %3F and # %23; correct {self}")
        return url


def public_tree(section: BaseModel) -> dict[str, Any]:
    """The section, or the whole configuration, as a JSON tree that anybody may see: secrets are masked.

    Whatever leaves the process is made of this: config.yaml, run.json, checkpoints' meta.json, trackers, what is printed. Secrets
    are settings of pydantic's secret types, also in sections of other packages, and passwords in addresses.
    """
    tree: dict[str, Any] = masked_tree(section.model_dump(mode="json"))
    return tree


def check_token_file(setting: str, path: Path | None) -> None:
    """ValueError, which does not show it, if it looks like a token where the name of a token's file should be."""
    if path is not None and _TOKEN.fullmatch(str(path)) and not path.exists():
        hide(str(path))
        raise ValueError(f"{setting}: this looks like a token; write it into a file that you alone can read, and name that file")


def check_key(certificate: Path | None, key: Path | None) -> None:
    """ValueError unless a certificate and its key are both given, or neither."""
    if (certificate is None) != (key is None):
        missing = "certificate" if certificate is None else "key"
        raise ValueError(f"{missing}: certificate and key go together; give both, or neither")


def problem(setting: str, message: str, value: object) -> ValidationError:
    """What a section's validator raises for one of its settings; `value`: what was given."""
    error = PydanticCustomError("value_error", "{message}", {"message": message})
    return ValidationError.from_exception_data(setting, [InitErrorDetails(type=error, loc=(setting,), input=value)])


def _decoded(kind: type[Section], key: str, value: object) -> object:
    """An environment variable's text as the list that its setting is; the variables' reader knows no settings of kinds."""
    field = kind.model_fields.get(key)
    if isinstance(value, str) and field is not None and get_origin(field.annotation) in (tuple, list, dict):
        try:
            return json.loads(value)
        except ValueError:
            return value  # pydantic says what it should have been
    return value

"""The tables of settings.md, from the models of the settings.

Each table is between `<!-- table: NAME -->` and `<!-- end of the table -->`. NAME is a section of the settings file,
`general` for the keys at its top, or `environment` for the variables without a key in the file. The text around the
tables is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from fks_backfill_dagster.settings.model import ENVIRONMENT_ONLY, KEY_VARIABLES, Settings
from fks_backfill_dagster.settings.sections import PROVIDER_NAMES, ProviderSettings
from fks_backfill_dagster.settings.sources import Location, section_at, variables
from fks_backfill_dagster.settings.types import Between, Form

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of the table -->)", re.DOTALL)
_KEYS = ("key, variable", "value", "default", "meaning")
_NAME = "NAME"
"""Stands for the name of a provider or a calendar."""

Row = tuple[str, str, str, str]


class Undocumented(Exception):
    """A setting has no description, or a section has no table."""


def with_tables(text: str) -> str:
    """The text of settings.md with all its tables made from the models. Raises Undocumented."""
    found = [match[2] for match in _TABLE.finditer(text)]
    wanted = ["general", *sections(), "environment"]
    if missing := [name for name in wanted if name not in found]:
        raise Undocumented(f"docs/settings.md has no table of: {', '.join(missing)}")
    return _TABLE.sub(lambda one: f"{one[1]}\n{table(one[2])}\n{one[3]}", text)


def table(name: str) -> str:
    """One table as Markdown."""
    if name == "general":
        own = [key for key in _file_keys() if key not in sections()]
        return _markdown(_KEYS, _rows(Settings, (), own, Settings().redacted_dump()))
    if name == "environment":
        return _markdown(("variable", "value", "default", "meaning"), _environment())
    if name == "providers":
        return "\n".join(_providers())
    section = sections()[name]
    above: dict[str, Location] = {"calendars": (name, _NAME), "symbols": ("symbols[]",)}
    return _markdown(_KEYS, _rows(section, above.get(name, (name,)), section.model_fields))


def sections() -> dict[str, type[BaseModel]]:
    """The sections of the settings file by name: also the entries of lists, and of sections by name."""
    found = {name: section_at(Settings, (name,)) for name in _file_keys()}
    return {name: section for name, section in found.items() if section is not None}


def _file_keys() -> list[str]:
    return [name for name in Settings.model_fields if name not in ENVIRONMENT_ONLY]


def _rows(
    model: type[BaseModel], above: Location, keys: Iterable[str], shown: Mapping[str, Any] | None = None
) -> Iterator[Row]:
    """`shown` are defaults as JSON; by default those of the fields."""
    for key in keys:
        field = model.model_fields[key]
        default = (shown or {}).get(key, _default(field))
        yield _key((*above, key)), value(field), _yaml(default), meaning(model, key)


def _providers() -> Iterator[str]:
    """The keys of all providers, those of single ones, and the default addresses."""
    common = ProviderSettings.model_fields
    of = {name: type(Settings().provider(name)) for name in PROVIDER_NAMES}
    rows = list(_rows(ProviderSettings, ("providers", _NAME), common, {"base_url": "below"}))
    for name, model in of.items():
        rows += _rows(model, ("providers", name), [key for key in model.model_fields if key not in common])
    yield _markdown(_KEYS, rows)
    addresses = ((f"`{name}`", f"{model.model_fields['base_url'].default}") for name, model in of.items())
    yield _markdown(("NAME", "default `base_url`"), addresses)


def _environment() -> Iterator[Row]:
    for name, variable in ENVIRONMENT_ONLY.items():
        field = Settings.model_fields[name]
        if name == "root":  # the folder of the settings file, set by no variable of its own
            continue
        keys = name == "keys"
        shown = ", ".join(f"`{one}`" for one in KEY_VARIABLES.values()) if keys else f"`{variable}`"
        form = "text" if keys else value(field).removesuffix(", or null")
        default = _default(field)
        yield shown, form, "" if not default else _yaml(default), meaning(Settings, name)


def _key(location: Location) -> str:
    key = f"`{'.'.join(map(str, location))}`"
    variable = _VARIABLES.get(location)
    return f"{key}<br>`{variable}`" if variable else key


def _variables() -> dict[Location, str]:
    """The variable of each key; those of a named section with NAME."""
    found = {location: variable for variable, location in variables(Settings, _file_keys())}
    for name in PROVIDER_NAMES:
        for key in ProviderSettings.model_fields:
            variable = found[("providers", name, key)]
            found["providers", _NAME, key] = variable.replace(f"__{name.upper()}__", f"__{_NAME}__")
    found["calendars", _NAME, "closed"] = f"FKS_CALENDARS__{_NAME}__CLOSED"
    return found


_VARIABLES = _variables()


def meaning(model: type[BaseModel], key: str) -> str:
    """The description of a field. A section that only changes a default inherits it."""
    for base in model.__mro__:
        field = getattr(base, "model_fields", {}).get(key)
        if field is not None and field.description:
            return str(field.description)
    raise Undocumented(f"{key} of {model.__name__} has no Field(description=...)")


def value(field: FieldInfo) -> str:
    """The values that a setting accepts, in words."""
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    marks = [getattr(mark, "func", mark) for mark in metadata]
    form = next((mark.noun for mark in marks if isinstance(mark, Form)), None)
    if form is not None:
        return form
    limits = next((mark for mark in marks if isinstance(mark, Between)), None)
    if limits is not None:
        number = "whole number" if annotation is int else "number"
        return f"{number}, {limits.low:,} to {limits.high:,} {limits.unit}".rstrip()
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _words(parts[0], parts[1:])
    if kind in (Union, UnionType):
        return ", or ".join("null" if part is NoneType else _words(part) for part in parts)
    if kind is Literal:
        return ", ".join(f"`{_yaml(part)}`" for part in parts)
    if kind is tuple:
        return f"list of {_plural(_words(parts[0]))}"
    if kind is dict:
        return f"{{{_words(parts[0])}: {_words(parts[1])}}}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    return {bool: "true or false", str: "text"}[annotation]


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _default(field: FieldInfo) -> Any:
    return "required" if field.is_required() else to_jsonable_python(field.default)


def _yaml(default: Any) -> str:
    """A default as in the settings file, without quotes."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, list):
        return f"[{', '.join(map(_yaml, default))}]"
    if isinstance(default, float):
        return f"{default:g}"
    return str(default).removesuffix("T00:00:00+00:00")


def _markdown(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n".replace("|  |", "| |") for cells in lines)

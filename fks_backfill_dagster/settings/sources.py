"""The sources of settings, and the place of each value.

Belongs here: the YAML file with its line numbers, the `FKS_*` environment, and the mapping from a field
to `config/backfill.yaml:17` or `environment FKS_...`.

Does not belong here: which settings exist and which values they accept (`sections.py`, `model.py`).
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fks_backfill_dagster.ownership import OwnershipError

Location = tuple[str | int, ...]
"""The path to a value from the top of the settings: `("symbols", 3, "timeframes", 0)`."""

CLASS_CALENDARS = ("forex", "crypto")
"""The calendars of whole asset classes; the others are named after exchanges, in capitals."""

PREFIX = "FKS_"
RESERVED = ("FKS_HOME", "FKS_CONFIG", "FKS_DATABASE_URL", "FKS_API_TOKEN")
RESERVED_PREFIX = "FKS_TEST_"


def nearest(wrong: str, known: Iterable[str]) -> str | None:
    """The known name closest to `wrong`; None if none is close."""
    found = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def hint(wrong: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, else all of them."""
    names = list(known)
    match = nearest(wrong, names)
    return f"did you mean {match}?" if match else f"known: {' '.join(names)}"


def dotted(location: Location) -> str:
    """`("symbols", 3, "start")` in dotted form: `symbols[3].start`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def section_at(model: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The model that holds the keys at `location`; None if that is no section."""
    is_name = False
    for part in location:
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        known = model.model_fields.get(part)
        inner = None if known is None else _model_in(known.annotation)
        if known is None or inner is None:
            return None
        model, is_name = inner, get_origin(known.annotation) is dict
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation: itself, or the items of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_model_in, get_args(annotation)) if found), None)


@dataclass
class Places:
    """The file line and the variable of each value.

    Problems are noted as complete sentences, place first.
    """

    file: str = ""
    lines: dict[Location, int] = field(default_factory=dict)
    variables: dict[Location, str] = field(default_factory=dict)
    _noted: list[tuple[int, str]] = field(default_factory=list)

    @property
    def problems(self) -> tuple[str, ...]:
        """Each once: those of the file by line, then the others in the order of detection."""
        return tuple(dict.fromkeys(text for _, text in sorted(self._noted, key=lambda noted: noted[0])))

    def note(self, text: str) -> None:
        """A problem without a line."""
        self._noted.append((sys.maxsize, text))

    def note_line(self, line: int, text: str) -> None:
        self._noted.append((line, f"{self.file}:{line}: {text}"))

    def report(self, location: Location, text: str) -> None:
        """A problem with the value at `location`, reported at the variable that set it, else at its line."""
        for length in range(len(location), 0, -1):
            variable = self.variables.get(location[:length])
            if variable is not None:
                inside = f" {dotted(location)}:" if length < len(location) else ""
                self.note(f"environment {variable}:{inside} {text}")
                return
        below = [name for at, name in self.variables.items() if at[: len(location)] == location]
        if below and location not in self.lines:  # a named section that only this variable creates
            self.note(f"environment {below[0]}: {dotted(location)}: {text}")
            return
        for length in range(len(location), -1, -1):
            line = self.lines.get(location[:length])
            if line is not None:
                self.note_line(line, f"{dotted(location)}: {text}")
                return
        self.note(f"{dotted(location)}: {text}")


class _Source(PydanticBaseSettingsSource):
    """A source that reads everything at once, in `__call__`."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("this source is read as a whole")  # pydantic-settings declares it abstract


# libyaml where PyYAML was built with it: thousands of symbols take a second and a half otherwise, in every process.
_Safe = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class _Loader(_Safe):  # type: ignore[valid-type, misc]
    """YAML with `on`, `no` and dates as text.

    YAML 1.1 reads the ticker ON as true, and crashes on a malformed date.
    """


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))


class FileSource(_Source):
    """The YAML file. Syntax errors, duplicate keys and fields of `elsewhere` are noted in `places`.

    `read` returns its text. `elsewhere` maps fields that the file cannot set to the variable that does.
    """

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        read: Callable[[], str],
        elsewhere: Mapping[str, str],
        places: Places,
    ) -> None:
        super().__init__(settings_cls)
        self._read = read
        self._elsewhere = elsewhere
        self._places = places
        self._seen: set[int] = set()

    def __call__(self) -> dict[str, Any]:
        try:
            loader = _Loader(self._read())
            root = loader.get_single_node()
            value = None if root is None else self._value(loader, root, (), ())
        except yaml.YAMLError as error:
            self._note_syntax(error)
            return {}
        except (
            OSError,
            OwnershipError,
            ValueError,
        ) as error:  # ValueError: not UTF-8, or a tag such as !!int before a word
            self._places.note(f"{self._places.file}: cannot be read: {error}")
            return {}
        if value is not None and not isinstance(value, dict):
            self._places.note_line(1, "the file must consist of `key: value` settings")
            return {}
        return self._without_elsewhere(value or {})

    def _without_elsewhere(self, value: dict[str, Any]) -> dict[str, Any]:
        for name in value.keys() & self._elsewhere.keys():
            variable = self._elsewhere[name]
            self._places.note_line(
                self._places.lines[(name,)], f"{name}: comes from the environment only ({variable})"
            )
        return {name: part for name, part in value.items() if name not in self._elsewhere}

    def _note_syntax(self, error: yaml.YAMLError) -> None:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        self._places.note_line(1 if mark is None else mark.line + 1, f"not YAML: {reason}")

    def _value(self, loader: _Loader, node: Node, location: Location, above: tuple[int, ...]) -> Any:
        """The plain value of `node`; records the line of everything in it."""
        self._places.lines.setdefault(location, node.start_mark.line + 1)
        if id(node) in above:
            self._places.report(location, "refers to itself")
            return None
        above = (*above, id(node))
        if isinstance(node, MappingNode):
            return self._mapping(loader, node, location, above)
        if isinstance(node, SequenceNode):
            return [
                self._value(loader, item, (*location, index), above) for index, item in enumerate(node.value)
            ]
        return loader.construct_object(node, deep=True)

    def _mapping(
        self, loader: _Loader, node: MappingNode, location: Location, above: tuple[int, ...]
    ) -> dict[str, Any]:
        if id(node) not in self._seen:  # an alias refers to the same node, with its merges resolved
            self._seen.add(id(node))
            self._report_duplicates(node, location)
            loader.flatten_mapping(node)
        made: dict[str, Any] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, ScalarNode) else "?"
            self._places.lines[(*location, name)] = key.start_mark.line + 1
            made[name] = self._value(loader, value, (*location, name), above)
        return made

    def _report_duplicates(self, node: MappingNode, location: Location) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, ScalarNode) and key.value in lines:
                where = dotted((*location, key.value))
                self._places.note_line(line, f"{where}: is a duplicate, first in line {lines[key.value]}")
            elif isinstance(key, ScalarNode):
                lines[key.value] = line


class EnvironmentSource(_Source):
    """`FKS_` + path joined by `__`. Lists and sections are JSON; an empty variable counts as not set.

    Unknown variables are noted in `places`. `own` are the names of the top-level fields that these
    variables may set.
    """

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        environ: Mapping[str, str],
        own: Iterable[str],
        places: Places,
    ) -> None:
        super().__init__(settings_cls)
        self._environ = environ
        self._known = dict(variables(settings_cls, tuple(own)))
        self._places = places

    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in sorted(self._environ, key=lambda name: (name.count("__"), name)):  # sections before keys
            if not name.startswith(PREFIX) or name in RESERVED or name.startswith(RESERVED_PREFIX):
                continue
            location = self._known.get(name) or self._named(name)
            if location is None:
                self._places.note(f"environment {name}: {self._unknown(name)}")
            elif self._environ[name].strip():
                self._places.variables[location] = name
                try:
                    _put(values, location, _decoded(self._environ[name].strip()))
                except ValueError as error:
                    self._places.report(location, f"is not JSON: {error}")
        return values

    def _named(self, name: str) -> Location | None:
        """The key of a named section: `FKS_CALENDARS__XHKG__CLOSED`."""
        match = re.fullmatch(rf"{PREFIX}CALENDARS__(.+)__([A-Z_]+)", name)
        if match is None or "FKS_CALENDARS" not in self._known:
            return None
        calendar, key = match[1], match[2].lower()
        calendar = calendar.lower() if calendar.lower() in CLASS_CALENDARS else calendar
        section = section_at(self.settings_cls, ("calendars", calendar))
        return ("calendars", calendar, key) if section and key in section.model_fields else None

    def _unknown(self, name: str) -> str:
        above = max((known for known in self._known if name.startswith(f"{known}__")), key=len, default=None)
        if above is not None and section_at(self.settings_cls, self._known[above]) is None:
            return f"{above} has no keys below it"
        if above == "FKS_SYMBOLS":
            return "the list is set as a whole, as JSON in FKS_SYMBOLS"
        if above == "FKS_CALENDARS":
            return "is not a setting; dates go to FKS_CALENDARS__NAME__CLOSED, such as FKS_CALENDARS__XHKG__CLOSED"
        known = [other.removeprefix(PREFIX) for other in (*self._known, *RESERVED)]
        match = nearest(name.removeprefix(PREFIX), known)
        remedy = f"did you mean {PREFIX}{match}?" if match else "docs/settings.md lists them all"
        return f"is not a setting; {remedy}"


def variables(
    model: type[BaseModel], names: Iterable[str], above: Location = ()
) -> Iterable[tuple[str, Location]]:
    """Every variable that may be set, sections included, with its field."""
    for name in names:
        location = (*above, name)
        yield PREFIX + "__".join(str(part).upper() for part in location), location
        annotation = model.model_fields[name].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from variables(annotation, annotation.model_fields, location)


def _decoded(text: str) -> Any:
    """The parsed value of valid JSON, else the text itself; the field checks its type.

    Raises ValueError for an invalid JSON list or section.
    """
    switch = {"true": True, "false": False}.get(text.lower())
    if switch is not None:
        return switch
    try:
        return json.loads(text)
    except ValueError:
        if text.startswith(("[", "{")):
            raise
        return text


def _put(values: dict[str, Any], location: Location, value: Any) -> None:
    """Sets a nested value, unless a section above it was set to something else, which is reported as such."""
    for part in location[:-1]:
        inner = values.setdefault(str(part), {})
        if not isinstance(inner, dict):
            return
        values = inner
    values[str(location[-1])] = value

"""Pydantic's validation errors as messages in terms of the settings."""

from __future__ import annotations

import re

from pydantic_core import ErrorDetails

from fks_backfill_dagster.settings.model import ENVIRONMENT_ONLY, Settings
from fks_backfill_dagster.settings.sources import (
    Location,
    hint,
    section_at,
)
from fks_backfill_dagster.settings.types import quoted

_NOT_A = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
}


def sentence(error: ErrorDetails, location: Location) -> str:
    """The message of an error. Values of secret fields are never repeated."""
    kind = error["type"]
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "extra_forbidden":
        return _unknown_key(location)
    if kind == "missing":
        return "is missing"
    if kind == "string_too_short":
        return "is empty"
    if kind == "tuple_type":
        return 'is not a list such as ["a", "b"]'
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "is not a section of `key: value` settings"
    if kind in _NOT_A:
        quote = (
            "; put it in quotes"
            if kind == "string_type" and isinstance(error["input"], bool | int | float)
            else ""
        )
        shown = "" if location[0] in ("alerts", *ENVIRONMENT_ONLY) else f"{quoted(error['input'])} "
        return f"{shown}is not {_NOT_A[kind]}{quote}"
    return error["msg"]


def _unknown_key(location: Location) -> str:
    name = str(location[-1])
    section = section_at(Settings, location[:-1])
    known = [key for key in section.model_fields if key not in ENVIRONMENT_ONLY] if section else []
    if re.search(r"key|token|secret|password", name):
        return f"is not a setting; keys come from the environment only: {ENVIRONMENT_ONLY['keys']}"
    return f"is not a setting here; {hint(name, known)}"

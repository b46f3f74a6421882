"""Loading the settings: file and environment, checked as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import (
    SecretStr,
    ValidationError,
)
from pydantic_settings import PydanticBaseSettingsSource

from fks_backfill_dagster.ownership import exposure, read_trusted
from fks_backfill_dagster.settings.errors import sentence
from fks_backfill_dagster.settings.model import (
    CHECKOUT,
    CONFIG,
    ENVIRONMENT_ONLY,
    KEY_VARIABLES,
    Settings,
    SettingsError,
    loading_sources,
)
from fks_backfill_dagster.settings.sections import PRIORITY_TAGS
from fks_backfill_dagster.settings.sources import (
    EnvironmentSource,
    FileSource,
    Places,
)


def load_settings(environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Settings:
    """Reads file and environment (the environment wins) and checks everything as a whole.

    The file: `FKS_CONFIG`; else `config/backfill.yaml` here or in the nearest folder above that has
    it; else that of the source checkout; else none, and the defaults apply. A file that the search finds
    and that another account can change is an error.
    Raises SettingsError with every problem at once.
    """
    environ = os.environ if environ is None else environ
    cwd = (cwd or Path.cwd()).resolve()
    root, refused = _project(cwd)
    named = _path(environ, "FKS_CONFIG", cwd)
    file = named or (None if refused else _existing(root / CONFIG))
    places = Places(file=_relative(file, cwd) if file else "")
    places.variables.update(
        {(name,): ENVIRONMENT_ONLY[name] for name in ("home", "database_url", "api_token")}
    )
    own = [name for name in Settings.model_fields if name not in ENVIRONMENT_ONLY]
    sources: list[PydanticBaseSettingsSource] = [EnvironmentSource(Settings, environ, own, places)]
    if named is not None and not named.is_file():
        places.note(f"environment FKS_CONFIG: {named} does not exist or is not a file")
    elif file is not None:
        read = partial(read_trusted, root, *CONFIG.parts) if named is None else partial(_text, file)
        sources.append(FileSource(Settings, read, ENVIRONMENT_ONLY, places))
    elif refused:
        places.note(refused)
    token = loading_sources.set(tuple(sources))
    try:
        settings = Settings(root=root, config_file=file, **_from_environment(environ, cwd))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            location = tuple(part for part in detail["loc"] if part not in PRIORITY_TAGS)
            places.report(location, sentence(detail, location))
    finally:
        loading_sources.reset(token)
    if places.problems:
        raise SettingsError(places.problems)  # without a cause: pydantic's own error may quote a secret
    return settings


def _from_environment(environ: Mapping[str, str], cwd: Path) -> dict[str, Any]:
    """The settings that come from the environment only; an empty variable counts as not set."""
    keys = {name: environ.get(variable, "").strip() for name, variable in KEY_VARIABLES.items()}
    return {
        "home": home_of(environ, cwd),
        "database_url": _secret(environ.get("FKS_DATABASE_URL", "")),
        "api_token": _secret(environ.get("FKS_API_TOKEN", "")),
        "keys": {name: SecretStr(key) for name, key in keys.items() if key},
    }


def home_of(environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Path:
    """`home` as in `load_settings`, without checking anything else."""
    environ = os.environ if environ is None else environ
    cwd = (cwd or Path.cwd()).resolve()
    return _path(environ, "FKS_HOME", cwd) or _project(cwd)[0] / ".fks"


def _path(environ: Mapping[str, str], variable: str, cwd: Path) -> Path | None:
    text = environ.get(variable, "").strip()
    return cwd / os.path.expanduser(text) if text else None  # unlike Path.expanduser it never raises


def _secret(text: str) -> SecretStr | None:
    return SecretStr(text.strip()) if text.strip() else None


def _project(cwd: Path) -> tuple[Path, str | None]:
    """The folder of the project: the nearest one with a `config/backfill.yaml`, else the source checkout, else `cwd`.

    One that another account can change is skipped, because `dagster.yaml` and more are taken from it, too; the
    second value is the message about the first one skipped, else None.
    """
    refused: str | None = None
    for folder in (cwd, *cwd.parents, CHECKOUT):
        if (file := _existing(folder / CONFIG)) is None:
            continue
        if (reason := exposure(folder, *CONFIG.parts)) is None:
            return folder, refused
        refused = refused or (
            f"{file}: is not used, because {reason}: set FKS_CONFIG to this file if you trust it, else to your own"
        )
    return cwd, refused


def _existing(path: Path) -> Path | None:
    """None also for an unreadable path: another account's folder above the working folder is not an error."""
    return path if os.path.isfile(path) else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _relative(path: Path, cwd: Path) -> str:
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)

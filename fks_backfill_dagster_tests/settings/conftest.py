"""Settings from a text and an environment, in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import Settings, SettingsError

Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a file's text with an environment, in a separate folder."""

    def from_text(text: str = "", environ: Mapping[str, str] | None = None) -> Settings:
        file = tmp_path / "config" / "backfill.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(dedent(text), encoding="utf-8")
        return load_settings(environ or {}, tmp_path)

    return from_text


@pytest.fixture
def problems(load: Load) -> Callable[..., list[str]]:
    def of(text: str = "", environ: Mapping[str, str] | None = None) -> list[str]:
        with pytest.raises(SettingsError) as caught:
            load(text, environ)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return list(caught.value.problems)

    return of


def archive_url(loaded: Settings) -> object:
    """Binance's; the field is made from the known providers."""
    return loaded.providers.binance.model_dump()["archive_url"]

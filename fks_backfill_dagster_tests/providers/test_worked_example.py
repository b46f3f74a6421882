"""The worked example of docs/adding-a-provider.md: its two places make a provider, and its conformance class passes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fks_backfill_dagster import known_providers
from fks_backfill_dagster.providers import registry
from fks_backfill_dagster.settings.model import CHECKOUT, KEY_VARIABLES

pytestmark = pytest.mark.server

PAGE = (CHECKOUT / "docs" / "adding-a-provider.md").read_text(encoding="utf-8")
ENTRY, MODULE, CONFORMANCE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

_SHOW = """
import json
from fks_backfill_dagster import app
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.orchestration.resources import PROVIDERS
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.settings import load_settings
settings = load_settings({
    "FKS_HOME": ".",
    "FKS_PROVIDERS__EXAMPLE__TIMEOUT_SECONDS": "7",
    "FKS_PROVIDER_PRIORITY__CRYPTO": '["example"]',
    "EXAMPLE_API_KEY": "any",
})
build_defs(settings=settings).get_repository_def()
made = app.build_providers(settings, RequestPool(1))["example"]
own = settings.provider("example")
print(json.dumps([type(made).__name__, made.missing_key(), own.base_url, own.timeout_seconds, PROVIDERS[-1]]))
"""


def test_two_places_make_a_provider_with_settings_a_key_and_a_resource(tmp_path: Path) -> None:
    package = tmp_path / "fks_backfill_dagster"
    shutil.copytree(
        Path(known_providers.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("__pycache__", "project"),
    )
    (package / "providers" / "example.py").write_text(MODULE)
    table = package / "known_providers.py"
    before = table.read_text()
    after = before.replace("KNOWN: Mapping", f"{ENTRY}\nKNOWN: Mapping")
    table.write_text(re.sub(r"in \(([A-Z, ]+)\)", r"in (\1, EXAMPLE)", after))
    done = subprocess.run(
        [sys.executable, "-c", _SHOW], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == ["Example", None, "https://api.example.com", 7.0, "example"]


@pytest.fixture(scope="module", autouse=True)
def example() -> Iterator[None]:
    """The example is a known provider of this process."""
    exec(ENTRY, vars(known_providers))
    entry = vars(known_providers)["EXAMPLE"]
    module = ModuleType("fks_backfill_dagster.providers.example")
    exec(compile(MODULE, "example.py", "exec"), vars(module))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(known_providers.KNOWN, entry.name, entry)
        patch.setitem(registry._FACTORIES, entry.name, module.Example)
        patch.setitem(KEY_VARIABLES, entry.name, entry.key_variable)
        yield
    del vars(known_providers)["EXAMPLE"]


_namespace: dict[str, object] = {"__name__": __name__}
exec(compile(CONFORMANCE, "adding-a-provider.md", "exec"), _namespace)
TestExample = _namespace["TestExample"]

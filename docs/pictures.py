"""`make pictures`: the pictures of the documents, of coverage (coverage_picture.py) and of Dagster's pages.

Runs backfills, the demo and the scenario of the failed month in scratch homes, opens the pages in a headless
Chromium over the DevTools protocol, waits until each shows its expected texts, and writes
docs/pictures/*.png. A page without its expected texts is an error. All processes are stopped at the end.

To add one: an entry in PICTURES. Arguments are names of pictures; without arguments all are taken.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import click
import coverage_picture
from websockets.sync.client import ClientConnection, connect  # a dependency of Dagster's webserver

from fks_backfill_dagster.demo import scenario
from fks_backfill_dagster.demo.demo import run_demo
from fks_backfill_dagster.host import servers
from fks_backfill_dagster.host.graphql import Webserver
from fks_backfill_dagster.host.launch import running_webserver
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT

FOLDER = Path(__file__).parent / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LARGEST = 200_000
"""Maximum bytes of a PNG, to keep a clone small."""

READY_SECONDS = 60.0
SETTLED_SECONDS = 1.5
"""How long a page must show everything, without a spinner, before the screenshot: animations end."""


class Stage(Enum):
    """A setup that several pictures share."""

    COVERAGE = "coverage"
    DEMO = "demo"
    FAILED_MONTH = "failed month"


@dataclass(frozen=True, slots=True)
class Site:
    """Where the pages of a stage are; `visit` is opened first."""

    url: str
    visit: str = "about:blank"


@dataclass(frozen=True, slots=True)
class Picture:
    """One page of a stage. `shows` are texts that must be visible; the texts of `presses` are clicked first.

    `scheme` is the colour scheme that the page prefers, `scale` the pixels of the picture per pixel of the page.
    """

    stage: Stage
    name: str
    path: str
    shows: tuple[str, ...]
    width: int = 1280
    height: int = 720
    presses: tuple[str, ...] = ()
    scheme: str = "light"
    scale: float = 1


_GROUP = "/locations/fks_backfill/asset-groups/crypto"
_BTC, _ETH = "/assets/ohlcv/BTC_USDT/1m", "/assets/ohlcv/ETH_USDT/15m"

# The demo plants its outages in the previous month: that partition has two providers.
_OUTAGE_MONTH = f"{datetime.now(UTC).replace(day=1) - timedelta(days=1):%Y-%m}-01"

_FAILED_MONTH = scenario.failed_partition()

_COVERAGE = ("ARB/USDT", "not listed", "polygon: 18 of 744", "unavailable, 18 missing", "open, 12 missing")

PICTURES = (
    Picture(Stage.COVERAGE, "coverage", "coverage.html", _COVERAGE, 960, 552, scale=1.5),
    Picture(Stage.COVERAGE, "coverage-dark", "coverage.html", _COVERAGE, 960, 552, scheme="dark", scale=1.5),
    Picture(
        Stage.DEMO,
        "assets",
        f"{_GROUP}/list",
        ("BTC_USDT", "SOL_USDT", "25 partitions"),
        width=1440,
        height=780,
    ),
    # Of three series, one of them selected: a node shows only the last part of its key.
    Picture(
        Stage.FAILED_MONTH,
        "graph",
        f"{_GROUP}/lineage/ohlcv%2FETH_USDT%2F15m",
        ("92% filled (1 failed)", "ohlcv / ETH_USDT / 15m", "ETH/USDT: 15m candles"),
        width=1440,
        height=800,
    ),
    Picture(
        Stage.FAILED_MONTH,
        "failed",
        f"{_ETH}?view=partitions&partition={_FAILED_MONTH}",
        ("Failed (1)", "Materialized (23)", _FAILED_MONTH, "did not materialize this asset"),
        height=760,
    ),
    Picture(
        Stage.DEMO,
        "partition",
        f"{_BTC}?view=partitions&partition={_OUTAGE_MONTH}",
        ("coverage", '"polygon": 240', "volume_sum"),
        height=880,
    ),
    Picture(Stage.DEMO, "check", f"{_BTC}?view=checks&checkDetail=completeness", ("coverage", "Passed")),
)


class NoPicture(Exception):
    """A picture cannot be taken; the text states the reason and the remedy."""


class Page:
    """A tab of the browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._last = connection, 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends one command of the DevTools protocol and returns its result; skips events."""
        self._last += 1
        self._connection.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=READY_SECONDS))
            if answer.get("id") != self._last:
                continue
            if "error" in answer:
                raise NoPicture(f"the browser rejected {method}: {answer['error']['message']}.")
            found: dict[str, Any] = answer["result"]
            return found

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def take(self, url: str, picture: Picture) -> bytes:
        """The page as PNG, once it shows its expected texts."""
        size = {"width": picture.width, "height": picture.height, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=picture.scale)
        scheme = {"name": "prefers-color-scheme", "value": picture.scheme}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=f"{url}{picture.path}")
        for text in picture.presses:
            self._wait(picture, f"Boolean({_element(text)})", f"has no {text!r} to press")
            self.value(f"{_element(text)}.click()")
        shown = " && ".join(f"document.body.innerText.includes({json.dumps(text)})" for text in picture.shows)
        self._wait(picture, f"({shown}) && {_QUIET}", f"does not show {', '.join(picture.shows)}")
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _wait(self, picture: Picture, condition: str, otherwise: str) -> None:
        deadline, since = time.monotonic() + READY_SECONDS, None
        while time.monotonic() < deadline:
            if not self.value(condition):
                since = None
            elif since is None:
                since = time.monotonic()
            elif time.monotonic() - since > SETTLED_SECONDS:
                return
            time.sleep(0.2)
        text = self.value("document.body.innerText.slice(0, 600)")
        raise NoPicture(f"{picture.name}: {picture.path} {otherwise}; its text:\n{text}")


_QUIET = "!document.querySelector('[class*=pinner], [class*=oast] [class*=ntent-danger]')"


def _element(text: str) -> str:
    """JavaScript for the innermost element with exactly this text."""
    return (
        "[...document.querySelectorAll('button, a, div, span')]"
        f".findLast(e => e.innerText?.trim() === {json.dumps(text)})"
    )


@contextmanager
def browser() -> Iterator[Page]:
    """A headless Chromium with its own profile, stopped afterwards."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise NoPicture(
            f"no browser found ({', '.join(BROWSERS)}): install Chromium (Debian: apt-get install chromium)."
        )
    disabled = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions")
    with tempfile.TemporaryDirectory(prefix="fks-browser-", ignore_cleanup_errors=True) as profile:
        command = [program, "--headless", "--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0"]
        command += [f"--disable-{name}" for name in disabled]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
        command += [f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_tab(Path(profile), process), max_size=None, proxy=None) as connection:
                yield Page(connection)
        finally:
            process.terminate()
            process.wait()


def _tab(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """The address of a new tab's debugger."""
    port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + READY_SECONDS
    while not (port_file.exists() and port_file.read_text().strip()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise NoPicture(f"the browser did not start (exit code {process.poll()}).")
        time.sleep(0.1)
    url = f"http://127.0.0.1:{port_file.read_text().split()[0]}/json/new?about:blank"
    with build_opener(ProxyHandler({})).open(Request(url, method="PUT"), timeout=READY_SECONDS) as answer:
        return str(json.loads(answer.read())["webSocketDebuggerUrl"])


@contextmanager
def staged(stage: Stage) -> Iterator[Site]:
    """The pages of a stage; its servers are stopped and its scratch home is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fks-pictures-", ignore_cleanup_errors=True) as folder:
        if stage is Stage.COVERAGE:
            with coverage_picture.filled() as connection:
                html = coverage_picture.page(coverage_picture.read(connection))
            Path(folder, "coverage.html").write_text(html, encoding="utf-8")
            yield Site(f"file://{folder}/")
        elif stage is Stage.FAILED_MONTH:
            with scenario.failed_month(Path(folder)) as scene:
                yield Site(scene.web.url, scene.web.visit)
        else:
            with _demo(Path(folder)) as web:
                yield Site(web.url, web.visit)


@contextmanager
def _demo(home: Path) -> Iterator[Webserver]:
    environment = {"FKS_HOME": str(home), "FKS_CONFIG": str(home / "backfill.yaml")}
    try:
        if run_demo(keep=True, home=home):
            raise NoPicture("the demo failed: no pictures are taken.")
        yield running_webserver(load_settings(environment, CHECKOUT))
    finally:
        servers.down(load_settings(environment, CHECKOUT), say=lambda text: None)


def _take(page: Page, stage: Stage, pictures: Sequence[Picture]) -> None:
    if not pictures:
        return
    with staged(stage) as site:
        page.call("Page.navigate", url=site.visit)
        for picture in pictures:
            content = page.take(site.url, picture)
            if len(content) > LARGEST:
                raise NoPicture(
                    f"{picture.name} has {len(content):,} bytes, more than {LARGEST:,}: make its page smaller."
                )
            (FOLDER / f"{picture.name}.png").write_bytes(content)
            click.echo(f"docs/pictures/{picture.name}.png  {len(content):,} bytes")


def main(names: Sequence[str]) -> int:
    chosen = [picture for picture in PICTURES if not names or picture.name in names]
    try:
        unknown = set(names) - {picture.name for picture in PICTURES}
        if unknown:
            raise NoPicture(f"there is no picture {', '.join(sorted(unknown))}.")
        FOLDER.mkdir(exist_ok=True)
        with browser() as page:
            for stage in Stage:
                _take(page, stage, [picture for picture in chosen if picture.stage is stage])
    except NoPicture as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Fixtures for the tests of every layer; those of one layer are in its folder."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from fks_backfill_dagster.embedded import EmbeddedPostgres, clusters
from fks_backfill_dagster_tests.examples import examples

_SHARED = (Path(__file__).resolve().parents[1] / "../shared/data").resolve()


# A busy machine must not fail a test: no deadlines.
settings.register_profile("any machine", settings(), deadline=None, max_examples=examples(100))
settings.load_profile("any machine")

# Inherited by the workers of a run, which share the server below it (postgres.py).
_HOME = "FKS_TEST_HOME"

# The server's folder, in memory if there is room: on a disk, copying the template for each test takes longest.
_MEMORY = Path("/dev/shm")
_ROOM = 2 * 2**30

# Folders of tests in the order in which they start; the others follow. Those with whole servers are first: they
# wait more than they compute, and at the end no other tests would run beside them.
_FIRST = ("host", "demo", "orchestration", "cli", "pipeline")

# A test that uses one of these fixtures needs a server; other tests have the mark `server` explicitly.
_SERVING = frozenset(("server_url", "running", "one_market"))

# Python's audit events that a test without that mark must not raise.
_SERVER_EVENTS = frozenset(
    (
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "socket.bind",
        "socket.connect",
        "subprocess.Popen",
    )
)
_quick = False
"""Whether the running test has neither that mark nor `slow`: `make test-fast` runs it."""


def _refuse_servers(event: str, _: object) -> None:
    if _quick and event in _SERVER_EVENTS:
        raise RuntimeError(f"{event} in a test without the mark `server`: see docs/testing.md")


_started = pytest.StashKey[set[Path]]()
_FAILED = 1


def pytest_configure(config: pytest.Config) -> None:
    _ignore_nothing()
    config.stash[_started] = {one.folder for one in clusters.elsewhere()}
    if _HOME not in os.environ:
        in_memory = os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM
        os.environ[_HOME] = tempfile.mkdtemp(prefix="fks-tests-", dir=_MEMORY if in_memory else None)
        config.add_cleanup(_remove_home)
    sys.addaudithook(_refuse_servers)


def _ignore_nothing() -> None:
    """A shell without job control starts background jobs with SIGINT ignored, nohup with SIGHUP. Every child process
    would inherit that, and Dagster would then ignore SIGTERM as well."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGHUP, signal.SIG_DFL),
        ):
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails if a test run by root leaves a cluster outside of its home, where nothing would ever remove it."""
    if hasattr(session.config, "workerinput"):
        return
    temporary = session.config._tmp_path_factory.getbasetemp().resolve()  # type: ignore[attr-defined]
    made = [one for one in clusters.elsewhere() if one.folder not in session.config.stash[_started]]
    left = [one for one in made if one.home is not None and one.home.is_relative_to(temporary)]
    if left and session.exitstatus == 0:
        session.exitstatus = _FAILED
    for one in left:
        sys.stderr.write(f"\nleft behind: {one.folder}, the cluster of {one.home} ({one.state})\n")


def _remove_home() -> None:
    home = Path(os.environ.pop(_HOME))
    EmbeddedPostgres(home).remove()
    shutil.rmtree(home, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before the marks select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {folder: place for place, folder in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))
    for item in items:
        if not _SERVING.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("server")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _quick
    _quick = not any(item.get_closest_marker(name) for name in ("server", "slow"))
    try:
        return (yield)
    finally:
        _quick = False


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("binance/BTCUSDT-1h.csv.gz")`: a file of real candles beside the checkout; skips if missing."""

    def find(name: str) -> Path:
        path = _SHARED / name
        if not path.exists():
            pytest.skip(f"real candles are not here: {path}")
        return path

    return find

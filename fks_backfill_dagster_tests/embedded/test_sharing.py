"""Processes share one server; it stops when the last of them ends, also after a kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.embedded import EmbeddedPostgres, watchdog
from fks_backfill_dagster.ownership import open_file
from fks_backfill_dagster_tests.embedded.conftest import CHECKOUT, START, Use, gone, one, processes_of, until

pytestmark = pytest.mark.server


def test_a_first_start_gives_a_database_with_its_settings(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    postgres = EmbeddedPostgres(fresh_home)
    assert not postgres.status().running

    url = postgres.start()

    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT name, setting FROM pg_settings WHERE name IN ('listen_addresses', 'max_connections', "
            "'synchronous_commit', 'fsync', 'jit', 'TimeZone', 'server_encoding', 'max_wal_size')"
        ).fetchall()
        assert connection.info.user == connection.info.dbname == "fks"
    assert dict(rows) == {
        "listen_addresses": "",
        "max_connections": "200",
        "synchronous_commit": "on",
        "fsync": "on",
        "jit": "off",
        "TimeZone": "UTC",
        "server_encoding": "UTF8",
        "max_wal_size": "4096",
    }
    for driver in ("psycopg", "psycopg2"):
        engine = sa.create_engine(url.replace("postgresql:", f"postgresql+{driver}:"))
        with engine.connect() as connected:
            assert connected.execute(sa.text("SELECT 1")).scalar_one() == 1
        engine.dispose()
    status = postgres.status()
    assert (status.running, status.url, status.in_use, status.kept, status.version) == (
        True, url, True, False, "18",
    )  # fmt: skip
    assert not [c for p in processes_of(fresh_home) for c in p.net_connections("inet")]
    assert (status.data_dir.parent / "pg-socket").stat().st_mode & 0o777 == 0o700
    assert "ready to accept connections" in (fresh_home / "logs" / "postgresql.log").read_text()


def test_starting_again_is_the_same_server(home: Path) -> None:
    first, second = EmbeddedPostgres(home), EmbeddedPostgres(home)
    assert first.start() == first.start() == second.start()
    assert len(processes_of(home)) == 2  # postmaster and watchdog
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: first.start(), range(32)))) == 1


def test_four_processes_make_one_server_at_the_same_time(fresh_home: Path, use: Callable[[], Use]) -> None:
    uses = [use() for _ in range(4)]
    urls = {each.url() for each in uses}
    assert len(urls) == 1
    assert one(urls.pop()) == 1
    assert len(processes_of(fresh_home)) == 2


@pytest.fixture
def fast_watchdog(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Sets the intervals of watchdogs that this process starts from now on."""

    def set_intervals(poll: float, grace: float) -> None:
        script = open_dir / "impatient.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(Path(watchdog.__file__).parent)!r})\n"
            "import watchdog; from pathlib import Path\n"
            f"watchdog.POLL_SECONDS, watchdog.IDLE_GRACE_SECONDS = {poll}, {grace}\n"
            "sys.exit(watchdog.watch(watchdog.Home(Path(sys.argv[1]))))\n"
        )
        monkeypatch.setattr(watchdog, "__file__", str(script))

    return set_intervals


def test_the_server_stops_when_its_last_user_is_killed(
    home: Path, use: Callable[[], Use], fast_watchdog: Callable[[float, float], None]
) -> None:
    fast_watchdog(0.05, 0.2)
    postgres = EmbeddedPostgres(home)
    url = postgres.start()
    first, second = use(), use()
    assert first.url() == second.url() == url
    postgres.release()

    first.kill()
    assert not until(lambda: gone(home), 1)
    assert one(url) == 1

    second.kill()
    assert until(lambda: gone(home))


def test_a_forked_child_counts_as_a_separate_user(home: Path) -> None:
    postgres = EmbeddedPostgres(home)
    postgres.start()
    child = subprocess.Popen(["sleep", "60"], pass_fds=[_use_of(postgres)])
    postgres.release()
    assert postgres.status().in_use
    child.kill()
    child.wait()
    assert not postgres.status().in_use


def test_a_kept_server_runs_until_stop(home: Path, fast_watchdog: Callable[[float, float], None]) -> None:
    fast_watchdog(0.05, 0.1)
    postgres = EmbeddedPostgres(home)
    url = postgres.start(keep=True)
    postgres.release()
    assert not until(lambda: gone(home), 0.7)
    assert one(url) == 1
    status = postgres.status()
    assert (status.running, status.kept, status.in_use) == (True, True, False)

    assert postgres.stop() is True
    assert postgres.stop() is False
    assert not postgres.status().kept
    assert until(lambda: gone(home))


def test_capturing_the_output_of_a_starter_does_not_wait_for_the_server(home: Path) -> None:
    command = [sys.executable, "-c", START, str(home), "keep"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=CHECKOUT, check=True)
    assert one(done.stdout.strip()) == 1
    assert EmbeddedPostgres(home).stop() is True


def test_stop_stops_it_for_all_users_and_a_start_restarts_it(home: Path, use: Callable[[], Use]) -> None:
    url = use().url()
    postgres = EmbeddedPostgres(home)
    assert postgres.stop() is True
    assert not postgres.status().running
    with pytest.raises(psycopg.OperationalError):
        one(url)
    assert postgres.start() == url
    assert one(url) == 1


def test_a_killed_server_is_started_again_with_all_that_was_committed(home: Path) -> None:
    postgres = EmbeddedPostgres(home)
    url = postgres.start()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE t AS SELECT 42 AS v")
    pid = postgres.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: not postgres.status().running)
    assert postgres.start() == url
    assert one(url, "SELECT v FROM t") == 42


def test_stale_files_with_a_reused_pid_do_not_prevent_a_start(home: Path) -> None:
    postgres = EmbeddedPostgres(home)
    url = postgres.start()
    status = postgres.status()
    assert status.pid is not None
    pid_file = status.data_dir / "postmaster.pid"
    socket_lock = status.data_dir.parent / "pg-socket" / ".s.PGSQL.5432.lock"
    left = {path: path.read_text() for path in (pid_file, socket_lock)}
    postgres.stop()
    for (
        path,
        text,
    ) in left.items():  # as after a power cut, with a pid that now belongs to an unrelated process
        path.write_text(text.replace(str(status.pid), str(os.getpid()), 1))
        os.chown(path, status.data_dir.stat().st_uid, status.data_dir.stat().st_gid)
    assert not postgres.status().running
    assert postgres.stop() is False
    assert postgres.start() == url
    assert one(url) == 1


def test_a_killed_watchdog_is_replaced_at_the_next_use(home: Path, use: Callable[[], Use]) -> None:
    first = use()
    first.url()
    (dog,) = [p for p in processes_of(home) if "watchdog.py" in " ".join(p.cmdline())]
    dog.kill()
    second = use()
    second.url()
    first.kill()
    second.kill()
    assert until(lambda: gone(home), watchdog.IDLE_GRACE_SECONDS + 4)


def test_the_server_of_a_deleted_home_stops(home: Path) -> None:
    postgres = EmbeddedPostgres(home)
    postgres.start(keep=True)
    data_dir = postgres.status().data_dir
    home.rename(home.with_name("elsewhere"))
    assert until(lambda: gone(home))
    assert not postgres.status().running
    home.with_name("elsewhere").rename(home)  # for the clean-up
    assert data_dir.exists()


def test_a_start_during_a_stop_waits_and_starts_it_again(
    home: Path, fast_watchdog: Callable[[float, float], None]
) -> None:
    """With a grace time of almost zero, the server is shutting down in nearly every round."""
    fast_watchdog(0.002, 0.0)
    postgres, pids = EmbeddedPostgres(home), set()
    for round_ in range(20):
        url = postgres.start()
        assert one(url) == 1
        pids.add(postgres.status().pid)
        postgres.release()
        time.sleep(0.002 * round_)
    assert len(pids) > 3


def test_a_start_waits_for_the_watchdogs_decision(home: Path) -> None:
    users = open_file(watchdog.Home(home).users)
    assert watchdog.try_lock(users)
    postgres, urls = EmbeddedPostgres(home), []
    thread = threading.Thread(target=lambda: urls.append(postgres.start()))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    os.close(users)
    thread.join()
    assert one(urls[0]) == 1


def _use_of(postgres: EmbeddedPostgres) -> int:
    assert postgres._use is not None
    return postgres._use

"""CPU seconds of a scratch Dagster and its database, by component: wall time is misleading on a busy machine."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from fks_backfill_dagster.host.processes import backgrounds

_EVERY_SECONDS = 0.25


class Meter:
    """Samples a few times a second, because the figure of a process is unavailable after its end.

    The use of a run worker after its last sample is missing; the database server accumulates the use of
    ended backends.
    """

    def __init__(self, home: Path, backend: int) -> None:
        self._home = home
        self._postmaster = psutil.Process(backend).parent()
        self._seen: dict[psutil.Process, tuple[str, float]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._before: Mapping[str, float] = {}

    def start(self) -> None:
        self._sample()
        self._before = self._sums()
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Seconds by component since the start."""
        self._stopped.set()
        self._thread.join()
        self._sample()
        return {part: seconds - self._before.get(part, 0.0) for part, seconds in self._sums().items()}

    def _poll(self) -> None:
        while not self._stopped.wait(_EVERY_SECONDS):
            self._sample()

    def _sample(self) -> None:
        for background in backgrounds(self._home):
            for process in background.members():
                with contextlib.suppress(psutil.Error):
                    self._seen[process] = (_part(process, background.name), _seconds(process))

    def _sums(self) -> dict[str, float]:
        sums: defaultdict[str, float] = defaultdict(float)
        for part, seconds in self._seen.values():
            sums[part] += seconds
        if self._postmaster is not None:
            ended = self._postmaster.cpu_times()
            alive = sum(_seconds(process) for process in self._postmaster.children())
            sums["database"] += (
                _seconds(self._postmaster) + ended.children_user + ended.children_system + alive
            )
        return dict(sums)


def _part(process: psutil.Process, leader: str) -> str:
    return "run workers" if "multiprocessing.forkserver" in " ".join(process.cmdline()) else leader


def _seconds(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


@contextmanager
def metered(home: Path, backend: int) -> Iterator[dict[str, float]]:
    """A mapping with the seconds by component after the block. `backend`: the process id of any database backend."""
    found: dict[str, float] = {}
    meter = Meter(home, backend)
    meter.start()
    try:
        yield found
    finally:
        found |= meter.stop()

"""Signals that end a command: SIGINT, SIGTERM and SIGHUP, all handled alike.

Belongs here: which signals, what they raise, the exit code. Does not belong here: the message of a command
that is ended, and the work that it keeps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SIGNALLED = 128
"""Added to the signal's number: the exit code, as in shells."""


class Signals:
    """The signals of one command. `received` is the first one.

    Each raises KeyboardInterrupt in the main thread. A terminal that is closed sends SIGHUP twice (the shell and
    the kernel), a service manager may send SIGTERM and SIGHUP: only the first interrupts, so that the cleanup it
    started can finish. Ctrl-C interrupts every time: the user does not want to wait for that.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._first: list[Callable[[], object]] = []

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return SIGNALLED + (self.received or signal.SIGINT)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles them within the block. Signals ignored before (`nohup`, a background job) stay ignored."""
        before: dict[int, Callable[[int, FrameType | None], object] | int] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                handler = signal.getsignal(number)
                if handler is not None and handler != signal.SIG_IGN:
                    before[number] = handler
                    signal.signal(number, self._handle)
        try:
            yield
        finally:
            for restored, handled in before.items():
                signal.signal(restored, handled)

    @contextmanager
    def first(self, call: Callable[[], object]) -> Iterator[None]:
        """Within the block a signal calls `call` before it interrupts."""
        self._first.append(call)
        try:
            yield
        finally:
            self._first.remove(call)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if not again:
            self.received = number
        for call in self._first:
            call()
        if not again or number == signal.SIGINT:
            raise KeyboardInterrupt


def signals() -> Signals:
    """The signals of the running command."""
    found = click.get_current_context().find_object(Signals)
    assert found is not None
    return found

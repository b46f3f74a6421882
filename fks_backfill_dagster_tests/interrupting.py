"""`interrupted_everywhere`: a call that is interrupted at each of its lines in turn, as by a signal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


def interrupted_everywhere(call: Callable[[], object]) -> Iterator[int]:
    """Runs `call` again and again; run n is interrupted by KeyboardInterrupt at the nth line that it executes.

    Yields n after each interrupted run; ends with the first run that is complete. Fails if no line was interrupted, or
    if the call has caught an interruption. Lines of the standard library
    count too, those of installed packages do not: what they leave behind is theirs.
    """
    remaining = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal remaining
        if "site-packages" in frame.f_code.co_filename:
            return None
        if event == "line":
            remaining -= 1
            if remaining == 0:
                raise KeyboardInterrupt
        return trace

    number = 0
    while True:
        number += 1
        remaining = number
        former = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
        except KeyboardInterrupt:
            sys.settrace(former)
            yield number
        else:
            assert remaining > 0, f"the interruption of line {number} was caught"
            assert number > 1, "no line was traced"
            return
        finally:
            sys.settrace(former)

"""Turns Ctrl-C and SIGTERM into a request to finish the work in hand and save.

Long work runs inside `with stop_requests() as stop:` and calls `stop.check()` where it is safe to end. A second
signal stops at once, by the handler that was there before. Rejected: catching KeyboardInterrupt, which strikes in
the middle of a write.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))


class Stopped(Exception):
    """The work was stopped by a signal and all of it is saved; the message says how to go on. Exit code 75."""


class StopRequest:
    """Whether a signal has asked the work to stop."""

    requested = False

    def check(self, message: str) -> None:
        """Raise Stopped with this message if a signal has come."""
        if self.requested:
            raise Stopped(message)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While the block runs, the first SIGINT or SIGTERM sets `requested` instead of ending the process."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        restore()
        name = signal.Signals(number).name
        print(f"\n{name}: finishing the work in hand, then saving. A second one stops at once.", file=sys.stderr)

    for number in SIGNALS:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()

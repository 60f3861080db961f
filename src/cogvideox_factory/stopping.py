"""Turns Ctrl-C, SIGTERM and SIGUSR1 into a request to finish the work in hand and save.

Long work runs inside `with stop_requests() as stop:` and calls `stop.check()` where it is safe to end. A second
signal stops at once, by the handler that was there before. Rejected: catching KeyboardInterrupt, which strikes in
the middle of a write.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# SIGUSR1 is what Slurm is asked to send some minutes before a job's time is over (--signal=USR1@300).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
# torchrun passes on a signal that the terminal or Slurm has given to all processes already: so close together they
# are one.
RELAY_SECONDS = 5.0


class Stopped(Exception):
    """The work was stopped by a signal and all of it is saved; the message says how to go on. Exit code 75."""


class StopRequest:
    """Whether a signal has asked the work to stop: this process, or with `hear` one of those that work with it."""

    def __init__(self) -> None:
        self._is_requested = False
        self.hear: Callable[[bool], bool] | None = None  # what is known here → what is known to any of the processes

    @property
    def requested(self) -> bool:
        if self.hear and self.hear(self._is_requested):
            self._is_requested = True
        return self._is_requested

    @requested.setter
    def requested(self, value: bool) -> None:
        self._is_requested = value

    def check(self, message: str) -> None:
        """Raise Stopped with this message if a signal has come."""
        if self.requested:
            raise Stopped(message)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While the block runs, the first of the signals sets `requested` instead of ending the process.

    The handlers from before are back for the second one.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    is_relayed = "TORCHELASTIC_RUN_ID" in os.environ
    first_came: float | None = None

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first_came
        if first_came is not None:
            if time.monotonic() - first_came > RELAY_SECONDS:
                restore()
                signal.raise_signal(number)
            return
        stop.requested, first_came = True, time.monotonic()
        if not is_relayed:
            restore()
        name = signal.Signals(number).name
        message = f"\n{name}: finishing the work in hand, then saving. A second one stops at once.\n"
        with contextlib.suppress(OSError):  # unbuffered: the signal may have come in the middle of a print
            os.write(2, message.encode())

    for number in SIGNALS:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()

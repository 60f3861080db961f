"""Runs the program in forked children of a process that has imported its libraries, and waits for them.

A new interpreter a run would spend most of its life on imports, and what is done to runs would mostly strike those.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from cogvideox_factory.cli import main as program

HANG_SECONDS = 300  # on a machine that is busy with other things too


class Lost(Exception):
    """Why a run, or what it should have kept, is lost."""


def fork(arguments: Sequence[str], log: Path, before: Callable[[], None]) -> int:
    """Start the program in a child; `before` is called there first."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    _be_the_program(arguments, log, before)


def _be_the_program(arguments: Sequence[str], log: Path, before: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        before()
        code = program(list(arguments))
    except SystemExit as exit_request:
        code = int(exit_request.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float = math.inf, on_time: Callable[[float], None] = lambda used: None) -> int | None:
    """Exit code of a child, minus the signal's number where one ended it; None where it runs on after these seconds
    of its own processor time, which mean the same on a machine that is also doing other work.

    `on_time` is told of that time now and then."""
    process, started = psutil.Process(child), time.monotonic()
    while True:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > started + HANG_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Lost(f"hangs: not over after {HANG_SECONDS} s")
        with contextlib.suppress(psutil.Error):  # it has just ended
            used = process.cpu_times().user + process.cpu_times().system
            on_time(used)
            if used >= seconds:
                return None
        time.sleep(0.005)


def run_to_its_end(arguments: Sequence[str], log: Path, before: Callable[[], None] = lambda: None, **watch: Any) -> int:
    code = wait(fork(arguments, log, before), **watch)
    assert code is not None
    return code


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "(nothing was said)"


def log_through_a_pipe(log: Path) -> None:
    reader = subprocess.Popen(["sh", "-c", f'cat >> "{log}"'], stdin=subprocess.PIPE)
    assert reader.stdin
    os.dup2(reader.stdin.fileno(), 1)
    os.dup2(reader.stdin.fileno(), 2)

"""Signals against what the operating system and Python do by themselves."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cogvideox_factory import stopping
from cogvideox_factory.stopping import Stopped, StopRequest, stop_requests

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[dict[int, object]]:
    """Handlers that a failing test cannot leak past, and that are ours alone, so that restoring can be seen."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def terminate(number: int, frame: object) -> None:
        raise SystemExit("terminated by the handler from before")

    before = {number: signal.getsignal(number) for number in NUMBERS}
    handlers: dict[int, Any] = {signal.SIGINT: interrupt, signal.SIGTERM: terminate, signal.SIGUSR1: terminate}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    yield {**handlers}
    for number, handler in before.items():
        signal.signal(number, handler)


def current_handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in NUMBERS}


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_a_request_and_interrupts_nothing(number: signal.Signals, capfd) -> None:
    with stop_requests() as stop:
        assert not stop.requested
        stop.check("never seen")
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(Stopped, match=r"^start again to go on$"):
            stop.check("start again to go on")
    out, err = capfd.readouterr()
    assert out == "" and number.name in err and "second" in err


@pytest.mark.parametrize("first", NUMBERS)
def test_a_second_ctrl_c_stops_at_once(first: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), stop_requests():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", NUMBERS)
def test_a_second_sigterm_goes_to_the_handler_from_before(first: signal.Signals) -> None:
    with pytest.raises(SystemExit, match="handler from before"), stop_requests():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)


def test_a_second_sigterm_ends_a_process_that_ignores_the_request() -> None:
    program = (
        "import signal, time\n"
        "from cogvideox_factory.stopping import stop_requests\n"
        "with stop_requests() as stop:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print(stop.requested, flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == "True\n" and done.returncode == -signal.SIGTERM


def test_handlers_are_ours_in_the_block_and_restored_after_it(own_handlers) -> None:
    with stop_requests():
        inside = current_handlers()
        assert all(inside[number] is not own_handlers[number] for number in NUMBERS)
    assert current_handlers() == own_handlers


def test_handlers_are_restored_after_a_signal_and_after_an_error(own_handlers) -> None:
    with stop_requests():
        signal.raise_signal(signal.SIGTERM)
    assert current_handlers() == own_handlers
    with pytest.raises(RuntimeError), stop_requests():
        raise RuntimeError
    assert current_handlers() == own_handlers


def test_a_request_does_not_last_into_the_next_block() -> None:
    with stop_requests() as first:
        signal.raise_signal(signal.SIGINT)
    with stop_requests() as second:
        assert first.requested and not second.requested
        signal.raise_signal(signal.SIGINT)  # a request again, not an interrupt
        assert second.requested
    assert not StopRequest().requested


def test_in_another_thread_the_block_runs_and_leaves_handlers_alone(own_handlers) -> None:
    seen: list[object] = []

    def work() -> None:
        with stop_requests() as stop:
            stop.check("never seen")
            seen.append(stop)
            seen.append(current_handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert len(seen) == 2 and isinstance(seen[0], StopRequest) and not seen[0].requested
    assert seen[1] == own_handlers


@pytest.mark.parametrize("second", NUMBERS)
def test_what_a_launcher_passes_on_at_the_same_time_is_no_second_signal(
    monkeypatch: pytest.MonkeyPatch, second: signal.Signals
) -> None:
    """Ctrl-C reaches torchrun's processes twice: from the terminal, and from torchrun, which got it too."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    clock = [100.0]
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended, stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        clock[0] += 1
        signal.raise_signal(second)
        assert stop.requested
        clock[0] += stopping.RELAY_SECONDS
        signal.raise_signal(second)
    assert ended.type is (KeyboardInterrupt if second == signal.SIGINT else SystemExit)


def test_a_signal_in_the_middle_of_a_print_is_told_nonetheless(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: printing in a handler raises where the stream is being written to."""

    def refused(*arguments: object) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with stop_requests() as stop:
        monkeypatch.setattr(sys.stderr, "write", refused)
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.undo()
        assert stop.requested
    assert "SIGTERM" in capfd.readouterr().err


def test_a_request_to_another_process_is_heard_and_stays() -> None:
    heard: list[bool] = []

    def hear(is_requested: bool) -> bool:
        heard.append(is_requested)
        return len(heard) == 2

    stop = StopRequest()
    stop.hear = hear
    assert [stop.requested, stop.requested] == [False, True]
    assert stop.requested and heard == [False, False, True]  # whatever is heard later

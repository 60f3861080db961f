"""Processes that wait for each other and end together: as threads over torch's own store, and as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_prepare_processes import free_port

from cogvideox_factory import ranks
from cogvideox_factory.cli import run_guarded
from cogvideox_factory.config import RunError, UserError
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.stopping import Stopped, StopRequest
from cogvideox_factory.training.metrics import read_metrics


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Run a function once a rank, each in a thread; what each returns or raises."""
    here = threading.local()

    def call(*functions: Callable[[StopRequest], Any]) -> list[Any]:
        results: list[Any] = [None] * len(functions)
        store = torch.distributed.HashStore()
        monkeypatch.setattr(ranks, "num_ranks", lambda: len(functions))
        monkeypatch.setattr(ranks, "rank", lambda: getattr(here, "rank", None))
        monkeypatch.setattr(ranks, "_store", lambda: store)
        monkeypatch.setattr(ranks, "_next_meeting", lambda: next(here.meetings))

        def run(number: int) -> None:
            here.rank, here.meetings = number, iter(range(1000))
            stop = StopRequest()
            ranks.share_requests(stop)
            try:
                results[number] = functions[number](stop)
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "a rank waits for ever"
        return results

    return call


def working(error: Exception | None = None, result: Any = None) -> Callable[[StopRequest], Any]:
    def work(stop: StopRequest) -> Any:
        with ranks.together(stop):
            if error:
                raise error
        return result

    return work


def test_a_process_that_dies_without_a_word_is_not_waited_for(on_ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.01)
    start = ranks._start_pulse
    monkeypatch.setattr(ranks, "_start_pulse", lambda store, number: start(store, number) if number != 1 else None)

    def slow(stop: StopRequest) -> None:
        time.sleep(0.5)  # longer than a silence may be: it lives, and is waited for
        working()(stop)

    first, died, third = on_ranks(working(), lambda stop: None, slow)
    assert died is None
    for waiting in (first, third):
        assert isinstance(waiting, RunError) and "process 1 of 3 has not been heard of" in str(waiting)


def test_nobody_leaves_before_all_have_come(on_ranks) -> None:
    arrived: list[int] = []

    def slow(stop: StopRequest) -> list[int]:
        with ranks.together(stop):
            time.sleep(0.05)
            arrived.append(0)
        return list(arrived)

    def fast(stop: StopRequest) -> list[int]:
        with ranks.together(stop):
            arrived.append(1)
        return list(arrived)

    assert on_ranks(slow, fast) == [[1, 0], [1, 0]]


def test_the_first_that_may_keep_the_store_leaves_when_the_others_have_read(on_ranks, monkeypatch) -> None:
    """Else they would find it gone, and say that it has died."""
    events: list[str] = []
    asleep = threading.Event()

    def pause(seconds: float) -> None:
        asleep.wait(5)  # until the other one waits, too
        if ranks.rank() == 1:
            events.append("looks")

    def first(stop: StopRequest) -> None:
        with ranks.together(stop):
            asleep.wait(0.1)  # the other one waits already, and does not look yet
        events.append("leaves")

    def second(stop: StopRequest) -> None:
        with ranks.together(stop):
            pass

    monkeypatch.setattr(ranks, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    threading.Timer(0.3, asleep.set).start()
    assert on_ranks(first, second) == [None, None]
    assert events.index("looks") < events.index("leaves")


@pytest.mark.parametrize("error", [Stopped("go on"), UserError("--rank: 0"), RunError("disk"), OSError(28, "no")])
def test_what_ends_one_ends_all_in_its_way_and_is_told_once(on_ranks, error: Exception, capfd) -> None:
    results = on_ranks(working(), working(error), working())
    assert results[1] is error and not ranks.is_echo(error)
    for echo in (results[0], results[2]):
        assert type(echo) is (RunError if isinstance(error, OSError) else type(error)) and ranks.is_echo(echo)
    codes = []
    for result in results:

        def raising(result: Exception = result) -> None:
            raise result

        codes.append(run_guarded(raising))
    assert codes == [{Stopped: 75, UserError: 2}.get(type(error), 1)] * 3
    assert capfd.readouterr().err.count("cogvideox-factory: ") == 1


def test_a_failure_counts_more_than_a_stop_and_the_same_is_told_once(on_ranks) -> None:
    stopped, failed = on_ranks(working(Stopped("all saved")), working(UserError("no such column")))
    assert (type(stopped), type(failed)) == (UserError, UserError)
    assert ranks.is_echo(stopped) and not ranks.is_echo(failed)
    first, second = on_ranks(working(Stopped("all saved")), working(Stopped("all saved")))
    assert (type(first), type(second)) == (Stopped, Stopped) and not ranks.is_echo(first) and ranks.is_echo(second)
    # Different failures are both told.
    first, second = on_ranks(working(UserError("a")), working(RunError("b")))
    assert (str(first), str(second)) == ("a", "b") and not ranks.is_echo(first) and not ranks.is_echo(second)


def test_a_signal_to_one_is_seen_by_all_though_it_waits_already(on_ranks) -> None:
    """Trap: a process in a collective wait passes nothing on, and the others work for hours."""

    def waiting(stop: StopRequest) -> str:
        threading.Timer(0.05, lambda: setattr(stop, "requested", True)).start()
        with ranks.together(stop):
            pass
        return "never here"

    def encoding(stop: StopRequest) -> str:
        with ranks.together(stop):
            for _ in range(2000):
                time.sleep(0.005)
                stop.check("stopped while encoding")
        return "never here"

    results = on_ranks(waiting, encoding)
    assert [type(result) for result in results] == [Stopped, Stopped]
    assert [str(result) for result in results] == ["stopped while encoding"] * 2


def test_a_failure_of_one_makes_the_others_come_soon(on_ranks) -> None:
    def encoding(stop: StopRequest) -> None:
        with ranks.together(stop):
            for _ in range(2000):
                time.sleep(0.005)
                stop.check("stopped while encoding")

    results = on_ranks(working(UserError("--strict")), encoding)
    assert [(type(result), str(result)) for result in results] == [(UserError, "--strict")] * 2


def test_the_first_rank_goes_first_and_the_others_do_not_follow_its_failure(on_ranks) -> None:
    order: list[int] = []

    def work_of(number: int) -> Callable[[StopRequest], int]:
        def work() -> int:
            order.append(number)
            return number

        return lambda stop: ranks.first_rank_first(work, stop)

    assert on_ranks(work_of(0), work_of(1)) == [0, 1] and order == [0, 1]

    def failing() -> int:
        raise UserError("no such image")

    order.clear()
    results = on_ranks(lambda stop: ranks.first_rank_first(failing, stop), work_of(1))
    assert [str(result) for result in results] == ["no such image"] * 2 and order == []


def test_one_process_waits_for_nobody() -> None:
    stop = StopRequest()
    ranks.share_requests(stop)
    assert stop.hear is None
    with pytest.raises(OSError, match="full"), ranks.together(stop):
        raise OSError(28, "full")
    assert ranks.first_rank_first(lambda: 5, stop) == 5


def test_all_ranks_see_the_flag_of_any_from_one_reduction() -> None:
    reduced: list[list[float]] = []

    def reduce(tensor: torch.Tensor, kind: str) -> torch.Tensor:
        assert kind == "sum"
        reduced.append(tensor.tolist())
        return tensor + torch.tensor([1.0, 0.0, 0.0])  # of another rank

    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=reduce)
    assert ranks.any_rank(accelerator, False, False, True) == (True, False, True)
    assert reduced == [[0.0, 0.0, 1.0]]
    assert ranks.any_rank(SimpleNamespace(num_processes=1), True, False) == (True, False)


def start_two(run: Path, *flags: str | Path) -> list[subprocess.Popen[str]]:
    """A training by two processes over gloo, as a launcher starts them, without one that would end them."""
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "cogvideox_factory", "train", *map(str, flags), "--output_dir", str(run)]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "RANK": rank, "LOCAL_RANK": rank, **launch},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    for _ in range(1200):
        if len(read_metrics(run / "metrics.jsonl")) >= step or any(process.poll() is not None for process in processes):
            return
        time.sleep(0.1)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(
    tmp_path: Path, tiny_model: Path, prepared_folder: Path
) -> None:
    flags = ("--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder, "--load_tensors")
    both = start_two(tmp_path, *flags, "--max_train_steps", "100000", "--report_to", "none", "--rank", "4")
    try:
        wait_for_step(tmp_path, 3, both)
        both[1].send_signal(signal.SIGUSR1)
        messages = [process.communicate(timeout=60)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [75, 75], messages
    (checkpoint,) = list_checkpoints(tmp_path)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert checkpoint.name == f"step-{last:08}" and f"stopped after step {last} of" in messages[0]
    assert "stopped after step" not in messages[1] and "SIGUSR1" in messages[1]


@pytest.mark.slow
def test_when_one_of_two_processes_dies_the_other_ends_with_a_message(
    tmp_path: Path, tiny_model: Path, prepared_folder: Path
) -> None:
    flags = ("--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder, "--load_tensors")
    more = ("--max_train_steps", "100000", "--checkpointing_steps", "2", "--checkpoints_total_limit", "2")
    both = start_two(tmp_path, *flags, *more, "--report_to", "none", "--rank", "4", "--nccl_timeout", "30")
    try:
        wait_for_step(tmp_path, 3, both)
        both[1].kill()
        message = both[0].communicate(timeout=90)[1]
    finally:
        for process in both:
            process.kill()
    assert both[0].returncode == 1 and "Traceback" not in message
    assert "another process of this run has died" in message
    assert list_checkpoints(tmp_path)

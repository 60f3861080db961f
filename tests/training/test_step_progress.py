"""What is said of the steps of a training."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from cogvideox_factory.training.step_progress import StepProgress, duration, next_checkpoint


def line(step: int, seconds: float = 2.0, **others: Any) -> dict[str, Any]:
    return {"step": step, "loss": 0.25, "lr": 1e-4, "memory_gib": 16.875, "step_seconds": seconds, **others}


def times(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("time ")]


def test_the_time_to_the_checkpoint_is_told_once_from_steps_that_were_timed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cogvideox_factory"), StepProgress(900, 100, 250) as progress:
        progress.show(line(101, 300.0))  # compiling, reading ahead: no measure of the others
        for step, seconds in ((102, 2.0), (103, 50.0)):
            progress.show(line(step, seconds))
        assert not times(caplog)
        for step in (104, 105, 106, 107, 108, 109):
            progress.show(line(step))
    assert times(caplog) == ["time       about 5 min to the checkpoint of step 250, at 2.00 seconds a step"]


def test_no_time_is_told_of_a_checkpoint_that_is_past_nor_by_other_ranks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cogvideox_factory"):
        with StepProgress(10, 0, 3) as progress:
            for step in range(1, 11):
                progress.show(line(step))
        with StepProgress(10, 0, 10, is_silent=True) as progress:
            for step in range(1, 11):
                progress.show(line(step))
    assert not times(caplog)


def test_the_bar_shows_loss_rate_and_memory(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cogvideox_factory"):
        with StepProgress(1, 0, 1) as progress:
            progress.show(line(1))
        with StepProgress(1, 0, 1) as progress:
            progress.show(line(1, skipped=True) | {"loss": None})
    bars = [message for message in caplog.messages if message.startswith("Training  1/1")]
    assert [bar.partition(", loss=")[2] for bar in bars] == [
        "0.2500, lr=1.0e-04, memory=16.88GiB]",
        "skipped, lr=1.0e-04, memory=16.88GiB]",
    ]


def test_the_next_checkpoint_is_at_the_end_at_the_latest() -> None:
    assert [next_checkpoint(step, 12, 5) for step in (0, 4, 5, 9, 10, 11)] == [5, 5, 10, 10, 12, 12]


def test_durations_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (0.4, 42.4, 61, 3599, 3661, 90000)] == [
        *("0 seconds", "42 seconds", "1 min", "1 h 00 min", "1 h 01 min", "25 h 00 min"),
    ]

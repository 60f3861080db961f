"""What is shown of every optimizer step: a bar's figures for people, a line for programs."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from cogvideox_factory import messages
from cogvideox_factory.progress import progress_bar

logger = logging.getLogger(__name__)
NUM_TIMED_STEPS = 3  # from which the time of the others is told, after a first one, which is slower


class StepProgress:
    """The progress of a training from `done` steps to `num_steps`.

    A context manager, which draws the bar; on other ranks than the first, it is silent.
    """

    def __init__(self, num_steps: int, done: int, checkpointing_steps: int, *, is_silent: bool = False):
        self._num_steps = num_steps
        self._is_silent = is_silent
        self._bar = progress_bar(
            *(None, "Training", "step", num_steps), done=done, is_silent=is_silent or messages.are_json()
        )
        self._checkpoint_step = next_checkpoint(done, num_steps, checkpointing_steps)
        self._first_timed = done + 2
        self._seconds: list[float] = []

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._bar.close()

    def show(self, line: Mapping[str, Any]) -> None:
        """A step is done, of which `line` is the line in metrics.jsonl."""
        if self._is_silent:
            return
        loss = "skipped" if line.get("skipped") else f"{line['loss']:.4f}"
        if messages.are_json():
            logger.info("step %d of %d", line["step"], self._num_steps, extra={"fields": {"metrics": dict(line)}})
        memory = f"{line['memory_gib']:.2f}GiB"
        self._bar.set_postfix(loss=loss, lr=f"{line['lr']:.1e}", memory=memory, refresh=False)
        self._bar.update()
        self._tell_time(line)

    def _tell_time(self, line: Mapping[str, Any]) -> None:
        """How long the next checkpoint takes, once, as soon as a few steps are timed."""
        if line["step"] < self._first_timed or len(self._seconds) == NUM_TIMED_STEPS:
            return
        self._seconds.append(line["step_seconds"])
        steps_left = self._checkpoint_step - line["step"]
        if len(self._seconds) == NUM_TIMED_STEPS and steps_left > 0:
            seconds = statistics.median(self._seconds)
            told = duration(seconds * steps_left), self._checkpoint_step, seconds
            logger.info("time       about %s to the checkpoint of step %d, at %.2f seconds a step", *told)


def next_checkpoint(step: int, num_steps: int, checkpointing_steps: int) -> int:
    """The step at which the next checkpoint is saved; there is always one of the last step."""
    return min((step // checkpointing_steps + 1) * checkpointing_steps, num_steps)


def duration(seconds: float) -> str:
    """As people say it, in whole minutes from one on."""
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"

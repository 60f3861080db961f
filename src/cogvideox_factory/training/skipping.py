"""Optimizer steps that were skipped because their loss or gradient is no number: counted, named, written down.

A single clip can be the cause, or a training that has gone astray. The first is survived by leaving its step out; the
second shows in skipped steps without end, and the run stops at so many in a row.

    skipped_steps.jsonl    a line a skipped step: step, epoch, loss, grad_norm (as text: nan, inf), clips
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cogvideox_factory.data.sampler import Position, Sampler
from cogvideox_factory.data.store import Entry
from cogvideox_factory.training.metrics import MetricsLog

if TYPE_CHECKING:
    from cogvideox_factory.training.loop import StepResult

logger = logging.getLogger(__name__)

FILE = "skipped_steps.jsonl"
CLIPS_TOLD = 5


class SkippedSteps:
    """The skipped steps of a run. Written by the first rank only; counted on all."""

    def __init__(self, run: Path, last_step: int, accelerator: Accelerator, sampler: Sampler, entries: Sequence[Entry]):
        """Lines after `last_step`, of a course that was left, are dropped."""
        self._run = run
        self._last_step = last_step
        self._accelerator = accelerator
        self._sampler = sampler
        self._entries = entries
        self.in_a_row = 0
        self.last_clips: list[str] = []
        # A file that every run has would say of every run that something is wrong.
        self._log = MetricsLog(run, last_step, accelerator, FILE) if (run / FILE).is_file() else None

    def add(self, step: int, position: Position, result: StepResult, limit: int) -> None:
        """Note that optimizer step `step`, at this position of the sampler, was skipped. Called on every rank."""
        self.in_a_row += 1
        self.last_clips = self._clips(position, result.clip_losses)
        is_loss = not torch.tensor(result.loss).isfinite()
        what = f"loss is {result.loss}" if is_loss else f"gradient's norm is {result.grad_norm}"
        logger.warning(
            "skipped    step %d: its %s (%d in a row, of at most %d); of: %s",
            *(step, what, self.in_a_row, limit, told(self.last_clips)),
        )
        self._log = self._log or MetricsLog(self._run, self._last_step, self._accelerator, FILE)
        self._log.write(
            step=step,
            epoch=position.epoch,
            loss=str(result.loss),
            grad_norm=str(result.grad_norm),
            clips=self.last_clips,
        )

    def end_row(self) -> None:
        """A step was not skipped."""
        self.in_a_row = 0

    def _clips(self, position: Position, clip_losses: Sequence[torch.Tensor]) -> list[str]:
        """Sources of the clips whose own loss is no number; of all clips of the step where each has one."""
        step, rank = self._sampler.step_at(position), self._accelerator.process_index
        mine = [
            self._entries[index].source
            for shares, losses in zip(step, clip_losses, strict=False)  # a step may end at the first bad batch
            for index, loss in zip(shares[rank] or shares[0][:1], losses.tolist(), strict=True)
            if not torch.tensor(loss).isfinite()
        ]
        bad = dict.fromkeys(gather_object(mine))
        every = dict.fromkeys(self._entries[index].source for shares in step for share in shares for index in share)
        return list(bad or every)


def told(clips: Sequence[str]) -> str:
    """Some of the clips, for a message."""
    more = len(clips) - CLIPS_TOLD
    return ", ".join(clips[:CLIPS_TOLD]) + (f" and {more} more" if more > 0 else "")

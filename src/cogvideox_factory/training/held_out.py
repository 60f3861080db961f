"""The loss on clips that are not trained on, at fixed noise and timesteps, so that its values can be compared.

The training loss says little of one step: it is of a few clips at random noise levels. Here every clip is seen at the
same few timesteps under the same noise, keyed by the clip alone, whatever the step, the run's seed, the batch size and
the number of processes: where the number falls, the model has become better at clips it has never seen, and where it
rises while the training loss falls, the model has begun to memorise.

Rejected: the mean of random draws, as in training; its scatter hides the changes of a fine-tuning.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.files import hash_of
from cogvideox_factory.data.loader import Batch, PreparedClips
from cogvideox_factory.data.store import DamagedEntry
from cogvideox_factory.model.denoiser import Denoiser
from cogvideox_factory.progress import progress_bar
from cogvideox_factory.ranks import any_rank, together
from cogvideox_factory.stopping import StopRequest
from cogvideox_factory.training.metrics import MetricsLog, finite_or_none, read_metrics
from cogvideox_factory.training.objective import velocity_loss

logger = logging.getLogger(__name__)

FILE = "validation_loss.jsonl"
# Noise levels that each clip is seen at: the middles of equal parts of the schedule.
NUM_QUANTILES = 4


class HeldOutLoss:
    """Measures the loss on held-out clips and writes it to validation_loss.jsonl of the run, a line a measurement."""

    def __init__(
        self,
        run: Path,
        clips: PreparedClips,
        batch_size: int,
        denoiser: Denoiser,
        scheduler,
        accelerator: Accelerator,
        stop: StopRequest,
        *,
        last_step: int,
        every_steps: int,
        also_to: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        """`clips` drop no caption. What is written goes to `also_to` too. Lines after `last_step`, of a course that was
        left, are dropped; those of a start at step 0 too, which may have been of another model."""
        self.clips = clips
        self.batch_size = batch_size
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.accelerator = accelerator
        self.stop = stop
        self.every_steps = every_steps
        self.identity = hash_of(sorted(entry.key for entry in clips.entries))[:8]
        if accelerator.is_main_process:
            self._set_aside_other_clips(run / FILE)
        self._log = MetricsLog(run, last_step or -1, accelerator, FILE, also_to)
        self._lines = self._log.kept  # of the first rank; empty on the others

    def _set_aside_other_clips(self, path: Path) -> None:
        """Values of other clips cannot be compared with what is measured now: they are kept under a name that holds
        the identity of their clips, until these come back."""
        lines = read_metrics(path)
        others = [line.get("held_out") for line in lines if line.get("held_out") != self.identity]
        if others:
            kept_as = path.with_name(f"left-{others[-1]}-{path.name}")
            os.replace(path, kept_as)
            logger.warning("the held-out clips are not those of before: their values are kept in %s", kept_as.name)
        kept = path.with_name(f"left-{self.identity}-{path.name}")
        if kept.is_file() and (others or not lines):
            os.replace(kept, path)
            logger.info("the held-out clips are those of %s: their values are taken up again", kept.name)

    def __enter__(self) -> HeldOutLoss:
        return self

    def __exit__(self, *error: object) -> None:
        self._log.__exit__(*error)

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether a value is asked for when this step has been done."""
        return step % self.every_steps == 0 or step == num_steps

    def is_due_at_start(self, step: int, num_steps: int) -> bool:
        """Whether a start after this step has to measure first; the same answer on every rank.

        There is no value yet, or a signal came before the one of this step.
        """
        is_known = any(line["step"] == step for line in self._lines)  # the first rank knows
        is_wanted = not self._lines or (self.is_due(step, num_steps) and not is_known)
        return broadcast_object_list([is_wanted])[0]

    def measure(self, model, step: int, epoch: int, *, is_last: bool = False) -> float | None:
        """Measure and write the loss of the model as it is after a step; None where a signal asked to stop.

        The last measurement is not cut short: no later start of the run would make up for it.
        """
        losses = self.losses(model, f"Held-out loss of step {step}", may_stop=not is_last)
        if losses is None:
            return None
        by_quantile = losses.mean(0).tolist()
        loss = losses.mean().item()
        line = {
            "step": step,
            "epoch": epoch,
            "loss": finite_or_none(loss),
            "loss_by_quantile": {
                f"{(index + 0.5) / NUM_QUANTILES:g}": finite_or_none(value) for index, value in enumerate(by_quantile)
            },
            "clips": len(losses),
            "held_out": self.identity,
        }
        if self.accelerator.is_main_process:
            self._log.write(**line)
            self._lines.append(line)
            finite = [line for line in self._lines if line["loss"] is not None]
            best = min(finite, key=lambda line: line["loss"], default=line)
            logger.info("held-out   %.4f (best %.4f at step %d)", loss, best["loss"] or math.nan, best["step"])
        return loss

    @torch.no_grad()
    def losses(self, model, label: str = "Held-out loss", *, may_stop: bool = False) -> torch.Tensor | None:
        """The loss of every clip at every noise level, (clips, quantiles) fp64 on the CPU, on every rank.

        The model comes back in the mode it had. None where `may_stop` and a signal asked for it.
        """
        accelerator = self.accelerator
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        losses = torch.zeros(len(self.clips.entries), NUM_QUANTILES, dtype=torch.float64, device=accelerator.device)
        rounds = list(self._rounds())
        try:
            for indices, draw, counts in progress_bar(
                rounds, label, "batch", is_silent=not accelerator.is_main_process
            ):
                batch, damage = self._read(indices, draw)
                must_stop, is_damaged = any_rank(accelerator, may_stop and self.stop.requested, damage is not None)
                if must_stop:
                    return None
                if is_damaged:
                    with together(self.stop):
                        if damage:
                            raise damage
                assert batch is not None
                values = velocity_loss(model, self.denoiser, self.scheduler, batch)
                if counts:
                    losses[indices, draw] = values.double()
        finally:
            for module, was_training in modes:
                module.training = was_training
        if accelerator.num_processes > 1:
            losses = accelerator.reduce(losses, "sum")  # each value was found by one rank, and is 0 on the others
        return losses.cpu()

    def _rounds(self) -> Iterator[tuple[list[int], int, bool]]:
        """(clips, draw, whether they count) of this rank.

        Every rank has as many: engines that divide a model among the ranks need all of them in each forward pass.
        """
        batches = _batches([entry.bucket for entry in self.clips.entries], self.batch_size)
        work = [(batch, draw) for batch in batches for draw in range(NUM_QUANTILES)]
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        for start in range(0, len(work), num_ranks):
            counts = start + rank < len(work)
            yield *work[start + rank if counts else start], counts

    def _read(self, indices: Sequence[int], draw: int) -> tuple[Batch | None, DamagedEntry | None]:
        """A batch on the device, or why there is none: the other processes have to know before they go on."""
        try:
            return self.clips.fixed_batch(indices, draw, NUM_QUANTILES).to(self.accelerator.device), None
        except DamagedEntry as damage:
            return None, damage


def _batches(buckets: Sequence[Bucket], batch_size: int) -> list[list[int]]:
    """Indices of clips, so many of one bucket together."""
    of_bucket: dict[Bucket, list[int]] = {}
    for index, bucket in enumerate(buckets):
        of_bucket.setdefault(bucket, []).append(index)
    return [
        indices[start : start + batch_size]
        for indices in of_bucket.values()
        for start in range(0, len(indices), batch_size)
    ]

"""Writes the checkpoints of a run, one at a time: those of a LoRA beside its training.

A LoRA's training waits while its tensors are copied on the host; hashing, writing and flushing, which take longer, are
done by a thread. Full fine-tuning has states of tens of GiB, for whose copies no host has the room: it waits until all
is written, a tensor at a time.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

from safetensors import SafetensorError

from cogvideox_factory.config import RunError
from cogvideox_factory.training.checkpoint import Snapshot, TrainState
from cogvideox_factory.training.ema import WeightAverage

logger = logging.getLogger(__name__)


class Saver:
    """Saves a training's checkpoints: a LoRA's beside it, within this object's context; else at once.

    When the context ends, what is being written is waited for; `wait` then tells whether it failed.
    """

    def __init__(self, run: Path, keep: int | None, last_step: int):
        """`keep` is how many checkpoints stay, if not all. `last_step` is that of the checkpoint from which the run
        went on, 0 for none."""
        self.run = run
        self.keep = keep
        self.saved_step = last_step  # of the newest checkpoint that is complete
        self._is_beside = False
        self._writing: Future[None] | None = None

    def __enter__(self) -> Saver:
        self._is_beside = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._is_beside = False
        if kind is KeyboardInterrupt:  # a second Ctrl-C stops at once; what is unfinished is absent
            return
        if self._writing is not None:
            wait([self._writing])
        if kind is not None and self.has_failed:
            logger.error("%s", self._writing and self._writing.exception())  # beside what ended the run

    def last_good(self) -> str:
        """The state to which a run that fails can go back, for a person. Waits for what is being written."""
        if self._writing is not None:
            wait([self._writing])
        return self._newest()

    def save(self, state: TrainState, transformer, optimizer, average: WeightAverage | None = None) -> None:
        """Save the present state. Raises RunError where it, or the one before, could not be written."""
        self.wait()
        snapshot = Snapshot.take(state, transformer, optimizer, average)
        if self._is_beside and snapshot.lora is not None:
            self._writing = _in_background(functools.partial(self._write, snapshot.copied()))
        else:
            self._write(snapshot)

    @property
    def has_failed(self) -> bool:
        """Whether writing has failed that went on beside the training, which `wait` then raises. Does not wait."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written. Raises RunError where that failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            folder = snapshot.write(self.run, self.keep)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(
                f"the checkpoint of step {snapshot.step} could not be written to {self.run} ({reason}); the last good "
                f"state is the {self._newest()}"
            ) from error
        self.saved_step = snapshot.step
        logger.info("saved      %s", folder)

    def _newest(self) -> str:
        return f"checkpoint of step {self.saved_step}" if self.saved_step else "base model"


def _in_background(work: Callable[[], None]) -> Future[None]:
    """In a thread that does not keep the process from ending, as an executor's would."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, `wait` raises it
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future

"""Decides which clip goes to which size, and in which order the clips of an epoch are drawn.

Pure arithmetic on numbers: nothing is decoded or read here.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Bucket(NamedTuple):
    """A size of clips that are trained together: number of frames, height and width in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def all_buckets(frames: Sequence[int], heights: Sequence[int], widths: Sequence[int]) -> list[Bucket]:
    """Every number of frames with every height with every width."""
    return [Bucket(*sizes) for sizes in itertools.product(sorted(frames), sorted(heights), sorted(widths))]


def choose_bucket(num_frames: int, height: int, width: int, buckets: Iterable[Bucket]) -> Bucket | None:
    """The bucket of a clip of this many frames at the training rate, and of this size in pixels.

    The largest number of frames that the clip fills; then the nearest aspect ratio, by the distance of logarithms,
    so that twice as wide is as far as twice as high; then the largest area that needs no upscaling, or else the
    smallest. None where the clip is too short for every bucket.
    """
    fitting = [bucket for bucket in buckets if bucket.frames <= num_frames]
    if not fitting:
        return None

    def rank(bucket: Bucket) -> tuple[float, ...]:
        # Scaling both sizes by one number leaves a difference in the last bits, which must not decide.
        distance = round(abs(math.log(bucket.width / bucket.height) - math.log(width / height)), 6)
        upscaled = bucket.height > height or bucket.width > width
        area = bucket.height * bucket.width
        return (-bucket.frames, distance, upscaled, area if upscaled else -area)

    return min(fitting, key=rank)


@dataclass(frozen=True)
class Position:
    """Where in the training the sampler stands: the next optimizer step is step `step` of epoch `epoch`."""

    epoch: int = 0
    step: int = 0


# One optimizer step: its micro-batches, each with the indices of the clips that every rank takes.
Step = list[list[list[int]]]


@dataclass(frozen=True)
class Sampler:
    """The order of training, as indices of clips only.

    Every epoch draws each clip exactly once, in an order shuffled anew from (seed, epoch). In one micro-batch every
    rank gets clips of the same bucket. What is left of a bucket makes a smaller batch, and a rank without a share
    gets an empty one.
    """

    buckets: Sequence[Bucket]  # of each clip
    batch_size: int  # clips in one micro-batch of one rank
    num_ranks: int = 1
    num_micro_batches: int = 1  # in one optimizer step
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.buckets and self.batch_size >= 1 and self.num_ranks >= 1 and self.num_micro_batches >= 1

    @property
    def clips_per_step(self) -> int:
        """Clips in one full optimizer step, over all ranks and micro-batches."""
        return self.batch_size * self.num_ranks * self.num_micro_batches

    def epoch(self, epoch: int) -> list[Step]:
        """All optimizer steps of an epoch."""
        order = list(range(len(self.buckets)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        waiting: dict[Bucket, list[int]] = {}
        full: list[list[int]] = []
        for index in order:
            batch = waiting.setdefault(self.buckets[index], [])
            batch.append(index)
            if len(batch) == self.batch_size * self.num_ranks:
                full.append(waiting.pop(self.buckets[index]))
        micro_batches = [self._shares(batch) for batch in [*full, *waiting.values()]]
        return [
            micro_batches[start : start + self.num_micro_batches]
            for start in range(0, len(micro_batches), self.num_micro_batches)
        ]

    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the same for every epoch."""
        size = self.batch_size * self.num_ranks
        batches = sum(math.ceil(self.buckets.count(bucket) / size) for bucket in set(self.buckets))
        return math.ceil(batches / self.num_micro_batches)

    def from_position(self, position: Position) -> Iterator[tuple[Position, Step]]:
        """Steps without end, each with its own position, from the given one on."""
        epoch, start = position.epoch, position.step
        while True:
            for index, step in enumerate(self.epoch(epoch)):
                if index >= start:
                    yield Position(epoch, index), step
            epoch, start = epoch + 1, 0

    def _shares(self, batch: list[int]) -> list[list[int]]:
        """A micro-batch divided over the ranks, as evenly as it goes."""
        return [batch[rank :: self.num_ranks] for rank in range(self.num_ranks)]

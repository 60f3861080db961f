"""The order in which clips are drawn, and where in it a training stands.

The order of an epoch depends on the seed and the epoch only. A layout (clips a batch, processes, batches a step) says
how it is cut into optimizer steps. Where the layout changes in the middle of an epoch, the clips that were seen so far
are worked out from the layouts before, and the rest is cut anew: every clip counts once an epoch all the same.

Rejected: a list of the clips seen, saved with the position; it grows with the data set and says no more. And an order
that every layout cuts at the same places; a batch holds one bucket, so that its size decides which clip comes when.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from cogvideox_factory.config import UserError
from cogvideox_factory.data.buckets import Bucket


@dataclass(frozen=True)
class Layout:
    """How the order of an epoch is cut into optimizer steps."""

    batch_size: int  # clips in one micro-batch of one rank
    num_ranks: int = 1
    num_micro_batches: int = 1  # in one optimizer step
    drop_last: bool = False  # leave out what does not fill a micro-batch of all ranks

    @property
    def clips_per_micro_batch(self) -> int:
        """Clips in one full micro-batch, over all ranks."""
        return self.batch_size * self.num_ranks


# A part of an epoch that was trained under another layout: that layout, and its number of optimizer steps.
Segment = tuple[Layout, int]


@dataclass(frozen=True)
class Position:
    """Where in the training the sampler stands: the next optimizer step is step `step` of what `earlier` left of the
    epoch `epoch`. An epoch that has ended is never left standing at its last step: the next one begins at step 0."""

    epoch: int = 0
    step: int = 0
    earlier: tuple[Segment, ...] = ()

    @property
    def ended_epoch(self) -> int | None:
        """The epoch that ended just before, if one did."""
        return self.epoch - 1 if self.epoch and not self.step and not self.earlier else None

    @property
    def last_epoch(self) -> int:
        """The epoch of the step before; of the first one, where there is none."""
        return self.epoch if self.ended_epoch is None else self.ended_epoch


# One optimizer step: its micro-batches, each with the indices of the clips that every rank takes.
Step = list[list[list[int]]]


@dataclass(frozen=True)
class Sampler:
    """The order of training, as indices of clips only.

    Every epoch draws each clip exactly once, in an order shuffled anew from (seed, epoch). In one micro-batch every
    rank gets clips of the same bucket. What is left of a bucket makes a smaller batch, and a rank without a share
    gets an empty one; or, with `drop_last`, it is left out.
    """

    buckets: Sequence[Bucket]  # of each clip
    batch_size: int
    num_ranks: int = 1
    num_micro_batches: int = 1
    seed: int = 0
    drop_last: bool = False
    _known_numbers: dict[tuple[int, tuple[Segment, ...]], int] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        assert self.buckets and self.batch_size >= 1 and self.num_ranks >= 1 and self.num_micro_batches >= 1
        if not self.steps_per_epoch():
            counts = ", ".join(f"{count} of {bucket}" for bucket, count in sorted(Counter(self.buckets).items()))
            raise UserError(
                f"--drop_last leaves no clip: a batch takes {self.layout.clips_per_micro_batch} of one size "
                f"(--train_batch_size {self.batch_size} × {self.num_ranks} processes), and there are {counts}; lower "
                "--train_batch_size or leave out --drop_last"
            )

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.batch_size, self.num_ranks, self.num_micro_batches, self.drop_last)

    @property
    def clips_per_step(self) -> int:
        """Clips in one full optimizer step, over all ranks and micro-batches."""
        return self.layout.clips_per_micro_batch * self.num_micro_batches

    def epoch(self, epoch: int, earlier: Iterable[Segment] = ()) -> list[Step]:
        """All optimizer steps of an epoch, or of what earlier segments left of it."""
        return self._cut(self._clips_left(epoch, earlier), self.layout)

    def step_at(self, position: Position) -> Step:
        """The optimizer step at a position."""
        return self.epoch(position.epoch, position.earlier)[position.step]

    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch; the same for every epoch."""
        return self._number_of_steps(0, ())

    def steps_left(self, position: Position, num_epochs: int) -> int:
        """Optimizer steps from a position to the end of so many epochs, counted from the training's beginning."""
        if position.epoch >= num_epochs:
            return 0
        in_this_epoch = self._number_of_steps(position.epoch, position.earlier) - position.step
        return in_this_epoch + (num_epochs - position.epoch - 1) * self.steps_per_epoch()

    def from_position(self, position: Position) -> Iterator[tuple[Position, Step]]:
        """Steps without end, each with its own position, from the given one on."""
        while True:
            for index, step in enumerate(self.epoch(position.epoch, position.earlier)):
                if index >= position.step:
                    yield replace(position, step=index), step
            position = Position(position.epoch + 1)

    def after(self, position: Position) -> Position:
        """The position that follows when the step of this one is done."""
        return self._in_an_epoch(replace(position, step=position.step + 1))

    def take_over(self, position: Position, layout: Layout) -> Position:
        """A position that counts steps of another layout, as one that counts steps of this sampler's."""
        if layout == self.layout:
            return position
        done = ((layout, position.step),) if position.step else ()
        return self._in_an_epoch(Position(position.epoch, 0, (*position.earlier, *done)))

    def _in_an_epoch(self, position: Position) -> Position:
        is_over = position.step >= self._number_of_steps(position.epoch, position.earlier)
        return Position(position.epoch + 1) if is_over else position

    def _clips_left(self, epoch: int, earlier: Iterable[Segment]) -> list[int]:
        """Clips of an epoch in their order, without those that the segments have seen."""
        order = list(range(len(self.buckets)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        for layout, num_steps in earlier:
            steps = self._cut(order, layout)[:num_steps]
            seen = {index for step in steps for micro_batch in step for share in micro_batch for index in share}
            order = [index for index in order if index not in seen]
        return order

    def _cut(self, order: Iterable[int], layout: Layout) -> list[Step]:
        """Clips in their order → optimizer steps. A micro-batch is drawn when it is full, what is left comes last."""
        waiting: dict[Bucket, list[int]] = {}
        batches: list[list[int]] = []
        for index in order:
            batch = waiting.setdefault(self.buckets[index], [])
            batch.append(index)
            if len(batch) == layout.clips_per_micro_batch:
                batches.append(waiting.pop(self.buckets[index]))
        if not layout.drop_last:
            batches.extend(waiting.values())
        micro_batches = [_shares(batch, layout.num_ranks) for batch in batches]
        size = layout.num_micro_batches
        return [micro_batches[start : start + size] for start in range(0, len(micro_batches), size)]

    def _number_of_steps(self, epoch: int, earlier: tuple[Segment, ...]) -> int:
        """How many steps `epoch(epoch, earlier)` has. Asked for at every step, so it is worked out once."""
        place = (epoch if earlier else 0, earlier)  # a whole epoch has as many steps as any other
        if place not in self._known_numbers:
            clips = self._clips_left(epoch, earlier) if earlier else range(len(self.buckets))
            per_bucket = Counter(self.buckets[index] for index in clips).values()
            size, whole = self.layout.clips_per_micro_batch, math.floor if self.drop_last else math.ceil
            batches = sum(whole(count / size) for count in per_bucket)
            self._known_numbers[place] = math.ceil(batches / self.num_micro_batches)
        return self._known_numbers[place]


def _shares(batch: list[int], num_ranks: int) -> list[list[int]]:
    """A micro-batch divided over the ranks, as evenly as it goes."""
    return [batch[rank::num_ranks] for rank in range(num_ranks)]

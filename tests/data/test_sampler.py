"""The order of an epoch, however it is cut and however often the cut changes, held against what training relies on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.config import UserError
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.sampler import Layout, Position, Sampler, Step

quick = settings(deadline=None, max_examples=150)
fewer = settings(deadline=None, max_examples=40)

A, B, C = Bucket(9, 64, 96), Bucket(17, 64, 96), Bucket(17, 96, 64)

bucket_lists = st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=40)
seeds = st.integers(0, 5)
whole_layouts = st.builds(
    Layout, batch_size=st.integers(1, 4), num_ranks=st.integers(1, 4), num_micro_batches=st.integers(1, 4)
)
dropping_layouts = st.builds(
    Layout,
    batch_size=st.integers(1, 3),
    num_ranks=st.integers(1, 3),
    num_micro_batches=st.integers(1, 4),
    drop_last=st.just(True),
)


def sampler_of(buckets: list[Bucket], layout: Layout, seed: int = 0) -> Sampler:
    return Sampler(buckets, **asdict(layout), seed=seed)


samplers = st.builds(sampler_of, bucket_lists, whole_layouts, seeds)
# Nine clips of one bucket more than the largest batch takes, so that there is something to draw.
dropping_samplers = st.builds(
    sampler_of, bucket_lists.map(lambda buckets: [*buckets, *[A] * 9]), dropping_layouts, seeds
)


def clips_in(steps: Iterable[Step]) -> list[int]:
    return [index for step in steps for micro_batch in step for share in micro_batch for index in share]


def check_form(sampler: Sampler, steps: list[Step]) -> None:
    """Every rank has clips of one bucket in a micro-batch, as many as the others within one; nothing comes twice."""
    assert all(len(step) == sampler.num_micro_batches for step in steps[:-1])
    assert all(1 <= len(step) <= sampler.num_micro_batches for step in steps[-1:])
    not_full: list[Bucket] = []
    for micro_batch in chain.from_iterable(steps):
        assert len(micro_batch) == sampler.num_ranks
        lengths = [len(share) for share in micro_batch]
        assert max(lengths) <= sampler.batch_size
        assert max(lengths) - min(lengths) <= 1 and sum(lengths) > 0
        of = {sampler.buckets[index] for share in micro_batch for index in share}
        assert len(of) == 1
        if sum(lengths) < sampler.batch_size * sampler.num_ranks:
            not_full.extend(of)
    assert len(not_full) == len(set(not_full)), "more than one micro-batch of a bucket is not full"
    assert not (sampler.drop_last and not_full)
    assert len(clips_in(steps)) == len(set(clips_in(steps)))


@quick
@given(samplers, st.integers(0, 9))
def test_every_clip_exactly_once_an_epoch(sampler: Sampler, epoch: int) -> None:
    """Trap: clips in their order, leftovers lost, a wrong length."""
    assert sorted(clips_in(sampler.epoch(epoch))) == list(range(len(sampler.buckets)))


@quick
@given(st.one_of(samplers, dropping_samplers), st.integers(0, 9))
def test_micro_batch_is_of_one_bucket_and_fits(sampler: Sampler, epoch: int) -> None:
    check_form(sampler, sampler.epoch(epoch))


@quick
@given(st.one_of(samplers, dropping_samplers), st.integers(0, 9))
def test_steps_per_epoch_is_exact(sampler: Sampler, epoch: int) -> None:
    assert sampler.steps_per_epoch() == len(sampler.epoch(epoch))


def test_steps_per_epoch_counts_by_hand() -> None:
    # 7 of A in batches of 2×2: 2 micro-batches; 4 of B: 1; 1 of C: 1. Four micro-batches by 3 a step: 2 steps.
    sampler = Sampler([A] * 7 + [B] * 4 + [C], batch_size=2, num_ranks=2, num_micro_batches=3)
    assert sampler.steps_per_epoch() == 2
    assert sampler.clips_per_step == 12
    # Without what does not fill a batch: 1 micro-batch of A and 1 of B.
    assert Sampler([A] * 7 + [B] * 4 + [C], 2, 2, num_micro_batches=3, drop_last=True).steps_per_epoch() == 1
    assert Sampler([A] * 7 + [B] * 4 + [C], 2, 2, num_micro_batches=1, drop_last=True).steps_per_epoch() == 2


@quick
@given(dropping_samplers, st.integers(0, 9))
def test_dropping_leaves_out_what_does_not_fill_a_batch_and_nothing_else(sampler: Sampler, epoch: int) -> None:
    size = sampler.batch_size * sampler.num_ranks
    drawn = Counter(sampler.buckets[index] for index in clips_in(sampler.epoch(epoch)))
    for bucket, count in Counter(sampler.buckets).items():
        assert drawn[bucket] == count - count % size


def test_dropping_leaves_out_other_clips_in_other_epochs() -> None:
    sampler = Sampler([A] * 11 + [B] * 5, 4, drop_last=True)
    left_out = [frozenset(range(16)) - frozenset(clips_in(sampler.epoch(epoch))) for epoch in range(20)]
    assert len(set(left_out)) > 10
    assert frozenset.union(*left_out) == frozenset(range(16))


def test_dropping_everything_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        UserError, match=r"--drop_last.*--train_batch_size 3 × 2 processes.*5 of 9x64x96, 2 of 17x64x96"
    ):
        Sampler([A] * 5 + [B] * 2, 3, 2, drop_last=True)
    assert Sampler([A] * 6 + [B] * 2, 3, 2, drop_last=True).steps_per_epoch() == 1
    assert Sampler([A] * 5 + [B] * 2, 3, 2).steps_per_epoch() == 2


def continue_from(sampler: Sampler, position: Position, number: int) -> list[tuple[Position, Step]]:
    return list(islice(sampler.from_position(position), number))


@fewer
@given(st.one_of(samplers, dropping_samplers))
def test_any_position_continues_the_uninterrupted_order(sampler: Sampler) -> None:
    whole = [(Position(epoch, index), step) for epoch in range(4) for index, step in enumerate(sampler.epoch(epoch))]
    assert continue_from(sampler, Position(), len(whole)) == whole
    for start, (position, _) in enumerate(whole):
        rest = whole[start : start + 5]
        assert continue_from(sampler, position, len(rest)) == rest


@fewer
@given(samplers, st.integers(0, 3))
def test_position_after_an_epochs_last_step_is_the_next_epoch(sampler: Sampler, epoch: int) -> None:
    position = Position(epoch, sampler.steps_per_epoch())
    assert next(sampler.from_position(position)) == (Position(epoch + 1, 0), sampler.epoch(epoch + 1)[0])
    assert sampler.after(Position(epoch, sampler.steps_per_epoch() - 1)) == Position(epoch + 1, 0)


def test_the_epoch_that_ended_is_known_only_between_two() -> None:
    sampler = Sampler([A] * 3, 1)
    ended, position = [], Position()
    for _ in range(7):
        ended.append(position.ended_epoch)
        position = sampler.after(position)
    assert ended == [None, None, None, 0, None, None, 1]
    # In the middle of an epoch under a new layout, none has just ended.
    assert Sampler([A] * 3, 2).take_over(Position(1, 1), Layout(1)).ended_epoch is None


def train_under(
    buckets: list[Bucket], seed: int, course: list[tuple[Layout, int]]
) -> tuple[list[tuple[int, list[int]]], Sampler, Position]:
    """What a training draws that goes through layouts, so many steps each: epoch and clips of each step."""
    drawn: list[tuple[int, list[int]]] = []
    position, before = Position(), course[0][0]
    for layout, num_steps in course:
        sampler = sampler_of(buckets, layout, seed)
        position, before = sampler.take_over(position, before), layout
        for at, step in continue_from(sampler, position, num_steps):
            assert at == position
            check_form(sampler, [step])
            drawn.append((at.epoch, clips_in([step])))
            position = sampler.after(at)
    return drawn, sampler, position


courses = st.lists(st.tuples(whole_layouts, st.integers(0, 6)), min_size=1, max_size=6)


@quick
@given(bucket_lists, seeds, courses)
def test_every_clip_once_an_epoch_whatever_the_layouts_were(
    buckets: list[Bucket], seed: int, course: list[tuple[Layout, int]]
) -> None:
    drawn, sampler, position = train_under(buckets, seed, course)
    rest = sampler.epoch(position.epoch, position.earlier)
    check_form(sampler, rest)
    per_epoch: dict[int, list[int]] = {}
    for epoch, clips in [*drawn, (position.epoch, clips_in(rest[position.step :]))]:
        per_epoch.setdefault(epoch, []).extend(clips)
    assert list(per_epoch) == list(range(position.epoch + 1))
    assert all(sorted(clips) == list(range(len(buckets))) for clips in per_epoch.values())
    # What is left is as many steps as are said to be left, and never none: an epoch that is over is not stood in.
    assert sampler.steps_left(position, position.epoch + 1) == len(rest) - position.step > 0


@quick
@given(
    bucket_lists.map(lambda buckets: [*buckets, *[A] * 9]),
    seeds,
    st.lists(st.tuples(st.one_of(whole_layouts, dropping_layouts), st.integers(0, 6)), min_size=1, max_size=6),
    st.integers(0, 8),
)
def test_number_of_steps_left_is_that_of_the_steps_that_come(
    buckets: list[Bucket], seed: int, course: list[tuple[Layout, int]], num_epochs: int
) -> None:
    drawn, sampler, position = train_under(buckets, seed, course)
    for epoch in {epoch for epoch, _ in drawn}:
        clips = [index for drawn_in, clips in drawn if drawn_in == epoch for index in clips]
        assert len(clips) == len(set(clips))
    steps_left = sampler.steps_left(position, num_epochs)
    coming = [at.epoch for at, _ in continue_from(sampler, position, steps_left + 1)]
    assert all(epoch < num_epochs for epoch in coming[:-1]) and coming[-1] >= num_epochs


def test_what_a_segment_leaves_is_counted_in_each_epoch_anew() -> None:
    sampler, earlier = Sampler([A] * 9 + [B] * 9, 4), ((Layout(1), 6),)
    numbers = [sampler.steps_left(Position(epoch, 0, earlier), epoch + 1) for epoch in range(20)]
    assert numbers == [len(sampler.epoch(epoch, earlier)) for epoch in range(20)]
    assert set(numbers) == {3, 4}  # twelve are left: 4 of one and 8 of the other make 3 batches, 5 and 7 make 4


@fewer
@given(bucket_lists, seeds, courses)
def test_a_position_in_a_cut_epoch_continues_it_exactly(
    buckets: list[Bucket], seed: int, course: list[tuple[Layout, int]]
) -> None:
    _, sampler, position = train_under(buckets, seed, course)
    coming = continue_from(sampler, position, 12)
    again = sampler_of(buckets, course[-1][0], seed)  # with nothing remembered
    for start, (at, _) in enumerate(coming):
        assert continue_from(again, at, 12 - start) == coming[start:]


def test_layouts_by_hand() -> None:
    """Ten clips: two steps of two, then one of three, then back to two; and what JSON has to carry of it."""
    order = clips_in(Sampler([A] * 10, 1).epoch(0))
    by_two, by_three = Sampler([A] * 10, 2), Sampler([A] * 10, 3)
    assert clips_in(by_two.epoch(0)[:2]) == order[:4]
    position = by_three.take_over(Position(0, 2), Layout(2))
    assert position == Position(0, 0, ((Layout(2), 2),))
    assert by_three.epoch(0, position.earlier) == [[[order[4:7]]], [[order[7:]]]]
    position = by_two.take_over(by_three.after(position), Layout(3))
    assert position == Position(0, 0, ((Layout(2), 2), (Layout(3), 1)))
    assert [clips_in([step]) for step in by_two.epoch(0, position.earlier)] == [order[7:9], order[9:]]
    assert by_two.after(by_two.after(position)) == Position(1)


def test_a_layout_that_made_no_step_leaves_no_trace() -> None:
    sampler = Sampler([A] * 10, 2)
    assert sampler.take_over(Position(3, 0), Layout(5)) == Position(3)
    earlier = ((Layout(3), 1),)
    assert sampler.take_over(Position(3, 0, earlier), Layout(5)) == Position(3, 0, earlier)
    assert sampler.take_over(Position(3, 1, earlier), Layout(2)) == Position(3, 1, earlier)


def test_an_epoch_that_a_new_layout_leaves_nothing_of_is_over() -> None:
    dropping = Sampler([A] * 10, 4, drop_last=True)
    assert dropping.take_over(Position(0, 7), Layout(1)) == Position(1)  # three are left, which fill no batch
    assert dropping.take_over(Position(0, 6), Layout(1)) == Position(0, 0, ((Layout(1), 6),))
    # An epoch that ended with clips left out stays ended where the new layout would have drawn them.
    ended = dropping.after(Position(0, 1))
    assert ended == Position(1) == Sampler([A] * 10, 1).take_over(ended, dropping.layout)


def flat(sampler: Sampler, epoch: int) -> list[int]:
    return clips_in(sampler.epoch(epoch))


def test_order_changes_with_epoch_and_seed_and_only_with_them() -> None:
    orders = [flat(Sampler([A] * 40, 2, seed=seed), epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert list(range(40)) not in orders
    again = [flat(Sampler([A] * 40, 2, seed=seed), epoch) for seed in range(4) for epoch in range(4)]
    assert orders == again
    for layout in (Layout(1), Layout(5), Layout(2, 1, 3), Layout(4, drop_last=True)):  # 1 rank: shares are the order
        assert flat(sampler_of([A] * 40, layout, 2), 1) == flat(Sampler([A] * 40, 2, seed=2), 1)


def test_order_is_the_same_in_another_process() -> None:
    program = (
        "from cogvideox_factory.data.buckets import Bucket\n"
        "from cogvideox_factory.data.sampler import Layout, Sampler\n"
        "buckets = [Bucket(9, 64, 96), Bucket(17, 64, 96)] * 10\n"
        "print(Sampler(buckets, 2, 2, 2, seed=7).epoch(3, ((Layout(3), 2),)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{Sampler([A, B] * 10, 2, 2, 2, seed=7).epoch(3, ((Layout(3), 2),))}\n"}

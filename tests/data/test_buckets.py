"""Which bucket a clip gets, held against the properties that training relies on."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.buckets import Bucket, all_buckets, choose_bucket

quick = settings(deadline=None, max_examples=150)

# Few ratios at many scales, so that several buckets often share a ratio.
buckets_strategy = st.lists(
    st.builds(
        lambda frames, ratio, scale: Bucket(frames, ratio[0] * scale, ratio[1] * scale),
        st.sampled_from([9, 17, 25, 33, 49]),
        st.sampled_from([(9, 16), (16, 9), (2, 3), (3, 2), (1, 1), (1, 2)]),
        st.sampled_from([16, 32, 48, 64]),
    ),
    min_size=1,
    max_size=12,
    unique=True,
)
sizes = st.integers(16, 2200)


def distance(bucket: Bucket, height: int, width: int) -> float:
    return abs(math.log((bucket.width * height) / (bucket.height * width)))


def upscales(bucket: Bucket, height: int, width: int) -> bool:
    return bucket.height > height or bucket.width > width


@quick
@given(buckets_strategy, st.integers(0, 60), sizes, sizes)
def test_bucket_takes_the_most_frames_that_the_clip_has(
    buckets: list[Bucket], num_frames: int, height: int, width: int
) -> None:
    chosen = choose_bucket(num_frames, height, width, buckets)
    possible = [bucket.frames for bucket in buckets if bucket.frames <= num_frames]
    if not possible:
        assert chosen is None
    else:
        assert chosen is not None and chosen in buckets
        assert chosen.frames == max(possible)


@quick
@given(buckets_strategy, sizes, sizes)
def test_bucket_has_the_nearest_aspect_ratio(buckets: list[Bucket], height: int, width: int) -> None:
    chosen = choose_bucket(60, height, width, buckets)
    assert chosen is not None
    rivals = [bucket for bucket in buckets if bucket.frames == chosen.frames]
    assert distance(chosen, height, width) <= min(distance(bucket, height, width) for bucket in rivals) + 2e-6


def test_twice_as_wide_is_as_far_as_twice_as_high() -> None:
    # By plain difference of ratios the wide bucket is 1.0 off and the high one 0.4; by logarithms it is the nearer.
    wide, high = Bucket(9, 100, 200), Bucket(9, 250, 100)
    assert choose_bucket(9, 500, 500, [wide, high]) == wide
    assert choose_bucket(9, 500, 500, [high, wide]) == wide


@quick
@given(
    st.lists(st.sampled_from([128, 256, 320, 480, 720, 768]), min_size=2, max_size=4, unique=True),
    sizes,
    sizes,
)
def test_portrait_goes_to_portrait(edges: list[int], height: int, width: int) -> None:
    """Trap: buckets by distance in pixels: a portrait clip lands in a landscape one."""
    chosen = choose_bucket(49, height, width, all_buckets([9, 49], edges, edges))
    assert chosen is not None
    if height > width:
        assert chosen.height >= chosen.width
    if height < width:
        assert chosen.height <= chosen.width


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1920, 1080, (768, 480)), (1080, 1920, (480, 768)), (1080, 1080, (768, 768)), (600, 500, (480, 480))],
)
def test_usual_sizes(height: int, width: int, expected: tuple[int, int]) -> None:
    chosen = choose_bucket(60, height, width, all_buckets([49], [480, 768], [480, 768]))
    assert chosen == Bucket(49, *expected)


@quick
@given(buckets_strategy, sizes, sizes)
def test_nothing_is_upscaled_where_the_same_ratio_exists_without(
    buckets: list[Bucket], height: int, width: int
) -> None:
    chosen = choose_bucket(60, height, width, buckets)
    assert chosen is not None
    same = [b for b in buckets if b.frames == chosen.frames and b.height * chosen.width == chosen.height * b.width]
    without = [b for b in same if not upscales(b, height, width)]
    if without:
        assert chosen == max(without, key=lambda b: b.height)
    else:
        assert chosen == min(same, key=lambda b: b.height)


def test_clip_shorter_than_every_bucket_has_none() -> None:
    assert choose_bucket(8, 480, 720, [Bucket(9, 480, 720)]) is None
    assert choose_bucket(9, 480, 720, [Bucket(9, 480, 720)]) == Bucket(9, 480, 720)
    assert choose_bucket(9, 480, 720, []) is None


def test_all_buckets_combines_everything() -> None:
    buckets = all_buckets([49, 9], [480, 256], [720])
    assert sorted(buckets) == [(9, 256, 720), (9, 480, 720), (49, 256, 720), (49, 480, 720)]
    assert buckets == all_buckets([9, 49], [256, 480], [720])
    assert str(Bucket(49, 480, 720)) == "49x480x720"

"""Excerpts against arithmetic, and what they show against files that plain PyAV decodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import rendered_videos
from av.video.reformatter import Interpolation
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered_videos import number_of

from cogvideox_factory.config import DataOptions
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.clips import Clip
from cogvideox_factory.data.excerpts import (
    Excerpt,
    View,
    choose_views,
    excerpt_starts,
    read_excerpts,
    scaled_size,
)
from cogvideox_factory.data.video import Box, Timeline, VideoError, read_frames

FPS = 8


def numbered(index: int, height: int = 32, width: int = 48) -> np.ndarray:
    return rendered_videos.numbered(index, height, width)


def video_file(path: Path, images: Sequence[np.ndarray], rate: int = FPS, **more: Any) -> Path:
    return rendered_videos.video_file(path, images, rate, **more)


def clip_of(path: Path) -> Clip:
    return Clip(path, path.name, "a caption")


def options(frames: Sequence[int] = (9,), height: int = 32, width: int = 48, **more: Any) -> DataOptions:
    sizes = {"height_buckets": (height,), "width_buckets": (width,)}
    return DataOptions(**{"frame_buckets": tuple(frames), "fps": float(FPS), **sizes, **more})


def numbers_shown(excerpt: Excerpt) -> list[int]:
    """The numbers of the frames that training sees."""
    (view,) = excerpt.views
    seen = excerpt.see(read_frames(excerpt.request), view)
    assert seen.shape == (*excerpt.bucket, 3) and seen.dtype == np.uint8
    return [number_of(image) for image in seen]


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 frames at 8 fps that show their own numbers."""
    return video_file(tmp_path_factory.mktemp("long") / "long.mp4", [numbered(index) for index in range(90)])


# Where excerpts begin

lengths = st.integers(1, 400).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))
counts = st.none() | st.integers(1, 30)


@given(length=lengths, mode=st.sampled_from(["head", "center", "uniform", "slide"]), count=counts, stride=counts)
def test_excerpts_lie_within_the_clip_and_begin_one_after_the_other(
    length: tuple[int, int], mode: Any, count: int | None, stride: int | None
) -> None:
    total, frames = length
    data = options(frame_extraction=mode, num_excerpts=count, excerpt_stride=stride)
    starts = list(excerpt_starts(total, frames, data))
    assert starts and all(isinstance(start, int) for start in starts)
    assert starts == sorted(set(starts))
    assert starts[0] >= 0 and starts[-1] + frames <= total


@given(length=lengths, count=counts, stride=counts)
def test_head_is_the_first_frames_and_center_leaves_as_many_before_as_after(
    length: tuple[int, int], count: int | None, stride: int | None
) -> None:
    total, frames = length
    more: dict[str, Any] = {"num_excerpts": count, "excerpt_stride": stride}  # neither has a say here
    assert list(excerpt_starts(total, frames, options(frame_extraction="head", **more))) == [0]
    (start,) = excerpt_starts(total, frames, options(frame_extraction="center", **more))
    before, after = start, total - (start + frames)
    assert after - before in (0, 1)


@given(length=lengths, count=counts)
def test_uniform_excerpts_are_spread_evenly_from_the_first_frame_to_the_last(
    length: tuple[int, int], count: int | None
) -> None:
    total, frames = length
    starts = list(excerpt_starts(total, frames, options(frame_extraction="uniform", num_excerpts=count)))
    spare, wanted = total - frames, count or 4
    assert len(starts) == min(wanted, spare + 1)  # no two alike
    if wanted == 1:
        assert starts == list(excerpt_starts(total, frames, options(frame_extraction="center")))
        return
    assert (starts[0], starts[-1]) == (0, spare)
    if len(starts) == wanted:
        for index, start in enumerate(starts):
            assert abs(start - Fraction(index * spare, wanted - 1)) <= Fraction(1, 2)


@given(length=lengths, count=counts, stride=counts)
def test_sliding_excerpts_stand_a_stride_apart_as_many_as_fit(
    length: tuple[int, int], count: int | None, stride: int | None
) -> None:
    total, frames = length
    data = options(frame_extraction="slide", num_excerpts=count, excerpt_stride=stride)
    starts = list(excerpt_starts(total, frames, data))
    step = stride or frames  # by default none overlap
    fitting = [start for start in range(total) if start % step == 0 and start + frames <= total]
    assert starts == (fitting if count is None else fitting[:count])


@pytest.mark.parametrize(
    ("flags", "starts"),
    [
        ({}, [0]),
        ({"frame_extraction": "center"}, [40]),
        ({"frame_extraction": "uniform"}, [0, 27, 54, 81]),
        ({"frame_extraction": "uniform", "num_excerpts": 2}, [0, 81]),
        ({"frame_extraction": "slide"}, [0, 9, 18, 27, 36, 45, 54, 63, 72, 81]),
        ({"frame_extraction": "slide", "excerpt_stride": 20, "num_excerpts": 3}, [0, 20, 40]),
    ],
)
def test_the_frames_of_an_excerpt_are_those_of_the_clip_from_its_beginning_on(
    long_clip: Path, flags: dict[str, Any], starts: list[int]
) -> None:
    excerpts = read_excerpts(clip_of(long_clip), options(**flags))
    assert [float(excerpt.times[0]) for excerpt in excerpts] == [start / FPS for start in starts]
    for excerpt, start in list(zip(excerpts, starts, strict=True))[-2:]:
        assert excerpt.clip == clip_of(long_clip) and excerpt.bucket == Bucket(9, 32, 48)
        assert numbers_shown(excerpt) == list(range(start, start + 9))


# The bucket


@pytest.mark.parametrize("frames", [16, 24, 32, 48, 64, 80, *range(1, 90, 8)])
def test_a_long_clip_fills_every_number_of_frames(long_clip: Path, frames: int) -> None:
    """Trap: every (n // frames)-th frame is taken: none of a short clip, and only the beginning of others."""
    (excerpt,) = read_excerpts(clip_of(long_clip), options([frames]))
    assert excerpt.bucket == Bucket(frames, 32, 48)
    assert numbers_shown(excerpt) == list(range(frames))


@settings(deadline=None, max_examples=60)
@given(
    frames=st.lists(st.integers(1, 100), min_size=1, max_size=5),
    skip_start=st.integers(0, 50),
    skip_end=st.integers(0, 50),
    at_most=st.none() | st.integers(1, 100),
)
def test_the_bucket_is_the_largest_number_of_frames_that_the_clip_fills(
    long_clip: Path, frames: list[int], skip_start: int, skip_end: int, at_most: int | None
) -> None:
    skips = {"skip_frames_start": skip_start, "skip_frames_end": skip_end}
    data = options(frames, max_num_frames=at_most, **skips)
    available = max(0, 90 - skip_start - skip_end)
    usable = min(available, at_most or available)
    filled = [number for number in frames if number <= usable]
    if not filled:
        with pytest.raises(VideoError, match=rf"^is too short: {available} frames at 8 fps.* has {min(frames)}$"):
            read_excerpts(clip_of(long_clip), data)
        return
    (excerpt,) = read_excerpts(clip_of(long_clip), data)
    assert excerpt.bucket.frames == max(filled)
    np.testing.assert_allclose(excerpt.times, np.arange(skip_start, skip_start + max(filled)) / FPS, atol=1e-6)


def test_33_frames_go_to_the_bucket_of_16_and_not_to_the_nearer_one_of_49(long_clip: Path) -> None:
    """Trap: the nearest number of frames instead of the largest that is there."""
    data = options([16, 49], skip_frames_end=90 - 33)
    (excerpt,) = read_excerpts(clip_of(long_clip), data)
    assert excerpt.bucket.frames == 16
    (excerpt,) = read_excerpts(clip_of(long_clip), replace(data, skip_frames_end=90 - 49))
    assert excerpt.bucket.frames == 49


def test_no_more_frames_are_used_than_max_num_frames(long_clip: Path) -> None:
    (excerpt,) = read_excerpts(clip_of(long_clip), options([9, 17, 49], max_num_frames=48))
    assert numbers_shown(excerpt) == list(range(17))
    with pytest.raises(VideoError) as caught:
        read_excerpts(clip_of(long_clip), options([17, 49], max_num_frames=16))
    assert str(caught.value) == (
        "is too short: 90 frames at 8 fps, of which --max_num_frames allows 16, the smallest bucket has 17"
    )


def test_skipped_frames_are_never_shown(long_clip: Path) -> None:
    skips = {"skip_frames_start": 5, "skip_frames_end": 68}  # 17 are left
    (excerpt,) = read_excerpts(clip_of(long_clip), options([9, 17, 25], **skips))
    assert numbers_shown(excerpt) == list(range(5, 22))
    excerpts = read_excerpts(clip_of(long_clip), options([9], frame_extraction="slide", excerpt_stride=8, **skips))
    assert [numbers_shown(excerpt) for excerpt in excerpts] == [list(range(5, 14)), list(range(13, 22))]


@pytest.mark.parametrize(("size", "shape"), [((64, 36), (64, 32)), ((36, 64), (32, 64)), ((70, 70), (64, 64))])
def test_portrait_goes_to_portrait_and_landscape_to_landscape(
    tmp_path: Path, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    path = video_file(tmp_path / "clip.mp4", [numbered(index, *size) for index in range(9)])
    (excerpt,) = read_excerpts(clip_of(path), options(height_buckets=(32, 64), width_buckets=(32, 64)))
    assert excerpt.bucket == (9, *shape)


def test_a_clip_that_a_phone_turned_upright_goes_to_portrait(tmp_path: Path) -> None:
    path = video_file(
        tmp_path / "phone.mp4",
        [numbered(index, 36, 64) for index in range(9)],
        change_stream=lambda stream: stream.set_display_rotation(90),
    )
    (excerpt,) = read_excerpts(clip_of(path), options(height_buckets=(32, 64), width_buckets=(32, 64)))
    assert excerpt.bucket == (9, 64, 32)
    assert read_frames(excerpt.request).shape == (9, 64, 32, 3)


# Speed


def test_a_file_of_variable_rate_plays_at_its_true_speed(tmp_path: Path) -> None:
    gaps = [0.01, 0.3, 0.02, 0.02, 0.5, 0.04, 0.1, 0.25, 0.03, 0.4, 0.2, 0.01]
    seconds = [0.0, *np.cumsum(gaps)]
    path = video_file(tmp_path / "variable.mp4", [numbered(index) for index in range(13)], 30, seconds=seconds)
    (excerpt,) = read_excerpts(clip_of(path), options([9, 15, 25]))
    expected = [max(index for index, start in enumerate(seconds) if start <= k / FPS + 1e-3) for k in range(15)]
    assert len(set(expected)) < 13  # some are never seen, others twice
    assert numbers_shown(excerpt) == expected


@pytest.mark.parametrize(("rate", "is_slow"), [(4, True), (5, True), (6, True), (7, True), (8, False), (30, False)])
def test_a_clip_keeps_its_speed_and_says_where_it_is_slower_than_the_training(
    tmp_path: Path, rate: int, is_slow: bool
) -> None:
    """Trap: the rate of a clip is ignored."""
    path = video_file(tmp_path / "clip.mp4", [numbered(index) for index in range(rate * 2)], rate)
    (excerpt,) = read_excerpts(clip_of(path), options([9, 16, 24]))
    assert numbers_shown(excerpt) == [math.floor(k * rate / FPS) for k in range(16)]
    assert excerpt.repeats_frames(FPS) == is_slow


# The size

sizes = st.integers(16, 4320)
bucket_sizes = st.integers(1, 128).map(lambda number: number * 16)


@given(height=sizes, width=sizes, bucket_height=bucket_sizes, bucket_width=bucket_sizes, mode=st.booleans())
def test_the_scaled_picture_just_covers_the_bucket_and_keeps_its_shape(
    height: int, width: int, bucket_height: int, bucket_width: int, mode: bool
) -> None:
    bucket = Bucket(9, bucket_height, bucket_width)
    scaled = scaled_size(height, width, bucket, "random" if mode else "center")
    assert scaled[0] >= bucket_height and scaled[1] >= bucket_width
    assert scaled[0] == bucket_height or scaled[1] == bucket_width, "larger than needed"
    # The side that fits decides by how much; the other is off by the rounding to whole pixels alone.
    scale = max(Fraction(bucket_height, height), Fraction(bucket_width, width))
    assert abs(scaled[0] - height * scale) <= Fraction(501, 1000)
    assert abs(scaled[1] - width * scale) <= Fraction(501, 1000)


@given(height=sizes, width=sizes, bucket_height=bucket_sizes, bucket_width=bucket_sizes)
def test_with_none_the_picture_is_stretched_to_the_bucket(
    height: int, width: int, bucket_height: int, bucket_width: int
) -> None:
    assert scaled_size(height, width, Bucket(9, bucket_height, bucket_width), "none") == (bucket_height, bucket_width)


def excerpt_of(size: tuple[int, int], scaled: tuple[int, int], bucket: Bucket, views: Sequence[View] = ()) -> Excerpt:
    timeline = Timeline(np.arange(9) / FPS, 9 / FPS, *size)
    times = np.arange(bucket.frames) / FPS
    return Excerpt(
        clip_of(Path("a.mp4")), "content", timeline, times, bucket, scaled, tuple(views or [View(0, 0, False)])
    )


@pytest.mark.parametrize(
    ("size", "scaled", "scale", "cropped"),
    [
        ((64, 96), (32, 48), 0.5, 0.0),
        ((64, 192), (32, 96), 0.5, 0.5),
        ((16, 24), (32, 48), 2.0, 0.0),
        ((64, 24), (32, 48), 2.0, 0.0),  # stretched: the width is enlarged
        ((40, 12), (160, 48), 4.0, 0.8),
    ],
)
def test_an_excerpt_says_how_much_it_is_enlarged_and_how_much_is_cut_away(
    size: tuple[int, int], scaled: tuple[int, int], scale: float, cropped: float
) -> None:
    excerpt = excerpt_of(size, scaled, Bucket(9, 32, 48))
    assert (excerpt.scale, excerpt.cropped_share) == (pytest.approx(scale), pytest.approx(cropped))


# The views

shares = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


@given(
    spare_height=st.integers(0, 50),
    spare_width=st.integers(0, 50),
    mode=st.sampled_from(["center", "random", "none"]),
    share=shares,
    count=st.integers(1, 12),
    seed=st.text(),
)
def test_views_lie_inside_the_picture_and_are_the_same_for_the_same_seed(
    spare_height: int, spare_width: int, mode: Any, share: float, count: int, seed: str
) -> None:
    bucket = Bucket(9, 32, 48)
    size = (32, 48) if mode == "none" else (32 + spare_height, 48 + spare_width)
    data = options(video_reshape_mode=mode, random_flip=share, num_variants=count)
    views = choose_views(size, bucket, data, seed)
    assert views == choose_views(size, bucket, data, seed)
    for view in views:
        assert 0 <= view.top <= size[0] - 32 and 0 <= view.left <= size[1] - 48
    has_random_crops = mode == "random" and size != (32, 48)
    assert len(views) == (count if has_random_crops or 0 < share < 1 else 1)
    if not has_random_crops:
        middle = (size[0] - 32) // 2, (size[1] - 48) // 2
        assert {(view.top, view.left) for view in views} == {middle}
    mirrored = sum(view.is_flipped for view in views)
    assert abs(mirrored - len(views) * share) < 1 + 1e-9
    assert mirrored == len(views) * share or 0 < share < 1


def test_random_crops_reach_every_place_equally_often() -> None:
    data = options(video_reshape_mode="random", num_variants=4)
    views = [view for seed in range(2000) for view in choose_views((36, 58), Bucket(9, 32, 48), data, f"clip {seed}")]
    assert len(views) == 8000
    for values, spare in (([view.top for view in views], 4), ([view.left for view in views], 10)):
        share = np.bincount(values, minlength=spare + 1) / len(values)
        assert len(share) == spare + 1
        error = math.sqrt(1 / (spare + 1) / len(values))  # at most, of one place's share
        np.testing.assert_allclose(share, 1 / (spare + 1), atol=4.5 * error)
    together = np.corrcoef([view.top for view in views], [view.left for view in views])[0, 1]
    assert abs(together) < 4 / math.sqrt(len(views))


def test_each_variant_and_each_seed_has_a_crop_of_its_own() -> None:
    data = options(video_reshape_mode="random", num_variants=8)
    drawn = [choose_views((320, 480), Bucket(9, 32, 48), data, f"{seed}") for seed in range(50)]
    assert len(set(drawn)) == 50
    assert all(len(set(views)) >= 7 for views in drawn)


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("mode", ["center", "random"])
def test_over_many_clips_the_share_of_mirrored_views_is_the_one_asked_for(mode: Any, share: float, count: int) -> None:
    data = options(video_reshape_mode=mode, random_flip=share, num_variants=count)
    mirrored = [
        [view.is_flipped for view in choose_views((64, 48), Bucket(9, 32, 48), data, f"clip {seed}")]
        for seed in range(3000)
    ]
    assert all(len(flips) == count for flips in mirrored)
    # Independent clips: the share within a clip varies by less than if its views were independent too.
    assert np.mean(mirrored) == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / 3000))
    assert np.mean(mirrored, axis=0) == pytest.approx([share] * count, abs=4.5 * math.sqrt(share * (1 - share) / 3000))


def test_nothing_is_mirrored_at_0_and_everything_at_1() -> None:
    for seed in range(200):
        for share, expected in ((0.0, {False}), (1.0, {True})):
            data = options(video_reshape_mode="random", random_flip=share, num_variants=5)
            views = choose_views((64, 96), Bucket(9, 32, 48), data, f"{seed}")
            assert {view.is_flipped for view in views} == expected


# Box and see


@given(
    views=st.lists(st.builds(View, st.integers(0, 30), st.integers(0, 40), st.booleans()), min_size=1, max_size=6),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
)
def test_what_is_seen_of_the_box_is_what_would_be_cut_out_of_the_whole_picture(
    views: list[View], height: int, width: int
) -> None:
    whole = np.arange(2 * 50 * 60 * 3, dtype=np.uint32).reshape(2, 50, 60, 3)  # no value twice
    excerpt = excerpt_of((50, 60), (50, 60), Bucket(2, height, width), views)
    box = excerpt.box
    assert excerpt.request.box == box and excerpt.request.shape == (2, box.height, box.width, 3)
    decoded = whole[:, box.top : box.top + box.height, box.left : box.left + box.width]
    assert decoded.shape == excerpt.request.shape
    for view in views:
        expected = whole[:, view.top : view.top + height, view.left : view.left + width]
        np.testing.assert_array_equal(excerpt.see(decoded, view), expected[:, :, ::-1] if view.is_flipped else expected)
    # Nothing is decoded in vain: every side of the box is the side of a view.
    assert box == Box(
        min(view.top for view in views),
        min(view.left for view in views),
        max(view.top for view in views) + height - min(view.top for view in views),
        max(view.left for view in views) + width - min(view.left for view in views),
    )


def plainly_decoded(path: Path, size: tuple[int, int]) -> list[np.ndarray]:
    """All frames scaled to a height and width, by the simplest use of PyAV."""
    with av.open(str(path)) as container:
        return [
            frame.to_ndarray(format="rgb24", height=size[0], width=size[1], interpolation=Interpolation.BICUBIC)
            for frame in container.decode(video=0)
        ]


@pytest.fixture(scope="module")
def busy_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 frames of 80×160 in which no two places look alike."""
    blocks = np.random.default_rng(0).integers(20, 235, (12, 20, 40, 3), dtype=np.uint8)
    images = [image.repeat(4, axis=0).repeat(4, axis=1) for image in blocks]
    return video_file(tmp_path_factory.mktemp("busy") / "busy.mp4", images)


def test_every_view_equals_the_plainly_decoded_clip_scaled_cropped_and_mirrored_as_a_whole(busy_clip: Path) -> None:
    """Trap: a flip drawn for each frame, so that clips flicker."""
    data = options(video_reshape_mode="random", random_flip=0.5, num_variants=8, skip_frames_start=2)
    (excerpt,) = read_excerpts(clip_of(busy_clip), data)
    assert excerpt.scaled_size == (32, 64) and len(excerpt.views) == 8
    assert sum(view.is_flipped for view in excerpt.views) == 4 and len({view.left for view in excerpt.views}) > 3
    whole = plainly_decoded(busy_clip, (32, 64))[2:11]
    frames = read_frames(excerpt.request)
    for view in excerpt.views:
        expected = [image[view.top : view.top + 32, view.left : view.left + 48] for image in whole]
        if view.is_flipped:
            expected = [np.fliplr(image) for image in expected]
        np.testing.assert_array_equal(excerpt.see(frames, view), expected)


def test_without_chance_the_middle_is_seen(busy_clip: Path) -> None:
    (excerpt,) = read_excerpts(clip_of(busy_clip), options(height=48, width=48))
    (view,) = excerpt.views
    expected = [image[:, 24:72] for image in plainly_decoded(busy_clip, (48, 96))[:9]]
    np.testing.assert_array_equal(excerpt.see(read_frames(excerpt.request), view), expected)


def test_what_is_drawn_depends_on_the_content_alone_and_differs_between_excerpts(
    tmp_path: Path, busy_clip: Path, long_clip: Path
) -> None:
    # 32 × 48 out of 80 × 160 pixels, cut to its height: 16 places from left to right.
    data = options(video_reshape_mode="random", num_variants=6, frame_extraction="slide", excerpt_stride=1)
    there = read_excerpts(clip_of(busy_clip), data)
    copy = tmp_path / "another name.mp4"
    copy.write_bytes(busy_clip.read_bytes())
    here = read_excerpts(Clip(copy, "x", "another caption"), data)
    assert [excerpt.views for excerpt in here] == [excerpt.views for excerpt in there]
    assert [excerpt.content for excerpt in here] == [excerpt.content for excerpt in there]
    assert len(there) == 4 and len({excerpt.views for excerpt in there}) == 4
    changed = tmp_path / "changed.mp4"
    changed.write_bytes(busy_clip.read_bytes() + b"\0" * 8)  # another content that shows the same
    other = read_excerpts(clip_of(changed), data)
    assert all(mine.views != theirs.views for mine, theirs in zip(other, there, strict=True))
    assert other[0].content != there[0].content


# Clips that cannot be used


@pytest.mark.parametrize(
    ("source", "caption", "reason"),
    [
        ("long.mp4", "", "has no caption"),
        ("", "a caption", "the data set names no file for it"),
        ("", "", "the data set names no file for it"),
    ],
)
def test_a_clip_without_caption_or_file_is_told_apart(long_clip: Path, source: str, caption: str, reason: str) -> None:
    with pytest.raises(VideoError) as caught:
        read_excerpts(Clip(long_clip.parent / source, source, caption), options())
    assert str(caught.value) == reason


def test_a_missing_file_is_a_video_error(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"^no such file$"):
        read_excerpts(clip_of(tmp_path / "missing.mp4"), options())


def test_a_clip_that_is_too_short_says_by_how_much(long_clip: Path) -> None:
    with pytest.raises(VideoError, match=r"^is too short: 90 frames at 8 fps, the smallest bucket has 97$"):
        read_excerpts(clip_of(long_clip), options([97, 105]))
    with pytest.raises(VideoError, match=r"^is too short: 0 frames at 8 fps, the smallest bucket has 9$"):
        read_excerpts(clip_of(long_clip), options(skip_frames_start=100))

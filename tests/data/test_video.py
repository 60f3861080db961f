"""Frames out of files whose every frame shows its own number, against a plain decoding and against arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered_videos import LOSSLESS_H264, number_of, numbered, video_file

from cogvideox_factory.config import DataOptions
from cogvideox_factory.data import video
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.excerpts import choose_views, scaled_size
from cogvideox_factory.data.video import (
    Box,
    FrameRequest,
    Timeline,
    VideoError,
    read_frames,
    read_timeline,
    write_video,
)

HEIGHT, WIDTH = 48, 64
# What `video_file` can write: name → ending, codec, options of the codec.
FORMATS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264 in mp4": ("mp4", "libx264", LOSSLESS_H264),
    "h264 with B-frames in mp4": ("mp4", "libx264", {"crf": "10", "bf": "3"}),
    "ffv1 in mkv, stamps in milliseconds": ("mkv", "ffv1", {}),
    "mpeg4 in avi, no stamps": ("avi", "mpeg4", {"qscale": "1"}),
    "h264 in a transport stream": ("ts", "libx264", {"crf": "10", "bf": "3"}),
    "vp9 in webm": ("webm", "libvpx-vp9", {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8"}),
}


def numbered_file(folder: Path, count: int, rate: Fraction | int = 30, name: str = "h264 in mp4", **more: Any) -> Path:
    ending, codec, options = FORMATS[name]
    return video_file(folder / f"numbered.{ending}", [numbered(n) for n in range(count)], rate, codec, options, **more)


def request_for(
    path: Path,
    timeline: Timeline,
    times: Sequence[float] | np.ndarray,
    height: int = HEIGHT,
    width: int = WIDTH,
    reshape_mode: Any = "center",
) -> FrameRequest:
    """What is asked for where a clip of this timeline goes to a bucket of this size."""
    bucket = Bucket(len(times), height, width)
    size = scaled_size(timeline.height, timeline.width, bucket, reshape_mode)
    (view,) = choose_views(size, bucket, DataOptions(video_reshape_mode=reshape_mode), seed="")
    return FrameRequest(path, timeline, np.asarray(times), *size, Box(view.top, view.left, height, width))


def numbers_at(path: Path, times: Sequence[float] | np.ndarray) -> list[int]:
    frames = read_frames(request_for(path, read_timeline(path), times))
    assert frames.shape == (len(times), HEIGHT, WIDTH, 3) and frames.dtype == np.uint8
    return [number_of(frame) for frame in frames]


def numbers_at_rate(path: Path, fps: float, **skips: int) -> list[int]:
    return numbers_at(path, read_timeline(path).sample_times(fps, **skips))


def plainly_decoded(path: Path) -> list[tuple[float, int]]:
    """Time and number of every frame, by the simplest use of PyAV."""
    with av.open(str(path)) as container:
        frames = [(frame.time, number_of(frame.to_ndarray(format="rgb24"))) for frame in container.decode(video=0)]
    assert all(time is not None for time, _ in frames)
    return [(float(time or 0) - float(frames[0][0] or 0), number) for time, number in frames]


def on_screen(frames: Sequence[tuple[float, int]], time: float, tolerance: float = 1e-3) -> int:
    return [number for start, number in frames if start <= time + tolerance][-1]


# Which frames are taken


@pytest.mark.parametrize("name", FORMATS)
def test_at_8_fps_the_frames_are_those_on_screen_every_eighth_of_a_second(tmp_path: Path, name: str) -> None:
    path = numbered_file(tmp_path, 60, name=name)
    expected = [math.floor(k * 30 / 8) for k in range(16)]
    assert [on_screen(plainly_decoded(path), k / 8) for k in range(16)] == expected
    assert numbers_at_rate(path, 8) == expected


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("first", [0, 30, 100, 190])
def test_late_frames_are_those_of_decoding_from_the_start(tmp_path: Path, name: str, first: int) -> None:
    codec_options = {"g": "24", "sc_threshold": "0"}  # a key frame a second, so that there is where to jump to
    ending, codec, options = FORMATS[name]
    images = [numbered(index) for index in range(240)]
    path = video_file(tmp_path / f"long.{ending}", images, 24, codec, {**options, **codec_options})
    plain = plainly_decoded(path)
    assert [number for _, number in plain] == list(range(240))
    times = np.array([plain[index][0] + 0.001 for index in range(first, 240, 6)])
    assert numbers_at(path, times) == list(range(first, 240, 6))


def test_a_late_excerpt_of_a_long_file_does_not_decode_what_comes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [numbered(index) for index in range(240)]
    path = video_file(tmp_path / "long.mp4", images, 24, options={**LOSSLESS_H264, "g": "24", "sc_threshold": "0"})
    timeline, decoded = read_timeline(path), []
    stamped = video._stamped

    def count(*arguments: Any) -> Any:
        for time, frame in stamped(*arguments):
            decoded.append(time)
            yield time, frame

    monkeypatch.setattr(video, "_stamped", count)
    times = np.array([8.5, 8.75])
    read_frames(FrameRequest(path, timeline, times, HEIGHT, WIDTH, Box(0, 0, HEIGHT, WIDTH)))
    assert 7 < decoded[0] <= 8.5 and len(decoded) < 48


def test_where_a_jump_leads_too_far_all_is_decoded() -> None:
    class Container:
        """Stands in for a file whose index is wrong, which no encoder writes."""

        format = SimpleNamespace(name="matroska,webm")
        begins = 0.0

        def seek(self, offset: int, stream: Any = None) -> None:
            self.begins = 5.0 if stream else 0.0

        def decode(self, stream: Any) -> Any:
            yield from (SimpleNamespace(time=time) for time in np.arange(self.begins, 8.0))

    container: Any = Container()
    stream: Any = SimpleNamespace(time_base=Fraction(1, 1000))
    timeline = Timeline(np.arange(8.0), 8.0, HEIGHT, WIDTH, origin=0.0)
    assert [time for time, _ in video._decode(container, stream, timeline, 6.0)] == [5.0, 6.0, 7.0]
    assert [time for time, _ in video._decode(container, stream, timeline, 4.0)] == list(range(8))


def test_files_joined_as_they_are_are_refused_instead_of_read_to_the_first_ones_end(tmp_path: Path) -> None:
    path = numbered_file(tmp_path, 30, name="h264 in a transport stream")
    assert len(read_timeline(path).times) == 30
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(VideoError, match="begin again"):
        read_timeline(path)


def test_frames_of_h264_with_b_frames_in_avi_are_not_taken_out_of_order(tmp_path: Path) -> None:
    # An AVI has no presentation times, and those that FFmpeg guesses go backwards.
    images = [numbered(index) for index in range(60)]
    path = video_file(tmp_path / "b.avi", images, 30, "libx264", {"crf": "10", "bf": "3"})
    assert numbers_at_rate(path, 8) == [math.floor(k * 30 / 8) for k in range(16)]


@pytest.mark.parametrize("rate", [Fraction(60), Fraction(30000, 1001), Fraction(24), Fraction(12), Fraction(8)])
def test_a_clip_keeps_its_speed_whatever_its_own_rate(tmp_path: Path, rate: Fraction) -> None:
    count = math.ceil(2 * rate)
    path = numbered_file(tmp_path, count, rate)
    numbers = numbers_at_rate(path, 8)
    decoded = plainly_decoded(path)
    # A frame that comes up to 2 ms late may count as on time: at 30000/1001 fps, frame 15 is due at 0.5005 s.
    exactly = [math.floor(Fraction(k, 8) * rate) for k in range(16)]
    late = [math.floor((Fraction(k, 8) + Fraction(2, 1000)) * rate) for k in range(16)]
    assert len(numbers) == 16
    assert all(number in pair for number, pair in zip(numbers, zip(exactly, late, strict=True), strict=True))
    assert exactly == [on_screen(decoded, k / 8, tolerance=1e-6) for k in range(16)]


def test_a_slower_clip_shows_its_frames_more_than_once(tmp_path: Path) -> None:
    path = numbered_file(tmp_path, 10, rate=5)
    assert numbers_at_rate(path, 8) == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 7, 8, 8, 9]


@pytest.mark.parametrize("rate", [15, 24, 30, Fraction(30000, 1001)])
def test_stamps_rounded_to_milliseconds_lose_or_double_no_frame_at_the_clips_own_rate(
    tmp_path: Path, rate: Fraction | int
) -> None:
    path = numbered_file(tmp_path, 45, rate, "ffv1 in mkv, stamps in milliseconds")
    assert numbers_at_rate(path, float(rate)) == list(range(45))


def test_the_time_stamps_decide_where_the_rate_varies(tmp_path: Path) -> None:
    gaps = [0.01, 0.3, 0.02, 0.02, 0.5, 0.04, 0.1, 0.25, 0.03, 0.4, 0.2, 0.01]
    seconds = np.concatenate([[0.0], np.cumsum(gaps)])
    path = numbered_file(tmp_path, len(seconds), seconds=[float(second) for second in seconds])
    timeline = read_timeline(path)
    np.testing.assert_allclose(timeline.times, seconds, atol=1e-3)
    assert timeline.end == pytest.approx(seconds[-1] + np.median(gaps), abs=2e-3)
    expected = [int(np.flatnonzero(seconds <= k / 8 + 1e-3)[-1]) for k in range(int(timeline.end * 8 + 0.01))]
    assert len(set(expected)) < len(expected) < len(seconds) + 10  # some are held, some never seen
    assert numbers_at_rate(path, 8) == expected


def test_the_last_frame_stays_on_screen_until_the_end(tmp_path: Path) -> None:
    path = numbered_file(tmp_path, 4, rate=2)
    assert numbers_at_rate(path, 8) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_any_times_can_be_asked_for(tmp_path: Path) -> None:
    path = numbered_file(tmp_path, 30)
    assert numbers_at(path, [0.4, 0.4, 0.41, 0.6, 0.99]) == [12, 12, 12, 18, 29]


def test_skipped_frames_of_the_source_are_never_shown(tmp_path: Path) -> None:
    path = numbered_file(tmp_path, 40)
    assert numbers_at_rate(path, 30, skip_start=5, skip_end=3) == list(range(5, 37))
    assert numbers_at_rate(path, 10, skip_start=4, skip_end=6) == list(range(4, 34, 3))


def test_times_count_from_the_first_frame_where_a_file_starts_late(tmp_path: Path) -> None:
    seconds = [5 + index / 30 for index in range(30)]
    path = numbered_file(tmp_path, 30, seconds=seconds)
    timeline = read_timeline(path)
    assert timeline.times[0] == 0 and timeline.end == pytest.approx(1, abs=2e-3)
    assert numbers_at_rate(path, 8) == [math.floor(k * 30 / 8) for k in range(8)]


def test_frames_that_an_edit_list_hides_belong_neither_to_the_timeline_nor_to_the_clip(tmp_path: Path) -> None:
    # What `ffmpeg -ss 0.4 -c copy` writes: the frames before the cut are stored, because others depend on them.
    source = numbered_file(tmp_path, 50)
    with av.open(str(source)) as old, av.open(str(tmp_path / "cut.mp4"), "w") as new:
        old_stream: Any = old.streams.video[0]
        new_stream = new.add_stream_from_template(old_stream)
        for packet in old.demux(old_stream):
            if packet.dts is not None and packet.pts is not None:
                shift = round(Fraction(12, 30) / old_stream.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, new_stream
                new.mux(packet)
    decoded = plainly_decoded(tmp_path / "cut.mp4")
    assert [number for _, number in decoded] == list(range(12, 50))
    timeline = read_timeline(tmp_path / "cut.mp4")
    np.testing.assert_allclose(timeline.times, [time for time, _ in decoded], atol=1e-6)
    assert numbers_at_rate(tmp_path / "cut.mp4", 8) == [12 + math.floor(k * 30 / 8) for k in range(10)]


@pytest.mark.parametrize("name", FORMATS)
def test_the_timeline_knows_when_every_frame_is_shown(tmp_path: Path, name: str) -> None:
    path = numbered_file(tmp_path, 33, rate=25, name=name)
    timeline = read_timeline(path)
    np.testing.assert_allclose(timeline.times, np.arange(33) / 25, atol=1e-3)
    assert timeline.end == pytest.approx(33 / 25, abs=2e-3)
    assert (timeline.height, timeline.width) == (HEIGHT, WIDTH)


# Times to sample at


def even_timeline(count: int, rate: Fraction, ticks: int = 10**12) -> Timeline:
    """Frames of equal spacing, with stamps rounded to ticks of the clock as a container rounds them (half upwards)."""
    times = np.array([math.floor(index / rate * ticks + Fraction(1, 2)) / ticks for index in range(count)])
    spacing = float(np.median(np.diff(times))) if count > 1 else float(1 / rate)
    return Timeline(times, float(times[-1]) + spacing, HEIGHT, WIDTH)


rates = st.sampled_from(
    [Fraction(n) for n in (5, 8, 10, 12, 15, 16, 24, 25, 30, 50, 60)]
    + [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001)]
)


@settings(deadline=None)
@given(count=st.integers(1, 300), rate=rates, fps=rates, skip_start=st.integers(0, 40), skip_end=st.integers(0, 40))
def test_sample_times_are_evenly_spaced_and_within_the_frames_that_are_left(
    count: int, rate: Fraction, fps: Fraction, skip_start: int, skip_end: int
) -> None:
    times = even_timeline(count, rate).sample_times(float(fps), skip_start, skip_end)
    left = count - skip_start - skip_end
    if left <= 0:
        assert len(times) == 0
        return
    start, end = float(skip_start / rate), float((count - skip_end) / rate)
    np.testing.assert_allclose(times, start + np.arange(len(times)) / float(fps), atol=1e-9)
    assert times[-1] < end
    assert times[-1] + 2 / float(fps) > end - 1e-9  # no further frame would have found room
    seconds = Fraction(left) / rate
    if (seconds * fps).denominator == 1:
        assert len(times) == seconds * fps


@settings(deadline=None)
@given(count=st.integers(1, 300), rate=rates)
def test_stamps_rounded_to_milliseconds_do_not_change_the_number_of_frames(count: int, rate: Fraction) -> None:
    assert len(even_timeline(count, rate, ticks=1000).sample_times(float(rate))) == count


def test_a_clip_shorter_than_one_frame_at_the_rate_still_gives_one() -> None:
    np.testing.assert_array_equal(even_timeline(3, Fraction(30)).sample_times(8), [0.0])


def test_skips_count_frames_of_the_source_not_time() -> None:
    timeline = Timeline(np.array([0, 0.5, 0.6, 0.7, 1.5]), 2.0, HEIGHT, WIDTH)
    np.testing.assert_allclose(timeline.sample_times(10, skip_start=1, skip_end=2), [0.5, 0.6])
    assert len(timeline.sample_times(10, skip_start=3, skip_end=2)) == 0
    assert len(timeline.sample_times(10, skip_start=9)) == 0


# The picture


def one_picture(path: Path, bucket: Bucket, reshape_mode: str) -> np.ndarray:
    """The first frame at the size of a bucket."""
    return read_frames(request_for(path, read_timeline(path), [0.0], bucket.height, bucket.width, reshape_mode))[0]


def disc(height: int, width: int, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    inside = np.hypot(rows - (height - 1) / 2, columns - (width - 1) / 2) <= radius
    return np.repeat(np.where(inside, 230, 20).astype(np.uint8)[..., None], 3, axis=2)


def extent(image: np.ndarray) -> tuple[float, float]:
    """Height and width in pixels of the bright disc, along its middle column and row."""
    coverage = (image.astype(float).mean(axis=2) - 20) / 210
    middle_row, middle_column = image.shape[0] // 2, image.shape[1] // 2
    height = coverage[:, middle_column - 1 : middle_column + 1].mean(axis=1).sum()
    return float(height), float(coverage[middle_row - 1 : middle_row + 1].mean(axis=0).sum())


@pytest.mark.parametrize(
    ("size", "bucket", "radius"),
    [
        ((96, 192), Bucket(1, 64, 64), 40),  # wide to square, smaller
        ((192, 96), Bucket(1, 64, 64), 40),
        ((96, 192), Bucket(1, 96, 64), 26),  # landscape to portrait
        ((48, 64), Bucket(1, 128, 96), 16),  # larger
        ((90, 160), Bucket(1, 80, 112), 30),  # sizes that do not divide
        ((102, 78), Bucket(1, 32, 48), 20),
    ],
)
def test_a_circle_stays_round_and_in_the_middle_when_it_is_cropped(
    tmp_path: Path, size: tuple[int, int], bucket: Bucket, radius: float
) -> None:
    path = video_file(tmp_path / "disc.mp4", [disc(*size, radius)])
    image = one_picture(path, bucket, "center")
    assert image.shape == (bucket.height, bucket.width, 3)
    scale = max(bucket.height / size[0], bucket.width / size[1])
    assert extent(image) == pytest.approx((2 * radius * scale, 2 * radius * scale), abs=2)
    coverage = image.astype(float).mean(axis=2) - 20
    rows, columns = np.mgrid[: bucket.height, : bucket.width]
    centre = (coverage * rows).sum() / coverage.sum(), (coverage * columns).sum() / coverage.sum()
    assert centre == pytest.approx(((bucket.height - 1) / 2, (bucket.width - 1) / 2), abs=1)


def test_without_reshaping_the_whole_picture_is_stretched(tmp_path: Path) -> None:
    path = video_file(tmp_path / "disc.mp4", [disc(96, 192, 40)])
    image = one_picture(path, Bucket(1, 64, 64), "none")
    assert image.shape == (64, 64, 3)
    assert extent(image) == pytest.approx((80 * 64 / 96, 80 * 64 / 192), abs=2)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_crop_at_full_size_is_the_middle_pixel_for_pixel(tmp_path: Path, axis: int) -> None:
    ramp = np.linspace(20, 230, 96 if axis == 0 else 128)
    image = np.broadcast_to(ramp[:, None] if axis == 0 else ramp[None], (96, 128)).round().astype(np.uint8)
    path = video_file(tmp_path / "ramp.mp4", [np.repeat(image[..., None], 3, axis=2)])
    bucket = Bucket(1, 48, 128) if axis == 0 else Bucket(1, 96, 64)
    middle = image[24:72] if axis == 0 else image[:, 32:96]
    cropped = one_picture(path, bucket, "center").astype(float)
    np.testing.assert_allclose(cropped, np.repeat(middle[..., None], 3, axis=2), atol=2)


def test_fine_detail_averages_out_when_a_picture_shrinks(tmp_path: Path) -> None:
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 240
    path = video_file(tmp_path / "stripes.mp4", [stripes])
    np.testing.assert_allclose(one_picture(path, Bucket(1, 32, 32), "center")[4:-4, 4:-4], 120, atol=8)


@pytest.mark.parametrize("colorspace", ["bt601", "bt709"])
@pytest.mark.parametrize("colour", [(200, 40, 40), (40, 200, 40), (40, 60, 210)])
def test_colours_come_out_in_the_order_red_green_blue_by_the_files_own_matrix(
    tmp_path: Path, colorspace: str, colour: tuple[int, int, int]
) -> None:
    number = {"bt601": 5, "bt709": 1}[colorspace]
    with av.open(str(tmp_path / "colour.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8, options=LOSSLESS_H264)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = number, 1
        # Y, Cb, Cr of the standard, for limited range.
        k_red, k_blue = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[colorspace]
        red, green, blue = (value / 255 for value in colour)
        luma = k_red * red + (1 - k_red - k_blue) * green + k_blue * blue
        planes = (16 + 219 * luma, 128 + 112 * (blue - luma) / (1 - k_blue), 128 + 112 * (red - luma) / (1 - k_red))
        pixels = np.broadcast_to(np.array(planes).round().astype(np.uint8)[:, None, None], (3, HEIGHT, WIDTH))
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="yuv444p")))
        container.mux(stream.encode())
    image = one_picture(tmp_path / "colour.mp4", Bucket(1, HEIGHT, WIDTH), "center")
    np.testing.assert_allclose(image, np.broadcast_to(np.array(colour), image.shape), atol=4)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_clip_that_a_phone_marked_as_turned_is_turned_upright(tmp_path: Path, degrees: int) -> None:
    # One bright corner: top left as stored. np.rot90 turns counterclockwise, as FFmpeg's angle counts.
    stored = np.full((48, 80, 3), 20, dtype=np.uint8)
    stored[:16, :16] = 230
    path = video_file(
        tmp_path / "phone.mp4", [stored], change_stream=lambda stream: stream.set_display_rotation(degrees)
    )
    with av.open(str(path)) as container:
        rotation = next(container.decode(video=0)).rotation
    assert rotation % 360 == degrees % 360
    shown = np.rot90(stored, rotation // 90)
    timeline = read_timeline(path)
    assert (timeline.height, timeline.width) == shown.shape[:2]
    image = one_picture(path, Bucket(1, *shown.shape[:2]), "center").astype(float)
    assert np.abs(image - shown).mean() < 6


def test_a_circle_stays_round_where_the_files_pixels_are_not_square(tmp_path: Path) -> None:
    stored = disc(96, 192, 40)[:, ::2]  # 96 × 96 pixels that are twice as wide as high

    def anamorphic(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = video_file(tmp_path / "wide.mp4", [stored], change_stream=anamorphic)
    timeline = read_timeline(path)
    assert timeline.width / timeline.height == pytest.approx(2)
    assert extent(one_picture(path, Bucket(1, 96, 96), "center")) == pytest.approx((80, 80), abs=3)


def test_an_angle_between_quarter_turns_counts_as_the_nearest(tmp_path: Path) -> None:
    stored = np.full((48, 80, 3), 20, dtype=np.uint8)
    stored[:16, :16] = 230
    for degrees, turns in ((40, 0), (100, 1), (-95, -1), (170, 2)):

        def turn(stream: Any, degrees: int = degrees) -> None:
            stream.set_display_rotation(degrees)

        path = video_file(tmp_path / "askew.mp4", [stored], change_stream=turn)
        with av.open(str(path)) as container:
            assert abs(abs(next(container.decode(video=0)).rotation) - abs(degrees)) <= 1
        shown = np.rot90(stored, turns)
        image = one_picture(path, Bucket(1, *shown.shape[:2]), "center").astype(float)
        assert np.abs(image - shown).mean() < 6


@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 48, 64), (3, 5, 20, 30), (47, 63, 1, 1)])
@pytest.mark.parametrize("degrees", [0, 90])
def test_a_box_is_cut_out_of_the_scaled_picture_as_it_is_shown(
    tmp_path: Path, top: int, left: int, height: int, width: int, degrees: int
) -> None:
    rows, columns = np.mgrid[:48, :64]
    shown = np.stack([rows * 4 + 20, columns * 3 + 20, np.full((48, 64), 90)], axis=-1).astype(np.uint8)
    path = video_file(
        tmp_path / "ramps.mp4",
        [np.ascontiguousarray(np.rot90(shown, -degrees // 90))],
        change_stream=lambda stream: stream.set_display_rotation(degrees),
    )
    timeline = read_timeline(path)
    request = FrameRequest(path, timeline, np.zeros(1), 48, 64, Box(top, left, height, width))
    assert request.shape == (1, height, width, 3)
    cut = read_frames(request)
    assert cut.shape == request.shape
    np.testing.assert_allclose(cut[0].astype(float), shown[top : top + height, left : left + width], atol=6)


# Pictures that change within a file


def joined(folder: Path, ending: str, first: tuple[int, int], second: tuple[int, int]) -> Path:
    """A file whose picture has one height and width in its first 20 frames and another in the 20 that follow."""
    contents = []
    for start, size in ((0, first), (20, second)):
        images = [numbered(index, *size) for index in range(start, start + 20)]
        seconds = [index / 25 for index in range(start, start + 20)]
        part = video_file(folder / f"part.{ending}", images, 25, options={"crf": "10", "bf": "0"}, seconds=seconds)
        contents.append(part.read_bytes())
    (folder / f"joined.{ending}").write_bytes(b"".join(contents))
    return folder / f"joined.{ending}"


@pytest.mark.parametrize("ending", ["ts", "h264"])
def test_a_file_whose_picture_changes_its_shape_midway_cannot_be_used(tmp_path: Path, ending: str) -> None:
    path = joined(tmp_path, ending, (48, 64), (64, 48))
    assert reason(path) == "changes its picture from 64x48 to 48x64 midway"
    assert numbers_at(path, [0, 0.2, 0.5]) == [0, 5, 12]  # as long as it has not


@pytest.mark.parametrize("ending", ["ts", "h264"])
def test_a_picture_that_only_changes_its_size_midway_is_shown_at_one_size(tmp_path: Path, ending: str) -> None:
    path = joined(tmp_path, ending, (48, 64), (96, 128))
    timeline = read_timeline(path)
    assert (timeline.height, timeline.width, len(timeline.times)) == (48, 64, 40)
    assert numbers_at_rate(path, 25) == list(range(40))


# Files that cannot be used


def reason(path: Path) -> str:
    """Why a file cannot be used, as found when it is read from the first to the last step."""
    with pytest.raises(VideoError) as caught:
        timeline = read_timeline(path)
        read_frames(request_for(path, timeline, timeline.sample_times(8)))
    return str(caught.value)


def test_a_missing_file_and_a_folder_are_no_files(tmp_path: Path) -> None:
    assert reason(tmp_path / "missing.mp4") == "no such file"
    assert reason(tmp_path) == "no such file"


@pytest.mark.parametrize("content", [b"", b"This is no video.\n" * 100, bytes(5000)])
def test_a_file_that_is_no_video_cannot_be_read_as_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fake.mp4").write_bytes(content)
    assert reason(tmp_path / "fake.mp4").startswith("cannot be read as a video (")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_an_mp4_cut_off_before_its_table_of_contents_cannot_be_read(tmp_path: Path, share: float) -> None:
    path = numbered_file(tmp_path, 50)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert reason(path).startswith("cannot be read as a video (")


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
def test_an_mp4_cut_off_after_its_table_of_contents_is_not_taken_for_a_shorter_clip(
    tmp_path: Path, share: float
) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(50)]
    path = video_file(tmp_path / "cut.mp4", noise, container_options={"movflags": "+faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert reason(path)


def test_a_file_damaged_within_says_so(tmp_path: Path) -> None:
    path = numbered_file(tmp_path, 60, name="h264 with B-frames in mp4")
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start : start + length] = np.random.default_rng(0).bytes(length)
    path.write_bytes(content)
    assert reason(path).startswith("is damaged (")


def test_damage_behind_the_last_frame_that_is_needed_does_no_harm(tmp_path: Path) -> None:
    path = numbered_file(tmp_path, 200, container_options={"movflags": "+faststart"})
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = np.random.default_rng(0).bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    assert reason(path).startswith("is damaged (")  # the whole of it cannot be had
    assert numbers_at(path, np.arange(9) / 8) == [math.floor(k * 30 / 8) for k in range(9)]


def test_a_file_with_sound_only_has_no_picture(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    assert reason(tmp_path / "sound.mp4") == "has no picture"


def test_a_codec_that_is_not_known_here_is_a_video_error(tmp_path: Path) -> None:
    path = numbered_file(tmp_path, 10)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))
    assert reason(path)


def test_a_video_without_a_single_frame_holds_none(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "none.mp4"), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        container.mux(stream.encode())
    assert reason(tmp_path / "none.mp4")


def test_a_video_whose_frames_are_all_hidden_is_a_video_error(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "hidden.webm"), "w") as container:
        stream: Any = container.add_stream("libvpx", rate=8, options={"lag-in-frames": "0"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for index in range(20):
            for packet in stream.encode(av.VideoFrame.from_ndarray(numbered(index), format="rgb24")):
                content = bytearray(bytes(packet))
                assert content[0] & 0x10, "VP8 marks a frame that is shown by this bit"
                content[0] &= ~0x10
                hidden = av.Packet(bytes(content))
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.stream, hidden.is_keyframe = stream, packet.is_keyframe
                container.mux(hidden)
    assert reason(tmp_path / "hidden.webm") == "no frame could be decoded"


def test_a_time_stamp_that_is_decades_late_is_a_video_error(tmp_path: Path) -> None:
    images = [numbered(index) for index in range(10)]
    seconds = [index / 8 for index in range(9)]
    path = video_file(tmp_path / "late.mkv", images, codec="ffv1", options={}, seconds=[*seconds, 2.0**31])
    assert reason(path) == f"has a broken time stamp, {2**31} seconds after the first"
    path = video_file(tmp_path / "long.mkv", images, codec="ffv1", options={}, seconds=[*seconds, 24 * 3600.0])
    assert numbers_at(path, [0.5, 1, 20000, 24 * 3600]) == [4, 8, 8, 9]


@pytest.mark.parametrize(("ending", "codec"), [("mp4", "libx264"), ("avi", "mpeg4"), ("mkv", "ffv1")])
def test_a_title_in_an_old_encoding_does_no_harm(tmp_path: Path, ending: str, codec: str) -> None:
    path = tmp_path / f"title.{ending}"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "A title: XXXX"
        stream: Any = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for index in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(index), format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert content.count(b"XXXX") == 1
    path.write_bytes(content.replace(b"XXXX", "äöüß".encode("latin-1")))
    assert numbers_at_rate(path, 8) == list(range(20))


def test_a_stream_without_a_container_is_read_from_its_start(tmp_path: Path) -> None:
    images = [numbered(index) for index in range(30)]
    path = video_file(tmp_path / "raw.h264", images, 25, options={"crf": "10", "bf": "3"})
    timeline = read_timeline(path)
    np.testing.assert_allclose(timeline.times, np.arange(30) / 25)
    assert (timeline.height, timeline.width) == (HEIGHT, WIDTH)
    assert numbers_at_rate(path, 25) == list(range(30))


def test_a_file_that_breaks_off_before_its_timeline_says_where(tmp_path: Path) -> None:
    timeline = read_timeline(numbered_file(tmp_path, 60))
    shorter = numbered_file(tmp_path, 30)  # the file was replaced in between
    with pytest.raises(VideoError, match=r"breaks off after 0\.97 of 2\.00 seconds"):
        read_frames(request_for(shorter, timeline, timeline.sample_times(8)))


def test_a_clip_of_one_frame_gives_that_frame_once(tmp_path: Path) -> None:
    path = video_file(tmp_path / "one.mp4", [numbered(7)])
    timeline = read_timeline(path)
    assert len(timeline.times) == 1 and timeline.end > 0
    assert numbers_at_rate(path, 8) == [7]


# Writing


def soft_scene(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    phases = np.arange(count)[:, None, None] / 5
    return np.stack(
        [127 + 90 * np.sin(columns / 14 + phases), 127 + 90 * np.cos(rows / 11 - phases), 60 + 0 * rows + 0 * phases],
        axis=-1,
    ).astype(np.uint8)


@pytest.mark.parametrize("fps", [8, 16, 29.97, Fraction(24000, 1001)])
def test_what_is_written_plays_everywhere_and_comes_back_nearly_the_same(tmp_path: Path, fps: float) -> None:
    frames = soft_scene(13)
    path = tmp_path / "new" / "folder" / "scene.mp4"
    write_video(path, frames, fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate or 0) == pytest.approx(float(fps), rel=1e-4)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(float) - frames).mean() < 4
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")  # a browser starts before it has the whole file
    assert [entry.name for entry in path.parent.iterdir()] == ["scene.mp4"]


def test_what_is_written_is_read_back_by_our_own_reader(tmp_path: Path) -> None:
    frames = soft_scene(13)
    write_video(tmp_path / "scene.mp4", frames, 8)
    timeline = read_timeline(tmp_path / "scene.mp4")
    times = timeline.sample_times(8)
    assert len(times) == 13
    back = read_frames(request_for(tmp_path / "scene.mp4", timeline, times, 64, 96))
    assert np.abs(back.astype(float) - frames).mean() < 4


@pytest.mark.parametrize("failure", ["frames that H.264 refuses", "a disk that fails at the end"])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scene.mp4"
    path.write_bytes(b"an earlier video")
    frames = soft_scene(5)
    if failure == "frames that H.264 refuses":
        frames = frames[:, :-1]  # an odd height

    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises((OSError, av.FFmpegError, ValueError)), monkeypatch.context() as patch:
        if failure != "frames that H.264 refuses":
            patch.setattr("cogvideox_factory.data.video.os.replace", full_disk)
        write_video(path, frames, 8)
    assert path.read_bytes() == b"an earlier video"
    assert [entry.name for entry in tmp_path.iterdir()] == ["scene.mp4"]


def test_no_video_stands_under_its_name_before_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    original = av.VideoFrame.from_ndarray

    class Watching:
        @staticmethod
        def from_ndarray(*arguments: Any, **options: Any) -> av.VideoFrame:
            seen.append([entry.name for entry in tmp_path.iterdir() if entry.suffix == ".mp4"])
            return original(*arguments, **options)

    monkeypatch.setattr("cogvideox_factory.data.video.av.VideoFrame", Watching)
    write_video(tmp_path / "scene.mp4", soft_scene(5), 8)
    assert seen == [[]] * 5 and (tmp_path / "scene.mp4").exists()

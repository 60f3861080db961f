"""Frames out of video files at given times and sizes, and frames into mp4 files.

A frame is chosen by its time stamp, so a clip keeps its speed whatever its own rate is. Scaling happens inside the
decoder's colour conversion, and only for the frames that are kept. Rejected: decoding everything to RGB and
resizing with PIL or torch, which costs several times the time and memory.

The processes that decode import this module and little else: no torch here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

# Frames of equal spacing carry rounded time stamps; a frame this much late still counts as on time.
TIME_TOLERANCE_SECONDS = 1e-3
# A clip that seems longer than this has a broken time stamp, and would be sampled into more frames than memory holds.
LONGEST_SECONDS = 7 * 24 * 3600.0

# Containers whose index leads exactly to a key frame, and the seconds to skip from which a jump is worth while.
SEEKABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
SEEK_SECONDS = 2.0

# How much the shape of the picture may change within a file before its frames would be stretched.
ASPECT_TOLERANCE = 0.02


class VideoError(Exception):
    """A video file that cannot be used, with the reason."""


@dataclass(frozen=True)
class Timeline:
    """When each frame of a video is shown, in seconds from its first frame, and the frames' size in pixels."""

    times: np.ndarray  # (N,), rising
    end: float  # when the last frame goes
    height: int
    width: int
    origin: float | None = None  # the first frame's own time stamp in seconds; None where there is none to go by

    def sample_times(self, fps: float, skip_start: int = 0, skip_end: int = 0) -> np.ndarray:
        """Times, in seconds, at which the clip gives a frame at this rate, once frames of the source are skipped."""
        if skip_start + skip_end >= len(self.times):
            return np.zeros(0)
        start = self.times[skip_start]
        end = self.times[len(self.times) - skip_end] if skip_end else self.end
        count = int((end - start) * fps + TIME_TOLERANCE_SECONDS * fps)
        return start + np.arange(max(count, 1)) / fps


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class FrameRequest:
    """Which frames of a file, at which size: the whole picture is scaled to height × width, then `box` is cut out."""

    path: Path
    timeline: Timeline
    times: np.ndarray  # (N,), rising, in seconds from the first frame, before the timeline's end
    height: int
    width: int
    box: Box

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the frames: (N, height, width, 3)."""
        return len(self.times), self.box.height, self.box.width, 3


def read_timeline(path: Path) -> Timeline:
    """Time stamps of all frames, read from the packets; only the first frame is decoded. Raises VideoError."""
    with _open(path) as (container, stream):
        first: av.VideoFrame | None = None
        num_stored, latest = 0, None
        shown: list[int | None] = []  # not the packets themselves, which hold the whole file
        for packet in container.demux(stream):
            if first is None:  # on the way, since a raw stream cannot be wound back
                first = next(iter(packet.decode()), None)
            if packet.size:
                if packet.dts is not None and latest is not None and packet.dts < latest:
                    raise VideoError("has time stamps that begin again: several files joined as they are?")
                latest = latest if packet.dts is None else packet.dts
                num_stored += 1
                if not packet.is_discard:
                    shown.append(packet.pts)
        if num_stored < stream.frames:
            raise VideoError(f"is cut off: holds {num_stored} of {stream.frames} frames")
        if not shown:
            raise VideoError("holds no frames")
        if first is None:
            raise VideoError("no frame could be decoded")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        stamps = sorted(stamp for stamp in shown if stamp is not None)
        if len(stamps) == len(shown) and stream.time_base and container.format.name != "avi":
            times = np.array(stamps, dtype=np.float64) * float(stream.time_base)
            origin = float(times[0])
            times -= origin
            spacing = float(np.median(np.diff(times))) if len(times) > 1 else 1 / rate if rate else 0.0
        elif rate:
            times, spacing, origin = np.arange(len(shown)) / rate, 1 / rate, None
        else:
            raise VideoError("has neither time stamps nor a frame rate")
        if times[-1] > LONGEST_SECONDS:
            raise VideoError(f"has a broken time stamp, {times[-1]:.0f} seconds after the first")
        height, width = _shown_size(first, stream)
        return Timeline(times, float(times[-1]) + spacing, height, width, origin)


def read_frames(request: FrameRequest, num_threads: int = 0) -> np.ndarray:
    """The frames on screen at the requested times, as uint8 of `request.shape`.

    `num_threads` is for the decoder; 0 takes all cores. Raises VideoError where the file breaks before the last
    frame, or its picture changes shape within the file.
    """
    times, timeline = request.times, request.timeline
    chosen = np.empty(request.shape, dtype=np.uint8)
    filled = 0
    with _open(request.path, num_threads) as (container, stream):
        on_screen: av.VideoFrame | None = None
        for time, frame in _decode(container, stream, timeline, float(times[0])):
            while filled < len(times) and on_screen is not None and times[filled] < time - TIME_TOLERANCE_SECONDS:
                chosen[filled] = _fit(on_screen, stream, request)
                filled += 1
            if filled == len(times):
                return chosen
            on_screen, last_time = frame, time
        if on_screen is None:
            raise VideoError("no frame could be decoded")
        if last_time < min(times[-1], timeline.times[-1]) - TIME_TOLERANCE_SECONDS:
            raise VideoError(f"breaks off after {last_time:.2f} of {timeline.end:.2f} seconds")
        chosen[filled:] = _fit(on_screen, stream, request)  # it stays on screen until the timeline's end
    return chosen


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """H.264 in an mp4 that every browser plays. `frames` is uint8 of shape (frames, height, width, 3).

    The file is complete or absent: it is written under another name and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "16"}
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class _open:
    """The container and its first video stream; every failure inside becomes a VideoError."""

    def __init__(self, path: Path, num_threads: int = 0):
        self.path = path
        self.num_threads = num_threads
        self.container: InputContainer | None = None

    def __enter__(self) -> tuple[InputContainer, VideoStream]:
        if not self.path.is_file():
            raise VideoError("no such file")
        try:
            self.container = av.open(str(self.path), metadata_errors="replace")  # a title may be in any encoding
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot be read as a video ({_reason(error)})") from error
        if not self.container.streams.video:
            self.container.close()
            raise VideoError("has no picture")
        stream = self.container.streams.video[0]
        if stream.codec_context is None:
            self.container.close()
            raise VideoError("is in a format that cannot be decoded")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = self.num_threads
        return self.container, stream

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.container is not None:
            self.container.close()
        if isinstance(error, (av.FFmpegError, EOFError)):
            raise VideoError(f"is damaged ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _decode(
    container: InputContainer, stream: VideoStream, timeline: Timeline, start: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames in the order of their time, with seconds from the first of the file.

    They begin at a key frame at or before `start` where the file lets us jump there: a late excerpt of a long file
    would otherwise cost the decoding of all that comes before it.
    """
    if timeline.origin is None:  # of such a file we know the rate: `read_timeline` refuses it otherwise
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        yield from ((index / rate, frame) for index, frame in enumerate(container.decode(stream)))
        return
    frames = _stamped(container, stream, timeline.origin)
    if start >= SEEK_SECONDS and container.format.name in SEEKABLE_FORMATS:
        assert stream.time_base
        container.seek(round((timeline.origin + start) / stream.time_base), stream=stream)
        first = next(frames, None)
        if first is not None and first[0] <= start:
            yield first
        else:  # the jump led too far
            container.seek(0)
            frames = _stamped(container, stream, timeline.origin)
    yield from frames


def _stamped(container: InputContainer, stream: VideoStream, origin: float) -> Iterator[tuple[float, av.VideoFrame]]:
    for frame in container.decode(stream):
        if frame.time is None:
            raise VideoError("has frames without time stamps")
        yield frame.time - origin, frame


def _shown_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Height and width as a player shows them: with square pixels and turned upright."""
    size = frame.height, round(frame.width * float(stream.sample_aspect_ratio or 1))
    return size[::-1] if _quarter_turns(frame) % 2 else size


def _quarter_turns(frame: av.VideoFrame) -> int:
    """How often a player turns the frame, counterclockwise; an angle in between counts as the nearest."""
    return round(frame.rotation / 90)


def _fit(frame: av.VideoFrame, stream: VideoStream, request: FrameRequest) -> np.ndarray:
    """The requested part of one frame as RGB."""
    shown_height, shown_width = _shown_size(frame, stream)
    timeline, (top, left, box_height, box_width) = request.timeline, request.box
    if abs(shown_width / shown_height * timeline.height / timeline.width - 1) > ASPECT_TOLERANCE:
        raise VideoError(
            f"changes its picture from {timeline.width}x{timeline.height} to {shown_width}x{shown_height} midway"
        )
    turns = _quarter_turns(frame)
    # swscale's bicubic widens its filter when it shrinks a picture, so nothing aliases.
    image = frame.to_ndarray(
        format="rgb24",
        width=request.height if turns % 2 else request.width,
        height=request.width if turns % 2 else request.height,
        interpolation=Interpolation.BICUBIC,
    )
    return np.rot90(image, turns)[top : top + box_height, left : left + box_width]

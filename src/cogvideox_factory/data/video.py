"""Frames out of video files at a given rate and size, and frames into mp4 files.

A frame is chosen by its time stamp, so a clip keeps its speed whatever its own rate is. Scaling happens inside the
decoder's colour conversion, and only for the frames that are kept. Rejected: decoding everything to RGB and
resizing with PIL or torch, which costs several times the time and memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from cogvideox_factory.data.buckets import Bucket

# Frames of equal spacing carry rounded time stamps; a frame this much late still counts as on time.
TIME_TOLERANCE_SECONDS = 1e-3


class VideoError(Exception):
    """A video file that cannot be used, with the reason."""


@dataclass(frozen=True)
class Timeline:
    """When each frame of a video is shown, in seconds from its first frame, and the frames' size in pixels."""

    times: np.ndarray  # (N,), rising
    end: float  # when the last frame goes
    height: int
    width: int

    def sample_times(self, fps: float, skip_start: int = 0, skip_end: int = 0) -> np.ndarray:
        """Times, in seconds, at which the clip gives a frame at this rate, once frames of the source are skipped."""
        if skip_start + skip_end >= len(self.times):
            return np.zeros(0)
        start = self.times[skip_start]
        end = self.times[len(self.times) - skip_end] if skip_end else self.end
        count = int((end - start) * fps + TIME_TOLERANCE_SECONDS * fps)
        return start + np.arange(max(count, 1)) / fps


def read_timeline(path: Path) -> Timeline:
    """Time stamps of all frames, read from the packets; only the first frame is decoded. Raises VideoError."""
    with _open(path) as (container, stream):
        stored = [packet for packet in container.demux(stream) if packet.size]
        if len(stored) < stream.frames:
            raise VideoError(f"is cut off: holds {len(stored)} of {stream.frames} frames")
        packets = [packet for packet in stored if not packet.is_discard]
        if not packets:
            raise VideoError("holds no frames")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
        if len(stamps) == len(packets) and stream.time_base and container.format.name != "avi":
            times = np.array(stamps, dtype=np.float64) * float(stream.time_base)
            times -= times[0]
            spacing = float(np.median(np.diff(times))) if len(times) > 1 else 1 / rate if rate else 0.0
        elif rate:
            times, spacing = np.arange(len(packets)) / rate, 1 / rate
        else:
            raise VideoError("has neither time stamps nor a frame rate")
        container.seek(0)
        height, width = _shown_size(next(container.decode(stream)), stream)
        return Timeline(times, float(times[-1]) + spacing, height, width)


def read_frames(path: Path, timeline: Timeline, times: np.ndarray, bucket: Bucket, reshape_mode: str) -> np.ndarray:
    """The frames on screen at the given times, as uint8 of shape (frames, height, width, 3) of the bucket.

    `times` rise, in seconds from the first frame, and lie before `timeline.end`. `reshape_mode` is center (cover and
    crop) or none (stretch). Raises VideoError where the file breaks before the last of them.
    """
    chosen = np.empty((len(times), bucket.height, bucket.width, 3), dtype=np.uint8)
    filled = 0
    with _open(path) as (container, stream):
        on_screen: av.VideoFrame | None = None
        for time, frame in _decode(container, stream):
            while filled < len(times) and on_screen is not None and times[filled] < time - TIME_TOLERANCE_SECONDS:
                chosen[filled] = _fit(on_screen, stream, bucket, reshape_mode)
                filled += 1
            if filled == len(times):
                return chosen
            on_screen, last_time = frame, time
        if on_screen is None:
            raise VideoError("no frame could be decoded")
        if last_time < min(times[-1], timeline.times[-1]) - TIME_TOLERANCE_SECONDS:
            raise VideoError(f"breaks off after {last_time:.2f} of {timeline.end:.2f} seconds")
        chosen[filled:] = _fit(on_screen, stream, bucket, reshape_mode)  # it stays on screen until the timeline's end
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

    def __init__(self, path: Path):
        self.path = path
        self.container: InputContainer | None = None

    def __enter__(self) -> tuple[InputContainer, VideoStream]:
        if not self.path.is_file():
            raise VideoError("no such file")
        try:
            self.container = av.open(str(self.path))
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
        return self.container, stream

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.container is not None:
            self.container.close()
        if isinstance(error, (av.FFmpegError, EOFError)):
            raise VideoError(f"is damaged ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames in the order of their time, with seconds from the first of them."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    first: float | None = None
    for index, frame in enumerate(container.decode(stream)):
        stamped = frame.time is not None and not (container.format.name == "avi" and rate)
        time = frame.time if stamped else index / rate if rate else None
        if time is None:
            raise VideoError("has neither time stamps nor a frame rate")
        first = time if first is None else first
        yield time - first, frame


def _shown_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Height and width as a player shows them: with square pixels and turned upright."""
    size = frame.height, round(frame.width * float(stream.sample_aspect_ratio or 1))
    return size[::-1] if frame.rotation % 180 else size


def _fit(frame: av.VideoFrame, stream: VideoStream, bucket: Bucket, reshape_mode: str) -> np.ndarray:
    """One frame as RGB in the bucket's size."""
    height, width = bucket.height, bucket.width
    if reshape_mode == "center":
        shown_height, shown_width = _shown_size(frame, stream)
        scale = max(height / shown_height, width / shown_width)
        height, width = max(height, round(shown_height * scale)), max(width, round(shown_width * scale))
    else:
        assert reshape_mode == "none", reshape_mode
    turned = frame.rotation % 180 != 0
    # swscale's bicubic widens its filter when it shrinks a picture, so nothing aliases.
    image = frame.to_ndarray(
        format="rgb24",
        width=height if turned else width,
        height=width if turned else height,
        interpolation=Interpolation.BICUBIC,
    )
    image = np.rot90(image, frame.rotation // 90)
    top, left = (height - bucket.height) // 2, (width - bucket.width) // 2
    return image[top : top + bucket.height, left : left + bucket.width]

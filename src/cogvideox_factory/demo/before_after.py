"""What the demo's LoRA has learned: base, fine-tuned and target side by side, to look at and as distances."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cogvideox_factory.data.files import write_durably
from cogvideox_factory.data.video import Box, FrameRequest, read_frames, read_timeline

COLUMNS = ("base", "fine-tuned", "target")
ENLARGED, GAP, LINE = 2, 10, 22  # times, pixels, pixels
PAPER, INK = "#fcfcfb", "#1d2126"


@dataclass(frozen=True)
class BeforeAfter:
    """Videos of one caption, each uint8 of shape (frames, height, width, 3)."""

    caption: str
    base: np.ndarray
    tuned: np.ndarray
    target: np.ndarray

    @property
    def distances(self) -> tuple[float, float]:
        """Of base and fine-tuned from the target: mean absolute differences of pixels, from 0 to 255."""
        return distance(self.base, self.target), distance(self.tuned, self.target)

    @property
    def distance_of_nothing(self) -> float:
        """Of the target's background alone: what is nearer has painted something of the target."""
        return distance(np.broadcast_to(np.median(self.target, (0, 1, 2)), self.target.shape), self.target)


def distance(video: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(video.astype(np.float32) - other).mean())


def read_all(path: Path) -> np.ndarray:
    """Every frame of a video at its own size, uint8 of shape (frames, height, width, 3)."""
    timeline = read_timeline(path)
    height, width = timeline.height, timeline.width
    return read_frames(FrameRequest(path, timeline, timeline.times, height, width, Box(0, 0, height, width)))


def write_animation(path: Path, rows: Sequence[BeforeAfter], fps: float) -> None:
    """An animated GIF: a row a caption, the three videos in step; it rests on the last frame."""
    pictures = [_picture(rows, index).quantize(128) for index in range(len(rows[0].target))]
    durations = [round(1000 / fps)] * len(pictures)
    durations[-1] = 1000
    content = io.BytesIO()
    pictures[0].save(content, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_durably(path, content.getvalue())


def _picture(rows: Sequence[BeforeAfter], index: int) -> Image.Image:
    height, width = (side * ENLARGED for side in rows[0].target.shape[1:3])
    page = Image.new("RGB", (GAP + 3 * (width + GAP), GAP + LINE + len(rows) * (height + LINE + GAP)), PAPER)
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, title in enumerate(COLUMNS):
        canvas.text((GAP + column * (width + GAP), GAP), title, INK, font)
    top = GAP + LINE
    for row in rows:
        for column, video in enumerate((row.base, row.tuned, row.target)):
            frame = Image.fromarray(video[index]).resize((width, height), Image.Resampling.NEAREST)
            page.paste(frame, (GAP + column * (width + GAP), top))
        canvas.text((GAP, top + height + 2), row.caption, INK, font)
        top += height + LINE + GAP
    return page

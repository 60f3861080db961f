"""Video files that tests write: any pictures in any format, and pictures that tell their own number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

LOSSLESS_H264 = {"crf": "0", "preset": "ultrafast"}


def numbered(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture whose left half tells the low digit of a number in base 16, and whose right half the high one."""
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[:, : width // 2] = index % 16 * 15 + 15
    image[:, width // 2 :] = index // 16 * 15 + 15
    return image


def number_of(image: np.ndarray) -> int:
    """The number that a picture of `numbered` shows."""
    height, width = image.shape[:2]
    row = image[height // 4 : -height // 4].astype(float).mean(axis=(0, 2))
    low, high = row[width // 8 : width * 3 // 8].mean(), row[width * 5 // 8 : width * 7 // 8].mean()
    return round((low - 15) / 15) + 16 * round((high - 15) / 15)


def video_file(
    path: Path,
    images: Sequence[np.ndarray],
    rate: Fraction | int = 30,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    pixels: str = "yuv420p",
    seconds: Sequence[float] | None = None,
    container_options: dict[str, str] | None = None,
    change_stream: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """A video of these pictures; `seconds` are their time stamps where the rate varies. H.264 is lossless unless
    `options` say otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if options is None:
        options = LOSSLESS_H264 if codec == "libx264" else {}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixels
        if seconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        change_stream(stream)
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if seconds is not None:
                frame.pts, frame.time_base = round(seconds[index] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

"""Decides which clip goes to which size.

Pure arithmetic on numbers: nothing is decoded or read here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
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

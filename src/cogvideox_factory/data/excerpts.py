"""What of a clip training sees: which frames, at which size, cut where, mirrored or not.

`prepare` encodes it and `inspect` shows it, so both see the same. Whatever is drawn at random here is keyed by the
clip's content: a clip gives the same excerpts whenever and wherever it is read.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cogvideox_factory.config import DataOptions
from cogvideox_factory.data.buckets import Bucket, all_buckets, choose_bucket
from cogvideox_factory.data.clips import Clip
from cogvideox_factory.data.files import hash_of_file
from cogvideox_factory.data.video import Box, FrameRequest, Timeline, VideoError, read_timeline

DEFAULT_UNIFORM_EXCERPTS = 4
# Frames further apart than this many intervals of the training rate are shown twice; rates such as 7.99 are not meant.
REPEATING = 1.02


class TooShort(VideoError):
    """A clip that fills no bucket."""


class View(NamedTuple):
    """How a bucket looks at the scaled picture of a clip: from which corner on, and whether mirrored."""

    top: int
    left: int
    is_flipped: bool


@dataclass(frozen=True)
class Excerpt:
    """Successive frames of a clip, at the training rate, that count as one clip of the training."""

    clip: Clip
    content: str  # hash of the file
    timeline: Timeline
    times: np.ndarray  # (frames,) seconds from the first frame of the file
    bucket: Bucket
    scaled_size: tuple[int, int]  # of the whole picture: height and width
    views: tuple[View, ...]  # one of them is drawn an epoch; a view may stand here more than once, to weigh more

    @property
    def box(self) -> Box:
        """The smallest part of the scaled picture that holds all views."""
        top, left = min(view.top for view in self.views), min(view.left for view in self.views)
        bottom = max(view.top for view in self.views) + self.bucket.height
        right = max(view.left for view in self.views) + self.bucket.width
        return Box(top, left, bottom - top, right - left)

    @property
    def request(self) -> FrameRequest:
        """What to decode."""
        return FrameRequest(self.clip.path, self.timeline, self.times, *self.scaled_size, self.box)

    def see(self, frames: np.ndarray, view: View) -> np.ndarray:
        """One view, (frames, height, width, 3) of the bucket, out of the decoded box. No copy is made."""
        top, left = view.top - self.box.top, view.left - self.box.left
        seen = frames[:, top : top + self.bucket.height, left : left + self.bucket.width]
        return seen[:, :, ::-1] if view.is_flipped else seen

    @property
    def scale(self) -> float:
        """Pixels of the scaled picture for one of the source, in the direction that is enlarged more."""
        return max(self.scaled_size[0] / self.timeline.height, self.scaled_size[1] / self.timeline.width)

    @property
    def cropped_share(self) -> float:
        """How much of the picture is cut away."""
        return 1 - self.bucket.height * self.bucket.width / (self.scaled_size[0] * self.scaled_size[1])

    def repeats_frames(self, fps: float) -> bool:
        """Whether the source has so few frames a second that some stand twice among the times."""
        times = self.timeline.times
        return len(times) > 1 and float(np.median(np.diff(times))) > REPEATING / fps


def read_excerpts(clip: Clip, data: DataOptions) -> list[Excerpt]:
    """All excerpts of a clip; `data` has its buckets and rate resolved.

    Raises VideoError where the clip cannot be used, and OSError where its file cannot be read.
    """
    assert data.fps is not None
    if not clip.source or not clip.caption:
        raise VideoError("has no caption" if clip.source else "the data set names no file for it")
    timeline = read_timeline(clip.path)
    times = timeline.sample_times(data.fps, data.skip_frames_start, data.skip_frames_end)
    buckets = all_buckets(data.frame_buckets, data.height_buckets, data.width_buckets)
    usable = min(len(times), data.max_num_frames or len(times))
    bucket = choose_bucket(usable, timeline.height, timeline.width, buckets)
    if bucket is None:
        shortest = min(bucket.frames for bucket in buckets)
        limit = "" if usable == len(times) else f", of which --max_num_frames allows {usable}"
        raise TooShort(
            f"is too short: {len(times)} frames at {data.fps:g} fps{limit}, the smallest bucket has {shortest}"
        )
    content = hash_of_file(clip.path)
    size = scaled_size(timeline.height, timeline.width, bucket, data.video_reshape_mode)
    excerpts = []
    for start in excerpt_starts(len(times), bucket.frames, data):
        views = choose_views(size, bucket, data, seed=f"{content}/{start}")
        excerpt_times = times[start : start + bucket.frames].copy()  # not a hold on all times of a long clip
        excerpts.append(Excerpt(clip, content, timeline, excerpt_times, bucket, size, views))
    return excerpts


def excerpt_starts(num_frames: int, excerpt_frames: int, data: DataOptions) -> Sequence[int]:
    """Where excerpts begin, rising, as numbers of frames at the training rate."""
    last = num_frames - excerpt_frames
    assert last >= 0
    match data.frame_extraction:
        case "head":
            return [0]
        case "center":
            return [last // 2]
        case "uniform":
            count = data.num_excerpts or DEFAULT_UNIFORM_EXCERPTS
            if count == 1:
                return [last // 2]
            return sorted({round(index * last / (count - 1)) for index in range(count)})
        case "slide":
            return range(0, last + 1, data.excerpt_stride or excerpt_frames)[: data.num_excerpts]


def scaled_size(height: int, width: int, bucket: Bucket, reshape_mode: str) -> tuple[int, int]:
    """Height and width that a picture is scaled to: the smallest that covers the bucket, or with none just its size."""
    if reshape_mode == "none":
        return bucket.height, bucket.width
    scale = max(bucket.height / height, bucket.width / width)
    return max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))


def choose_views(size: tuple[int, int], bucket: Bucket, data: DataOptions, seed: str) -> tuple[View, ...]:
    """The views of a picture of this scaled size; one where nothing is left to chance.

    Over many clips the share of mirrored views is just `random_flip`; within one clip it is as near as whole views
    come to it (systematic sampling).
    """
    spare_height, spare_width = size[0] - bucket.height, size[1] - bucket.width
    crops_at_random = data.video_reshape_mode == "random" and (spare_height or spare_width)
    count = data.num_variants if crops_at_random or 0 < data.random_flip < 1 else 1
    draw = random.Random(seed)
    offset = draw.random()
    views = []
    for index in range(count):
        is_flipped = math.floor((index + 1) * data.random_flip + offset) > math.floor(index * data.random_flip + offset)
        top, left = spare_height // 2, spare_width // 2
        if crops_at_random:
            top, left = draw.randint(0, spare_height), draw.randint(0, spare_width)
        views.append(View(top, left, is_flipped))
    return tuple(views)

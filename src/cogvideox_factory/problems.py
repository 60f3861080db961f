"""What can be wrong with clips that are to be trained on, and what to do about it.

A problem is told once for a clip, however many excerpts it shows in. Rejected: to tell it for each excerpt, which
makes a long list of the same.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cogvideox_factory.data.excerpts import Excerpt
from cogvideox_factory.pictures import Impression

Place = tuple[int, int]  # numbers of a clip and of an excerpt of it


class Kind(NamedTuple):
    """A kind of problem, as people are told of it."""

    title: str
    remedy: str
    is_fatal: bool  # training skips the clip, rather than using it nonetheless


KINDS = {
    "unreadable": Kind("cannot be read", "correct the path, copy or convert the file again, or take it out", True),
    "too_short": Kind("too short", "take a longer piece, add a smaller number to --frame_buckets, or lower it", True),
    "caption_empty": Kind("no caption", "write down what the clip shows", True),
    "too_few_pixels": Kind("too few pixels", "find a larger source, or add smaller height and width buckets", False),
    "repeated_frames": Kind("repeated frames", "lower --fps, or find a source with more frames a second", False),
    "cut": Kind("cut inside", "split the file there into clips of their own, each with its caption", False),
    "black": Kind("black", "take it out, or choose other frames with --frame_extraction or --skip_frames_start", False),
    "static": Kind("nothing moves", "take it out: a video model learns from it to make stills", False),
    "caption_too_long": Kind("caption too long", "shorten it, or put what matters first", False),
    "caption_duplicate": Kind("same caption", "say what tells the clips apart, if anything does", False),
    "same_clip_twice": Kind("same clip twice", "take out all but one, unless it is meant to weigh more", False),
}


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a clip, or with several of them together."""

    kind: str
    paths: tuple[str, ...]
    reason: str
    places: frozenset[Place] = frozenset()  # the excerpts that it shows in; none where the clip is skipped

    def as_json(self) -> dict[str, Any]:
        kind = KINDS[self.kind]
        return {
            "kind": self.kind,
            "paths": list(self.paths),
            "reason": self.reason,
            "remedy": kind.remedy,
            "is_fatal": kind.is_fatal,
        }


# An excerpt is enlarged by more than this before it counts: a few per cent are not seen.
MAX_SCALE = 1.25


def size_and_rate_problems(excerpts: Mapping[Place, Excerpt], fps: float) -> Iterator[Problem]:
    for places in _by_clip(excerpts):
        excerpt = excerpts[places[0]]  # size and rate are those of the file
        timeline = excerpt.timeline
        if excerpt.scale > MAX_SCALE:
            size = f"{timeline.width}x{timeline.height} pixels are enlarged {excerpt.scale:.2f} times"
            yield _problem("too_few_pixels", excerpts, places, f"{size} to fill the bucket {excerpt.bucket}")
        if excerpt.repeats_frames(fps):
            rate = 1 / float(np.median(np.diff(timeline.times)))
            reason = f"has {rate:.3g} frames a second, so --fps {fps:g} repeats them"
            yield _problem("repeated_frames", excerpts, places, reason)


def picture_problems(excerpts: Mapping[Place, Excerpt], impressions: Mapping[Place, Impression]) -> Iterator[Problem]:
    for places in _by_clip(excerpts):
        black = [place for place in places if impressions[place].is_black]
        static = [place for place in places if impressions[place].is_static and place not in black]
        cut = [place for place in places if impressions[place].cuts]
        if black:
            yield _problem("black", excerpts, black, f"nearly no light {_spans(excerpts, black)}")
        if static:
            yield _problem("static", excerpts, static, f"nothing moves {_spans(excerpts, static)}")
        if cut:
            seconds = sorted({f"{time:.2f}" for place in cut for time in impressions[place].cuts}, key=float)
            yield _problem("cut", excerpts, cut, f"a new scene begins at {_listed(seconds)} s")


def caption_problems(excerpts: Mapping[Place, Excerpt], tokenizer: Any, max_tokens: int) -> Iterator[Problem]:
    for places in _by_clip(excerpts):
        caption = excerpts[places[0]].clip.caption
        num_tokens, unread = text_beyond(tokenizer, caption, max_tokens)
        if num_tokens > max_tokens:
            reason = f"has {num_tokens} tokens, of which {max_tokens} are read; this is not: “{unread}”"
            yield _problem("caption_too_long", excerpts, places, reason)


def repetitions(excerpts: Mapping[Place, Excerpt]) -> Iterator[Problem]:
    by_caption: dict[str, list[Place]] = collections.defaultdict(list)
    by_content: dict[str, list[Place]] = collections.defaultdict(list)
    for place, excerpt in excerpts.items():
        by_caption[excerpt.clip.caption].append(place)
        by_content[excerpt.content].append(place)
    for caption, places in by_caption.items():
        if len({excerpts[place].content for place in places}) > 1:
            num_clips = len({clip for clip, _ in places})
            yield _problem("caption_duplicate", excerpts, places, f"{num_clips} clips have the caption “{caption}”")
    for places in by_content.values():
        num_clips = len({clip for clip, _ in places})
        num_files = len({excerpts[place].clip.source for place in places})
        if num_clips > 1:
            reason = f"is listed {num_clips} times"
            if num_files > 1:
                reason = f"{num_files} files are the same, byte for byte"
            yield _problem("same_clip_twice", excerpts, places, reason)


def text_beyond(tokenizer: Any, caption: str, max_tokens: int) -> tuple[int, str]:
    """Number of tokens of a caption, and the text of those that the text encoder does not see."""
    tokens = tokenizer(caption, add_special_tokens=False).input_ids
    num_special = tokenizer.num_special_tokens_to_add()  # the end token, which takes the last position
    return len(tokens) + num_special, tokenizer.decode(tokens[max_tokens - num_special :])


def _by_clip(excerpts: Mapping[Place, Excerpt]) -> Collection[list[Place]]:
    """Places of each clip's excerpts."""
    by_clip: dict[int, list[Place]] = collections.defaultdict(list)
    for place in excerpts:
        by_clip[place[0]].append(place)
    return by_clip.values()


def _problem(kind: str, excerpts: Mapping[Place, Excerpt], places: Collection[Place], reason: str) -> Problem:
    paths = tuple(dict.fromkeys(excerpts[place].clip.source for place in places))
    return Problem(kind, paths, reason, frozenset(places))


def _spans(excerpts: Mapping[Place, Excerpt], places: Collection[Place]) -> str:
    """When excerpts begin and end in their file."""
    times = [excerpts[place].times for place in places]
    return _listed([f"from {time[0]:.2f} to {time[-1]:.2f} s" for time in times])


def _listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))

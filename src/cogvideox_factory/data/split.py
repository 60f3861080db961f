"""Which clips of a prepared set are held out of the training.

The videos are cut apart, not their excerpts: neighbouring excerpts, other views and copies of one video are so alike
that holding one of them out would measure memory. A video is placed in [0, 1) by the hash of what was encoded of it,
and held out where that is below the fraction. It does not depend on the order, the seed, the name of its file, or the
other videos, so that it stays on its side when clips are added; encoded at another size or rate, or by another VAE, a
video has another place.

Rejected: the first videos in the order of their hashes, which meets the fraction exactly; an added video then moves
another one from one side to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cogvideox_factory.config import UserError
from cogvideox_factory.data.files import hash_of
from cogvideox_factory.data.store import Entry


def split_entries(entries: Sequence[Entry], fraction: float) -> tuple[list[Entry], list[Entry]]:
    """Entries to train on and entries held out, both in their order.

    Raises UserError where one of the two would be empty, with the nearest fraction at which it is not.
    """
    videos = _videos(entries)
    places = [_place(entries[index] for index in video) for video in videos]
    if not min(places) < fraction <= max(places):
        if len(videos) == 1:
            raise UserError(
                f"--validation_fraction {fraction:g}: there is one video only, and holding it out would leave none to "
                "train on; name other clips with --validation_data_root"
            )
        is_low = fraction <= min(places)
        share, bound = ("none", min(places)) if is_low else ("all", max(places))
        # Rounded to the side on which it works.
        nearest = (int(bound * 1e4) + 1) / 1e4 if is_low else int(bound * 1e4) / 1e4
        raise UserError(
            f"--validation_fraction {fraction:g}: holds out {share} of {len(videos)} videos (each falls on its side by "
            f"a hash); the nearest that works here is {nearest:g}"
        )
    held_out = {index for video, place in zip(videos, places, strict=True) if place < fraction for index in video}
    return (
        [entry for index, entry in enumerate(entries) if index not in held_out],
        [entry for index, entry in enumerate(entries) if index in held_out],
    )


def num_videos(entries: Sequence[Entry]) -> int:
    """How many videos entries come from; copies count as one."""
    return len(_videos(entries))


def overlap(entries: Sequence[Entry], others: Iterable[Entry]) -> list[Entry]:
    """Those of `entries` whose encoded frames are also among `others`."""
    known = {file for entry in others for file in entry.files["latents"]}
    return [entry for entry in entries if known.intersection(entry.files["latents"])]


def _videos(entries: Sequence[Entry]) -> list[list[int]]:
    """Indices of entries, those of one video together: of the same source, or with an encoded file in common."""
    parents = list(range(len(entries)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first_with: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(entries):
        names = [("source", entry.source), *(("file", file) for file in entry.files["latents"])]
        for name in names:
            parents[root(index)] = root(first_with.setdefault(name, index))
    videos: dict[int, list[int]] = {}
    for index in range(len(entries)):
        videos.setdefault(root(index), []).append(index)
    return list(videos.values())


def _place(entries: Iterable[Entry]) -> float:
    """Where a video stands in [0, 1). The least of its files' hashes: a copy of it has the same files."""
    least = min(hash_of("held out", file) for entry in entries for file in entry.files["latents"])
    return int(least[:12], 16) / 16**12

"""The `inspect` command: what training would see of a data set, and what is wrong with it.

Clips are read, cut to buckets and decoded by the code that `prepare` uses, so what is shown is what will be encoded;
only the encoders are missing, and with them the GPU. Of each excerpt no more is kept than numbers and, where it has a
row on the contact sheet, thumbnails. Rejected: an option of `prepare`, which would download and load the models.
"""

from __future__ import annotations

import collections
import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from cogvideox_factory import contact_sheet
from cogvideox_factory.config import DataOptions, Inspect, UserError
from cogvideox_factory.contact_sheet import Badge, Frame, Row, Sheet
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.clips import Clip, read_clips
from cogvideox_factory.data.decoding import decode_ahead
from cogvideox_factory.data.excerpts import Excerpt, TooShort, read_excerpts
from cogvideox_factory.data.files import make_output_folder, write_durably
from cogvideox_factory.data.video import FrameRequest, VideoError
from cogvideox_factory.model.family import open_checkpoint
from cogvideox_factory.pictures import Impression, look_at
from cogvideox_factory.problems import (
    KINDS,
    Place,
    Problem,
    caption_problems,
    picture_problems,
    repetitions,
    size_and_rate_problems,
)
from cogvideox_factory.progress import progress_bar
from cogvideox_factory.resolve import check_text_length, resolve_data_options
from cogvideox_factory.stopping import StopRequest, stop_requests

Item = TypeVar("Item")

NO_NAME = "(no name)"
STOPPED = "stopped while looking at clips; nothing was written"
PRINTED_PROBLEMS = 20  # of a kind; inspection.json has all
PRINTED_PATHS = 6  # of a problem
PRINTED_REASON = 400  # characters


@dataclass(frozen=True)
class Sight:
    """What was seen of an excerpt."""

    impression: Impression
    frames: tuple[Frame, ...]  # empty where it has no row on the sheet


@dataclass(frozen=True)
class Inspection:
    """All that was found out about a data set."""

    clips: Sequence[Clip]
    skipped: Mapping[int, Problem]  # by number of the clip
    excerpts: Mapping[Place, Excerpt]  # of all other clips, in the data set's order
    sights: Mapping[Place, Sight]
    problems: Sequence[Problem]  # all of them, by kind

    @property
    def num_usable(self) -> int:
        return len(self.clips) - len(self.skipped)


def run(options: Inspect) -> None:
    """The `inspect` command.

    Raises UserError, once all is printed and written, where no clip is usable, or with --strict where anything is
    wrong.
    """
    from transformers import T5Tokenizer

    checkpoint = open_checkpoint(options.model, with_weights=False)
    check_text_length(checkpoint, options.max_sequence_length)
    data = replace(options.data, **resolve_data_options(options.data, checkpoint))
    clips = read_clips(data)
    make_output_folder(options.output_dir)
    tokenizer = T5Tokenizer.from_pretrained(checkpoint.folder, subfolder="tokenizer")
    max_tokens = options.max_sequence_length or checkpoint.max_text_tokens
    with stop_requests() as stop:
        found = inspect_clips(clips, data, tokenizer, max_tokens, options.num_rows, stop)
    sheet = make_sheet(found, data)
    png, html = (options.output_dir / f"contact_sheet.{ending}" for ending in ("png", "html"))
    summary = {**summarise(found, data), "contact_sheet": {"png": str(png), "html": str(html)}}
    write_durably(png, contact_sheet.draw_png(sheet))
    write_durably(html, contact_sheet.draw_html(sheet).encode())
    write_durably(options.output_dir / "inspection.json", _json(summary, indent=2).encode())
    print(_json(summary) if options.json else _as_text(found, summary))
    if not found.excerpts:
        first = next(iter(found.skipped.values()))
        raise UserError(
            f"--data_root {data.data_root}: no usable clip among {len(clips)}; the first: {first.paths[0]}: "
            f"{first.reason}"
        )
    if data.strict and found.problems:
        raise UserError(f"{_count(len(found.problems), 'problem')} in {_count(len(clips), 'clip')} (--strict)")


def inspect_clips(
    clips: Sequence[Clip], data: DataOptions, tokenizer: Any, max_tokens: int, num_rows: int, stop: StopRequest
) -> Inspection:
    """Look at every clip; `data` has its buckets and rate resolved. Raises Stopped after a signal."""
    assert data.fps is not None
    excerpts, skipped = _read_clips(clips, data, stop)
    sights, broken = _look(excerpts, spread(list(excerpts), num_rows), data, stop)
    skipped = dict(sorted({**skipped, **broken}.items()))
    excerpts = {place: excerpt for place, excerpt in excerpts.items() if place[0] not in skipped}
    without_row = [place for place in excerpts if not sights[place].frames]
    num_free_rows = num_rows - (len(excerpts) - len(without_row))
    if without_row and num_free_rows > 0:  # clips that had a row turned out to be broken
        chosen = spread(without_row, num_free_rows)
        sights |= _look({place: excerpts[place] for place in chosen}, chosen, data, stop)[0]
    problems = [
        *skipped.values(),
        *size_and_rate_problems(excerpts, data.fps),
        *picture_problems(excerpts, {place: sight.impression for place, sight in sights.items()}),
        *caption_problems(excerpts, tokenizer, max_tokens),
        *repetitions(excerpts),
    ]
    problems.sort(key=lambda problem: list(KINDS).index(problem.kind))
    return Inspection(clips, skipped, excerpts, sights, problems)


def _read_clips(
    clips: Sequence[Clip], data: DataOptions, stop: StopRequest
) -> tuple[dict[Place, Excerpt], dict[int, Problem]]:
    """Excerpts of the usable clips, and why the others are none."""
    excerpts: dict[Place, Excerpt] = {}
    skipped: dict[int, Problem] = {}
    for index, clip in enumerate(progress_bar(clips, "Reading clips", "clip")):
        stop.check(STOPPED)
        try:
            found = read_excerpts(clip, data)
        except (VideoError, OSError) as error:
            is_without_caption = bool(clip.source) and not clip.caption
            kind = (
                "caption_empty" if is_without_caption else "too_short" if isinstance(error, TooShort) else "unreadable"
            )
            skipped[index] = Problem(kind, (clip.source or NO_NAME,), str(error))
        else:
            excerpts |= {(index, number): excerpt for number, excerpt in enumerate(found)}
    return excerpts, skipped


def _look(
    excerpts: Mapping[Place, Excerpt], rows: Collection[Place], data: DataOptions, stop: StopRequest
) -> tuple[dict[Place, Sight], dict[int, Problem]]:
    """Decode excerpts; those among `rows` leave thumbnails. Also the clips that cannot be decoded."""
    sights: dict[Place, Sight] = {}
    broken: dict[int, Problem] = {}
    with_frames = set(rows)
    bar = progress_bar(None, "Looking at clips", "clip", len(excerpts))

    def requests() -> Iterator[tuple[Place, FrameRequest]]:
        for place, excerpt in excerpts.items():
            if place[0] not in broken:  # by another excerpt of the clip
                yield place, excerpt.request

    with bar, contextlib.closing(decode_ahead(requests(), data.num_decode_workers)) as decoded:
        for place, frames in decoded:
            excerpt = excerpts[place]
            if isinstance(frames, Exception):
                stop.check(STOPPED)  # whoever stops the program may have stopped the decoder
                broken[place[0]] = Problem("unreadable", (excerpt.clip.source,), str(frames))
            else:
                sights[place] = _see(excerpt, excerpt.see(frames, excerpt.views[0]), place in with_frames)
            bar.update()
            stop.check(STOPPED)
    return sights, broken


def _see(excerpt: Excerpt, frames: np.ndarray, with_frames: bool) -> Sight:
    """What frames show, as the model gets them."""
    chosen = contact_sheet.choose_frames(len(frames)) if with_frames else []
    thumbnails = (Frame(float(excerpt.times[index]), contact_sheet.make_thumbnail(frames[index])) for index in chosen)
    return Sight(look_at(frames, excerpt.times), tuple(thumbnails))


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items, at most, evenly spread over them."""
    count = min(count, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


# What is written and printed.


def make_sheet(found: Inspection, data: DataOptions) -> Sheet:
    """The contact sheet of the excerpts that left thumbnails."""
    badges: dict[Place, list[Badge]] = collections.defaultdict(list)
    for problem in found.problems:
        for place in problem.places:
            badges[place].append(Badge(KINDS[problem.kind].title, problem.reason))
    rows = [
        Row(excerpt.clip.source, _details(excerpt), excerpt.clip.caption, tuple(badges[place]), frames)
        for place, excerpt in found.excerpts.items()
        if (frames := found.sights[place].frames)
    ]
    shown = f"{len(rows)} of {_count(len(found.excerpts), 'excerpt')} shown, cut as the model gets them"
    skipped = [(problem.paths[0], problem.reason) for problem in found.skipped.values()]
    assert data.data_root is not None
    # A sheet is made to be handed around; where the folder lies on this machine is nobody else's business.
    return Sheet(data.data_root.resolve().name, f"{shown} · {_totals(found)}", rows, skipped)


def _details(excerpt: Excerpt) -> str:
    parts = [str(excerpt.bucket), f"{excerpt.times[0]:.2f} to {excerpt.times[-1]:.2f} s"]
    if excerpt.cropped_share > 0.005:
        parts.append(f"{excerpt.cropped_share:.0%} cropped away")
    if excerpt.scale > 1:
        parts.append(f"enlarged {excerpt.scale:.2f} times")
    if excerpt.views[0].is_flipped:
        parts.append("mirrored")
    return " · ".join(parts)


def summarise(found: Inspection, data: DataOptions) -> dict[str, Any]:
    """What inspection.json holds, but for the sheets."""
    assert data.fps is not None
    by_bucket: dict[Bucket, list[Place]] = collections.defaultdict(list)
    for place, excerpt in found.excerpts.items():
        by_bucket[excerpt.bucket].append(place)
    return {
        "clips": len(found.clips),
        "usable": found.num_usable,
        "excerpts": len(found.excerpts),
        "buckets": [
            {
                "bucket": str(bucket),
                **bucket._asdict(),
                "clips": len({clip for clip, _ in places}),
                "excerpts": len(places),
                "cropped_share": round(float(np.mean([found.excerpts[place].cropped_share for place in places])), 4),
                "upscaled": len({place[0] for place in places if found.excerpts[place].scale > 1}),
                "seconds": round(len(places) * bucket.frames / data.fps, 2),
            }
            for bucket, places in sorted(by_bucket.items())
        ],
        "problems": [problem.as_json() for problem in found.problems],
    }


def _json(summary: Mapping[str, Any], indent: int | None = None) -> str:
    text = json.dumps(summary, ensure_ascii=False, indent=indent)
    return text.encode(errors="replace").decode()  # a file's name can hold what UTF-8 cannot


def _as_text(found: Inspection, summary: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = [*_table(summary["buckets"]), "", _totals(found)]
    kinds = collections.Counter(problem.kind for problem in found.problems)
    for name, number in kinds.items():
        kind = KINDS[name]
        consequence = "skipped in training" if kind.is_fatal else "used nonetheless"
        lines += ["", f"{kind.title} ({number}, {consequence}) → {kind.remedy}"]
        alike = [problem for problem in found.problems if problem.kind == name]
        lines += [
            f"  {_listed_paths(problem.paths)}: {_shortened(problem.reason)}" for problem in alike[:PRINTED_PROBLEMS]
        ]
        if number > PRINTED_PROBLEMS:
            lines.append(f"  … and {number - PRINTED_PROBLEMS} more, see inspection.json")
    sheets = summary["contact_sheet"]
    lines += ["", f"contact sheet  {sheets['png']}", f"               {sheets['html']}"]
    return "\n".join(_one_line(line) for line in lines)


def _table(buckets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the table of buckets, with totals where there are several."""
    if not buckets:
        return ["no bucket has a clip"]
    rows = [dict(row) for row in buckets]
    if len(rows) > 1:
        totals = {name: sum(row[name] for row in rows) for name in ("clips", "excerpts", "upscaled", "seconds")}
        cropped = sum(row["cropped_share"] * row["excerpts"] for row in rows) / totals["excerpts"]
        rows.append({"bucket": "all", "cropped_share": cropped, **totals})
    width = max(len("bucket"), *(len(row["bucket"]) for row in rows))
    return [
        f"{'bucket':<{width}}  {'clips':>7}  {'excerpts':>8}  {'cropped':>7}  {'upscaled':>8}  {'seconds':>8}",
        *(
            f"{row['bucket']:<{width}}  {row['clips']:>7}  {row['excerpts']:>8}  {row['cropped_share'] * 100:>5.0f} %  "
            f"{row['upscaled']:>8}  {row['seconds']:>8.1f}"
            for row in rows
        ),
    ]


def _totals(found: Inspection) -> str:
    skipped = f", {len(found.skipped)} skipped" if found.skipped else ""
    usable = f"{_count(len(found.clips), 'clip')}, {found.num_usable} usable{skipped}"
    return f"{usable}; {_count(len(found.excerpts), 'excerpt')}; {_count(len(found.problems), 'problem')}"


def _listed_paths(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - PRINTED_PATHS} more" if len(paths) > PRINTED_PATHS else ""
    return ", ".join(paths[:PRINTED_PATHS]) + more


def _shortened(reason: str) -> str:
    return reason if len(reason) <= PRINTED_REASON else f"{reason[:PRINTED_REASON]}…"


def _one_line(text: str) -> str:
    """Without control characters, which a file's name may hold and a terminal would obey."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

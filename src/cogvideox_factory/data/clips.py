"""Reads what a user wrote down (two text files, a table, or a caption beside each video) into a list of clips.

Only lists and captions are read here, no video is opened. What is wrong with the data set as a whole is a UserError;
what is wrong with one clip is found when that clip is looked at.

Rejected: the folder loaders of Hugging Face `datasets`, and pandas. Both are heavy for a few lines of text, guess the
types of columns (a caption "2024" becomes a number, "NA" nothing), and their errors name neither the line nor the flag.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_factory.config import DataOptions, UserError, nearest

# The flags' defaults are names of columns; the usual files and the other usual columns count where a flag was left
# alone. Guides call the two text files prompts.txt or prompt.txt and videos.txt; Hugging Face writes file_name.
USUAL_FILES = {"--caption_column": ("prompts.txt", "prompt.txt"), "--video_column": ("videos.txt", "video.txt")}
USUAL_COLUMNS = {"--caption_column": ("text", "caption", "prompt"), "--video_column": ("video", "file_name", "path")}
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
VIDEO_ENDING = re.compile(r"\.(mp4|mov|mkv|webm|avi|m4v|mpe?g|m?ts|m2ts|wmv|flv|ogv|3gp|gif)", re.IGNORECASE)


@dataclass(frozen=True)
class Clip:
    """A video file and what it shows."""

    path: Path
    source: str  # the path as the data set writes it
    caption: str


def read_clips(options: DataOptions) -> list[Clip]:
    """Clips of a data set, in its order.

    Raises UserError where the folder or a list is missing, broken or empty, numbers of prompts and videos differ, a
    column does not exist, or paths lead out of the folder.
    """
    root = options.data_root
    if root is None or not root.is_dir():
        raise UserError(f"--data_root {root}: no such folder")
    try:
        pairs = _read_pairs(root, options)
    except OSError as error:
        raise UserError(f"--data_root {root}: cannot be read: {error}") from error
    if not options.allow_outside_paths:
        _refuse_outside_paths(root, [source for source, _ in pairs])
    prefix = f"{options.id_token} " if options.id_token else ""
    return [Clip(root / source, source, prefix + caption if caption else "") for source, caption in pairs]


def _read_pairs(root: Path, options: DataOptions) -> list[tuple[str, str]]:
    """(source, caption) of every clip, from the list that the user named or else from what the folder holds."""
    if options.dataset_file is not None:
        inside = root / options.dataset_file
        path = inside if inside.is_file() else options.dataset_file
        if not path.is_file():
            raise UserError(f"--dataset_file {path}: no such file")
        return _from_table(path, f"--dataset_file {path}", options)
    columns = {"--video_column": options.video_column, "--caption_column": options.caption_column}
    named = [name for flag, name in columns.items() if name != USUAL_COLUMNS[flag][0]]
    names_a_file = any(name.lower().endswith(".txt") or (root / name).is_file() for name in named)
    if names_a_file or all(_find_list(root, name, flag) for flag, name in columns.items()):
        return _from_text_files(root, columns)
    for file_name in METADATA_FILES:
        if (root / file_name).is_file():
            return _from_table(root / file_name, f"--data_root {root}: {file_name}", options)
    # A name that fits nothing in the folder is a mistake to report, not a reason to read something else.
    return _from_text_files(root, columns) if named else _from_sidecars(root)


def _refuse_outside_paths(root: Path, sources: list[str]) -> None:
    # Paths are judged as written: folders of links to clips that lie elsewhere are common, and meant.
    top = os.path.abspath(root)
    outside = [source for source in sources if not Path(os.path.abspath(root / source)).is_relative_to(top)]
    if outside:
        raise UserError(
            f"--data_root {root}: {len(outside)} of {len(sources)} paths lead out of this folder, the first: "
            f"{outside[0]}; correct them, or accept them with --allow_outside_paths"
        )


def _from_table(path: Path, label: str, options: DataOptions) -> list[tuple[str, str]]:
    """Pairs of a CSV, JSONL or JSON file; `label` says in messages where the file was named."""
    readers = {".jsonl": _json_lines_records, ".ndjson": _json_lines_records, ".json": _json_records}
    records = list(readers.get(path.suffix.lower(), _csv_records)(_text(path, label), label))
    if not records:
        raise UserError(f"{label}: the file is empty; it needs a record for every clip")
    for place, record in records:
        if not isinstance(record, dict):
            raise UserError(f'{place}: not a JSON object; write {{"video": "1.mp4", "text": "a caption"}}')
    known = list(dict.fromkeys(name for _, record in records for name in record))
    video = _column("--video_column", options.video_column, known, label)
    caption = _column("--caption_column", options.caption_column, known, label)
    # A record that lacks a value has an empty one; the clip itself is then named as unusable later on.
    return [
        (_string(record.get(video), video, place).strip(), _one_line(_string(record.get(caption), caption, place)))
        for place, record in records
    ]


def _csv_records(text: str, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            # Cells beyond the last column stand under None. Dropping them would cut captions at their first comma.
            if "".join(row.pop(None, None) or ()).strip():
                raise UserError(f"{label}, line {reader.line_num}: more cells than columns; quote text with commas")
            yield f"{label}, line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{label}, line {reader.line_num}: not a readable CSV: {error}") from error


def _json_lines_records(text: str, label: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(text), start=1):
        if line:
            place = f"{label}, line {number}"
            yield place, _json(line, place, "write one JSON object a line")


def _json_records(text: str, label: str) -> Iterator[tuple[str, Any]]:
    remedy = "a .json file is one list of objects; a file of one object a line ends in .jsonl"
    content = _json(text, label, remedy) if text.strip() else []
    if not isinstance(content, list):
        raise UserError(f"{label}: not a list; {remedy}")
    yield from ((f"{label}, record {number}", item) for number, item in enumerate(content, start=1))


def _json(text: str, place: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not readable JSON: {error}; {remedy}") from error


def _column(flag: str, name: str, known: list[str], label: str) -> str:
    """The column that a flag names, or the first usual one that exists where the flag was left alone."""
    usual = USUAL_COLUMNS[flag]
    names = usual if name == usual[0] else (name,)
    for candidate in names:
        if candidate in known:
            return candidate
    others = f" (nor {' or '.join(names[1:])})" if names[1:] else ""
    raise UserError(
        f"{flag} {name}: {label} has no such column{others}; it has {', '.join(known) or 'none'}{nearest(name, known)}"
    )


def _string(value: Any, column: str, place: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{place}: {column} holds {json.dumps(value)[:80]}; it must be text in quotes")


def _from_text_files(root: Path, columns: dict[str, str]) -> list[tuple[str, str]]:
    captions, videos = (_list_file(root, columns[flag], flag) for flag in USUAL_FILES)
    prompts_lines, videos_lines = (_lines(_text(path, str(path))) for path in (captions, videos))
    if len(prompts_lines) != len(videos_lines):
        raise UserError(
            f"{captions} has {len(prompts_lines)} lines and {videos} has {len(videos_lines)}; they must be equal, "
            "one line a clip (a caption must not contain a line break)"
        )
    if not videos_lines:
        raise UserError(f"--data_root {root}: {captions.name} and {videos.name} are empty; write one line a clip")
    return list(zip(videos_lines, prompts_lines, strict=True))


def _find_list(root: Path, name: str, flag: str) -> Path | None:
    """The text file that a flag names, or the first usual one that exists where the flag was left alone."""
    names = USUAL_FILES[flag] if name == USUAL_COLUMNS[flag][0] else (name,)
    return next((root / candidate for candidate in names if (root / candidate).is_file()), None)


def _list_file(root: Path, name: str, flag: str) -> Path:
    path = _find_list(root, name, flag)
    if path is None:
        wanted = " or ".join(USUAL_FILES[flag]) if name == USUAL_COLUMNS[flag][0] else name
        raise UserError(f"{flag} {name}: {root} has no {wanted}{_what_is_there(root)}")
    return path


def _what_is_there(root: Path) -> str:
    """Half a sentence that lists the folder, and says how to name a list that has another name."""
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    tables = [name for name in names if name.lower().endswith((".csv", ".jsonl", ".ndjson", ".json"))]
    hint = f"for {tables[0]} give --dataset_file {tables[0]}" if tables else ""
    hint = hint or "--caption_column and --video_column name the text files where they have other names"
    return f"; the folder has {', '.join(names[:10]) or 'nothing'}{more}; {hint}"


def _from_sidecars(root: Path) -> list[tuple[str, str]]:
    """Every video in the folder, with the text of the .txt file beside it."""
    videos = sorted(_video_files(root), key=lambda path: _natural_order(path.relative_to(root)))
    sidecars = [video.with_suffix(".txt") for video in videos]
    captions = [_one_line(_text(path, str(path))) if path.is_file() else None for path in sidecars]
    if all(caption is None for caption in captions):
        raise UserError(
            f"--data_root {root}: no data set found: neither prompts.txt with videos.txt, nor metadata.jsonl, nor "
            f"metadata.csv, nor a .txt of the same name beside any of the {len(videos)} videos{_what_is_there(root)}"
        )
    return [(path.relative_to(root).as_posix(), text or "") for path, text in zip(videos, captions, strict=True)]


def _video_files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    here = folder.resolve()
    if here in above:  # links are followed; one that leads to a folder above it would never end
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _video_files(path, above | {here})
        elif VIDEO_ENDING.fullmatch(path.suffix):
            yield path


def _natural_order(path: Path) -> tuple[list[list[str | int]], str]:
    """Sorting key in which clip, clip2 and clip10 follow each other; the path itself tells 1 from 01."""
    parts = path.with_suffix("").parts
    pieces = [re.split(r"(\d+)", part.casefold()) for part in parts]  # text and digits in turn
    return [[int(text) if index % 2 else text for index, text in enumerate(part)] for part in pieces], str(path)


def _text(path: Path, label: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{label}: not UTF-8 text; save it as UTF-8: {error}") from error


def _lines(text: str) -> list[str]:
    """Lines, stripped; empty lines at the end do not count."""
    # Not splitlines(): it also breaks at characters such as U+2028, which shifts all captions that follow.
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _one_line(text: str) -> str:
    # Half an emoji, as a cut JSON escape leaves it, cannot be encoded and would stop every later reader.
    return " ".join(text.split()).encode(errors="replace").decode()

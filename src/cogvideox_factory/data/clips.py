"""Reads what a user wrote down (two text files, or a CSV) into a list of clips.

Only lists are read here, no video is opened. What is wrong with the data set as a whole is a UserError; what is
wrong with one clip is found when that clip is looked at.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from cogvideox_factory.config import DataOptions, UserError, nearest


@dataclass(frozen=True)
class Clip:
    """A video file and what it shows."""

    path: Path
    source: str  # the path as the data set writes it
    caption: str


def read_clips(options: DataOptions) -> list[Clip]:
    """Clips of a data set, in its order.

    Raises UserError where the folder or a list is missing, numbers of prompts and videos differ, or a column does
    not exist.
    """
    root = options.data_root
    if root is None or not root.is_dir():
        raise UserError(f"--data_root {root}: no such folder")
    pairs = _from_csv(root, options) if options.dataset_file else _from_text_files(root, options)
    prefix = f"{options.id_token} " if options.id_token else ""
    return [Clip(root / source, source, prefix + caption if caption else "") for source, caption in pairs]


def _from_csv(root: Path, options: DataOptions) -> list[tuple[str, str]]:
    path = options.dataset_file
    assert path is not None
    if (root / path).is_file():
        path = root / path
    if not path.is_file():
        raise UserError(f"--dataset_file {path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            for flag, column in (
                ("--video_column", options.video_column),
                ("--caption_column", options.caption_column),
            ):
                if column not in columns:
                    raise UserError(
                        f"{flag} {column}: {path} has no such column; it has {', '.join(columns) or 'none'}"
                        f"{nearest(column, columns)}"
                    )
            rows = [(row[options.video_column], row[options.caption_column]) for row in reader]
    except UnicodeDecodeError as error:
        raise UserError(f"--dataset_file {path}: not UTF-8 text: {error}") from error
    except csv.Error as error:
        raise UserError(f"--dataset_file {path}: not a readable CSV: {error}") from error
    # A short row has None for what is missing; the clip itself is then named as unusable later on.
    return [((video or "").strip(), (caption or "").strip()) for video, caption in rows]


def _from_text_files(root: Path, options: DataOptions) -> list[tuple[str, str]]:
    # The flags' defaults are names of CSV columns; guides call the two files prompts.txt or prompt.txt and videos.txt.
    captions = _list_file(root, options.caption_column, "text", "--caption_column", ("prompts.txt", "prompt.txt"))
    videos = _list_file(root, options.video_column, "video", "--video_column", ("videos.txt", "video.txt"))
    prompts_lines, videos_lines = _lines(captions), _lines(videos)
    if len(prompts_lines) != len(videos_lines):
        raise UserError(
            f"{captions} has {len(prompts_lines)} lines and {videos} has {len(videos_lines)}; they must be equal, "
            "one line a clip (a caption must not contain a line break)"
        )
    return list(zip(videos_lines, prompts_lines, strict=True))


def _list_file(root: Path, name: str, column_default: str, flag: str, usual: tuple[str, ...]) -> Path:
    """The text file that a flag names, or the first usual one that exists where the flag was left alone."""
    names = usual if name == column_default else (name,)
    for candidate in names:
        if (root / candidate).is_file():
            return root / candidate
    present = sorted(path.name for path in root.glob("*.txt"))
    csv_files = sorted(path.name for path in root.glob("*.csv"))
    hint = f"; the folder has {', '.join(present)} ({flag} names the file)" if present else ""
    hint += f"; for {csv_files[0]} give --dataset_file {csv_files[0]}" if csv_files else ""
    raise UserError(f"{root} has no {' or '.join(names)}{hint}")


def _lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, stripped; empty lines at its end do not count."""
    try:
        # Not splitlines(): it also breaks at characters such as U+2028, which shifts all captions that follow.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    return lines

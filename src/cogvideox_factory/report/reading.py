"""A run folder as the report shows it. A missing file is nothing yet; a damaged one is a note, and never fatal."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cogvideox_factory.config import UserError

Entries = list[dict[str, Any]]  # lines of a .jsonl file
SampleKey = tuple[str, str, int]  # prompt, seed, how many of the same came before it in prompts.json
VideosByStep = dict[int, bytes]  # optimizer step → content of the mp4 file


@dataclass(frozen=True)
class Run:
    """What a run folder holds so far."""

    folder: Path
    config: dict[str, Any]
    versions: dict[str, Any]  # of what the run was made with
    metrics: Entries
    held_out: Entries
    memory: dict[str, Any]
    samples: dict[SampleKey, VideosByStep]
    prepared: Path  # the set that it was trained on
    clips: Entries
    preparation: dict[str, Any]
    skipped_steps: Entries
    notes: list[str]  # what could not be read; shown among the problems

    @property
    def last(self) -> dict[str, Any]:
        """The line of the last finished step."""
        return self.metrics[-1] if self.metrics else {}


def read_run(folder: Path) -> Run:
    """Raises UserError where there is no run; the rest of a folder may be missing or damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the --output_dir of a training run")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no run: there is no config.yaml; name the --output_dir of a training run")
    notes: list[str] = []
    config = _read_config(folder / "config.yaml")
    is_prepared_elsewhere = config.get("load_tensors") is True and config.get("data_root")
    prepared = Path(str(config["data_root"])) if is_prepared_elsewhere else folder / "prepared"
    preparation = _read_json(prepared / "report.json", dict, notes) or {}
    clips, skipped_steps = (
        _read_lines(path, notes) for path in (prepared / "index.jsonl", folder / "skipped_steps.jsonl")
    )
    _drop(clips, "bucket", _is_size, "index.jsonl", notes)
    _drop(skipped_steps, "clips", lambda names: isinstance(names, list), "skipped_steps.jsonl", notes)
    _drop([preparation], "skipped", _are_objects, "report.json", notes)
    return Run(
        folder=folder,
        config=config,
        versions=_read_json(folder / "versions.json", dict, notes) or {},
        metrics=_read_lines(folder / "metrics.jsonl", notes),
        held_out=_read_lines(folder / "validation_loss.jsonl", notes),
        memory=_read_json(folder / "memory.json", dict, notes) or {},
        samples=_read_samples(folder / "validation", notes),
        prepared=prepared,
        clips=clips,
        preparation=preparation,
        skipped_steps=skipped_steps,
        notes=notes,
    )


def _drop(entries: Entries, key: str, is_right: Callable[[Any], bool], file: str, notes: list[str]) -> None:
    """Drop values of a key that are not what the program writes there, with a note of how many."""
    wrong = [entry for entry in entries if entry.get(key) is not None and not is_right(entry[key])]
    for entry in wrong:
        del entry[key]
    if wrong:
        notes.append(f"{file}: damaged values of {key}, left out here: {len(wrong)}.")


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and [type(number) for number in value] == [int, int, int]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def finite(value: Any) -> float | None:
    """The value if it is a number that can be drawn: not missing, NaN or infinite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e30 else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not the config.yaml of a run: it holds no mapping of options")
    return config


def _parse(text: str, kind: type) -> Any:
    """JSON of this kind, else None."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, kind) else None


def _read_json(path: Path, kind: type, notes: list[str]) -> Any:
    if not path.is_file():
        return None
    content = _parse(path.read_text("utf-8", errors="replace"), kind)
    if content is None:
        notes.append(f"{path} is damaged, so what it holds is missing here.")
    return content


def _read_lines(path: Path, notes: list[str]) -> Entries:
    """The JSON objects of a file that holds one a line."""
    if not path.is_file():
        return []
    # A last line without its line break may be half written, so it is no problem when it cannot be read.
    *lines, unfinished = path.read_text("utf-8", errors="replace").split("\n")
    entries = [_parse(line, dict) for line in lines]
    if None in entries:
        notes.append(f"{path}: damaged lines, left out here: {entries.count(None)}.")
    return [entry for entry in [*entries, _parse(unfinished, dict)] if entry is not None]


def _read_samples(folder: Path, notes: list[str]) -> dict[SampleKey, VideosByStep]:
    samples: dict[SampleKey, VideosByStep] = {}
    for step_folder in sorted(folder.glob("step-*")):
        entries = _read_json(step_folder / "prompts.json", list, notes)
        if entries is None or not re.fullmatch(r"step-\d+", step_folder.name):
            notes.append(f"validation/{step_folder.name} is not complete; its videos are left out.")
            continue
        seen: Counter[tuple[str, str]] = Counter()
        for entry in entries:
            details = entry if isinstance(entry, dict) else {}
            prompt, seed = str(details.get("prompt", "")), str(details.get("seed", ""))
            video = _read_video(step_folder, str(details.get("file", "")), notes)
            if video is not None:
                videos = samples.setdefault((prompt, seed, seen[prompt, seed]), {})
                videos[int(step_folder.name.removeprefix("step-"))] = video
            seen[prompt, seed] += 1
    return samples


def _read_video(folder: Path, file: str, notes: list[str]) -> bytes | None:
    """A video of this folder. A prompts.json from elsewhere must not pull other files into the page."""
    problem = "which is missing or cannot be read"
    try:
        path = (folder / file).resolve()
        if path.is_relative_to(folder.resolve()):
            return path.read_bytes()
        problem = "which is outside of its folder"
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        pass
    notes.append(f"validation/{folder.name}/prompts.json names {file!r}, {problem}; it was ignored.")
    return None

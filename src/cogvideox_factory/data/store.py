"""The prepared set on disk: what is in it, whether it still holds, reading and writing it.

    index.jsonl            one line a clip: source, caption, bucket, files, key
    settings.json          what all entries share: the encoders, the rate, the empty prompt's file
    report.json            what the last `prepare` did
    latents/KEY.safetensors    mean and logvar of the VAE's latent distribution, (channels, frames, height, width)
    prompts/KEY.safetensors    prompt_embeds, (tokens, width)

A tensor file is named after the hash of everything that its content depends on, so a file that exists is never
stale, two clips never share one by accident of name, and what a killed run has encoded is found by the next.
Every file is written under another name, flushed to the disk, and renamed: it is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from cogvideox_factory.config import RunError, UserError
from cogvideox_factory.data.buckets import Bucket


@dataclass(frozen=True)
class Entry:
    """A clip of a prepared set."""

    source: str
    caption: str
    bucket: Bucket
    files: Mapping[str, str]  # latents, prompt → path within the set
    key: str


class DamagedEntry(RunError):
    """A tensor file that cannot be read back; the message names it."""


def hash_of(*parts: Any) -> str:
    """Hex digest of JSON-able parts, short enough for a file name and long enough never to collide."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def hash_of_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error  # writing alone names no file
    finally:
        part.unlink(missing_ok=True)


def make_output_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Raises UserError where the folder cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be written to ({error.strerror or error}); choose another folder"
        ) from error


class PreparedSet:
    """A folder with a prepared set."""

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def latents_file(key: str) -> str:
        return f"latents/{key}.safetensors"

    @staticmethod
    def prompt_file(key: str) -> str:
        return f"prompts/{key}.safetensors"

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def write_tensors(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        write_durably(self.folder / file, save({name: value.contiguous().cpu() for name, value in tensors.items()}))

    def read_tensors(self, file: str) -> dict[str, torch.Tensor]:
        """Raises DamagedEntry where the file is missing or broken."""
        try:
            return load((self.folder / file).read_bytes())  # for files this small faster than mapping them
        except (OSError, SafetensorError) as error:
            raise DamagedEntry(f"{self.folder / file} cannot be read ({error}); delete it and prepare again") from error

    def write_index(self, entries: Iterable[Entry], settings: Mapping[str, Any]) -> None:
        """Make these entries the content of the set. Settings first: an index never stands without them."""
        self.write_json("settings.json", settings)
        lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries)
        write_durably(self.folder / "index.jsonl", lines.encode())

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_durably(self.folder / name, json.dumps(content, indent=2, ensure_ascii=False).encode())

    def read_settings(self) -> dict[str, Any]:
        """Raises UserError where this is no prepared set."""
        path = self.folder / "settings.json"
        if not (self.folder / "index.jsonl").is_file() or not path.is_file():
            raise UserError(
                f"{self.folder} is not a prepared set (no index.jsonl): run `prepare` first, or leave out "
                "--load_tensors to train on raw clips"
            )
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); run `prepare` again, nothing is encoded twice") from error

    def read_index(self) -> list[Entry]:
        """Entries of the set. Raises UserError where there are none, or the index is damaged."""
        self.read_settings()
        path = self.folder / "index.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            entries = [Entry(**{**line, "bucket": Bucket(*line["bucket"])}) for line in lines]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); run `prepare` again, nothing is encoded twice") from error
        if not entries:
            raise UserError(f"{path} lists no clip")
        return entries

"""The prepared set on disk: what is in it, whether it still holds, reading and writing it.

    index.jsonl            one line an excerpt of a clip: source, start, caption, bucket, files, key
    settings.json          what all entries share: the encoders, the rate, the empty prompt's file; the index's hash
    report.json            what the last `prepare` did
    latents/KEY.safetensors    mean and logvar of the VAE's latent distribution, (channels, frames, height, width)
    images/KEY.safetensors     image-to-video only: mean and logvar of noised first frames, (draws, channels, height,
                               width), and first, the mean without noise, (channels, height, width)
    prompts/KEY.safetensors    prompt_embeds, (tokens, width)

A tensor file is named after the hash of everything that its content depends on, so a file that exists is never
stale, two clips never share one by accident of name, and what a killed run has encoded is found by the next.
Every file is written under another name, flushed to the disk, and renamed: it is complete or absent.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from cogvideox_factory.config import RunError, UserError
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.files import hash_of_bytes, write_durably


@dataclass(frozen=True)
class Entry:
    """What training takes for one clip: an excerpt of a file, seen in one or more ways."""

    source: str
    caption: str
    bucket: Bucket
    # Paths within the set. latents: a file a view, of which every epoch draws one; images: as many, for
    # image-to-video; prompt: one.
    files: Mapping[str, tuple[str, ...]]
    key: str
    start: float = 0.0  # of the excerpt, in seconds from the first frame of the file

    @property
    def all_files(self) -> Iterator[str]:
        """Every file that the entry needs."""
        return itertools.chain(*self.files.values())


class DamagedEntry(RunError):
    """A tensor file that cannot be read back; the message names it."""


class PreparedSet:
    """A folder with a prepared set."""

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def latents_file(key: str) -> str:
        return f"latents/{key}.safetensors"

    @staticmethod
    def image_file(key: str) -> str:
        return f"images/{key}.safetensors"

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
        """Make these entries the content of the set.

        Settings first, so that an index never stands without them, and with the index's hash, so that a disk which
        fills up in between does not put the old entries under the new settings.
        """
        index = "".join(_as_json(asdict(entry)) + "\n" for entry in entries).encode()
        self.write_json("settings.json", {**settings, "index": hash_of_bytes(index)})
        write_durably(self.folder / "index.jsonl", index)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_durably(self.folder / name, _as_json(content, indent=2).encode())

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
        """Entries of the set. Raises UserError where there are none, or the index is damaged or not that of the
        settings."""
        settings = self.read_settings()
        path = self.folder / "index.jsonl"
        content = path.read_bytes()
        try:
            lines = [json.loads(line) for line in content.decode().split("\n") if line]
            entries = [_entry_from_json(line) for line in lines]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); run `prepare` again, nothing is encoded twice") from error
        if not entries:
            raise UserError(f"{path} lists no clip")
        if settings.get("index") != hash_of_bytes(content):
            raise UserError(
                f"{path} does not belong to the settings.json beside it: a `prepare` was cut short, or the file was "
                "edited; run `prepare` again, nothing is encoded twice"
            )
        return entries


def _as_json(content: Any, indent: int | None = None) -> str:
    """Readable where the text is UTF-8; a file name that is not is escaped, and read back as it was."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent)
    return text


def _entry_from_json(line: dict[str, Any]) -> Entry:
    files = {kind: tuple(names) for kind, names in line["files"].items()}
    return Entry(**{**line, "bucket": Bucket(*line["bucket"]), "files": files})

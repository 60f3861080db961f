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

Disks and copies damage files nonetheless, and safetensors does not notice a flipped bit in a tensor. Each file
therefore holds a seal in its metadata: the hash of its name and of all its bytes but the seal's own. Rejected: hashes
in the index; a killed run leaves no index, and the prompts of validation videos stand in none.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from cogvideox_factory.config import RunError, UserError
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.files import hash_of, hash_of_bytes, write_durably

HEADER_SIZE = 4096  # of a tensor file; its metadata comes first
SEAL = re.compile(rb'"seal":"([0-9a-f]{64})"')
UNSEALED = "0" * 64


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
        self._whole: set[str] = set()

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
        """Whether the file is there, in whatever state."""
        return (self.folder / file).is_file()

    def has_whole(self, file: str) -> bool:
        """Whether the file can be read; one that can is not read a second time."""
        if file not in self._whole:
            try:
                self._read_whole(file)
            except DamagedEntry:
                return False
            self._whole.add(file)
        return True

    def write_tensors(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        on_cpu = {name: value.contiguous().cpu() for name, value in tensors.items()}
        content = save(on_cpu, metadata={"seal": UNSEALED})
        start, end = _place_of_seal(content)
        seal = _seal(file, content, start, end).encode()
        write_durably(self.folder / file, b"".join((content[:start], seal, content[end:])))

    def read_tensors(self, file: str) -> dict[str, torch.Tensor]:
        """Raises DamagedEntry where the file is missing or broken, were it by a single bit."""
        return load(self._read_whole(file))

    def _read_whole(self, file: str) -> bytes:
        path = self.folder / file
        try:
            content = path.read_bytes()  # for files this small faster than mapping them
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        start, end = _place_of_seal(content)
        if content[start:end].decode() != _seal(file, content, start, end):
            raise _damaged(path, "its content is not what was written")
        return content

    def write_index(self, entries: Iterable[Entry], settings: Mapping[str, Any]) -> None:
        """Make these entries the content of the set.

        Settings first, so that an index never stands without them, and with the index's hash, so that a disk which
        fills up in between does not put the old entries under the new settings.
        """
        index = "".join(_as_json(asdict(entry)) + "\n" for entry in entries).encode()
        settings = {**settings, "index": hash_of_bytes(index)}
        self.write_json("settings.json", {**settings, "seal": hash_of(settings)})
        write_durably(self.folder / "index.jsonl", index)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_durably(self.folder / name, _as_json(content, indent=2).encode())

    def read_settings(self) -> dict[str, Any]:
        """Raises UserError where this is no prepared set."""
        path = self.folder / "settings.json"
        missing = [name for name in ("index.jsonl", path.name) if not (self.folder / name).is_file()]
        if missing:
            raise UserError(
                f"{self.folder} is not a prepared set (no {' and no '.join(missing)}): run `prepare` first, or leave "
                "out --load_tensors to train on raw clips"
            )
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            if settings.pop("seal", None) != hash_of(settings):
                raise ValueError("its content is not what was written")
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({error}), or of another version of this program; run `prepare` again"
            ) from error
        return settings

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


def _place_of_seal(content: bytes) -> tuple[int, int]:
    """Where the seal stands in a tensor file; an empty place where there is none."""
    found = SEAL.search(content, 0, HEADER_SIZE)
    return found.span(1) if found else (0, 0)


def _seal(file: str, content: bytes, start: int, end: int) -> str:
    """The hash of a file's name within the set and of its bytes, without those from `start` to `end`.

    SHA-256 has instructions of its own: 0.6 GB/s where BLAKE2b does 0.4, 7 ms for the latents of a clip of 49×480×720.
    """
    view = memoryview(content)
    digest = hashlib.sha256(file.encode())
    digest.update(view[:start])
    digest.update(view[end:])
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> DamagedEntry:
    return DamagedEntry(f"{path} cannot be read ({reason}); prepare again, which makes it anew")


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

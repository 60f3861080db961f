"""The list of a folder's files with sizes and hashes, by which damage is found: a file changed, cut short or missing.

It protects itself: it is valid only if it is, byte for byte, what this module writes for the files that it lists.
Rejected: checksums inside each file, which say nothing of a file that is missing, and trusting sizes alone, which a
disk that returns wrong bytes keeps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cogvideox_factory.data.files import write_durably

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Content:
    """What a file holds: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


def seal(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Flush everything in a folder, then write down what it holds; without a manifest it is not complete.

    `hashes` are SHA-256 of files, by their path within the folder, that are known from writing them: those files are
    not read again.
    """
    known = hashes or {}
    files: dict[str, Content] = {}
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            folders.append(path)
        elif name != MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                digest = known.get(name) or hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = Content(path.stat().st_size, digest)
    write_durably(folder / MANIFEST, _encode(files))
    for each in reversed(folders):
        flush_folder(each)


def read_manifest(folder: Path) -> dict[str, Content]:
    """Files that a sealed folder holds, by their path within it. Raises ValueError where the manifest is damaged, and
    OSError where it cannot be read."""
    content = (folder / MANIFEST).read_bytes()
    try:
        files = {name: Content(**values) for name, values in json.loads(content)["files"].items()}
        holds = content == _encode(files)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {error}") from error
    if not holds:
        raise ValueError(f"{MANIFEST} is damaged: its own hash is another")
    return files


def damage_of(folder: Path, names: Collection[str] | None = None, *, is_quick: bool = False) -> str | None:
    """What is wrong with a sealed folder, naming the file; None where all is as it was written.

    `names` are the only files to look at, if given. `is_quick` compares sizes and reads no content but the manifest's.
    Raises PermissionError for what may not be read: that says nothing of its content.
    """
    try:
        files = read_manifest(folder)
    except ValueError as error:
        return str(error)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except PermissionError:
        raise
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror or error})"
    for name, content in files.items():
        if names is not None and name not in names:
            continue
        try:
            damage = _damage_of_file(folder / name, content, is_quick)
        except FileNotFoundError:
            damage = "is missing"
        except PermissionError:
            raise
        except OSError as error:  # a broken disk
            damage = f"cannot be read ({error.strerror or error})"
        if damage:
            return f"{name} {damage}"
    missing = sorted(set(names or ()) - set(files))
    return f"{missing[0]} is not in {MANIFEST}" if missing else None


def flush_folder(folder: Path) -> None:
    """Make a new name in a folder last through a power cut (on systems where a folder can be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _damage_of_file(path: Path, content: Content, is_quick: bool) -> str | None:
    size = path.stat().st_size
    if size != content.size:
        return f"has {size} bytes of {content.size}"
    if is_quick:
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == content.sha256 else "is not what was written: its hash is another"


def _encode(files: Mapping[str, Content]) -> bytes:
    listed = {name: asdict(files[name]) for name in sorted(files)}
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return (json.dumps({"sha256": digest, "files": listed}, indent=2) + "\n").encode()

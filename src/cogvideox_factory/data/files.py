"""Files that are complete or absent, and names that are made of content.

Nothing that is read back is ever written in place: a killed process and a full disk leave the old file or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from cogvideox_factory.config import UserError

# An unfinished file of a living process is younger than this; an older one was left by a process that was killed.
UNFINISHED_SECONDS = 3600.0


def hash_of(*parts: Any) -> str:
    """Hex digest of JSON-able parts, short enough for a file name and long enough never to collide."""
    return hash_of_bytes(json.dumps(parts, sort_keys=True).encode())


def hash_of_bytes(content: bytes) -> str:
    """Hex digest of a content that is in memory."""
    return hashlib.sha256(content).hexdigest()[:32]


def hash_of_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # of this writer alone, on whatever machine it is
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


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left half written anywhere in a folder."""
    for part in folder.rglob(".*.part"):
        with contextlib.suppress(OSError):  # another process may do the same at this moment
            if part.stat().st_mtime < time.time() - UNFINISHED_SECONDS:
                part.unlink()


def make_output_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Raises UserError where the folder cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be written to ({error.strerror or error}); choose another folder"
        ) from error

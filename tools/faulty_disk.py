"""A disk that is slow, or full, or at which the process is killed: for what is written into one folder.

It stands where Python and safetensors open files, in the process that is tried and nowhere else; the program knows
nothing of it. What is written goes to the real disk in pieces, so that a file can be caught half written.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

PIECE = 2048  # bytes: the tiny model's files have many pieces


@dataclass
class FaultyDisk:
    """What happens to writes into `folder`. `num_pieces` counts what was written, also where nothing else happens."""

    folder: Path
    seconds_a_piece: float = 0.0
    killed_at_piece: int | None = None
    full_from_piece: int | None = None
    num_pieces: int = 0

    def take(self) -> None:
        """A piece more, unless the disk is full."""
        if self.full_from_piece is not None and self.num_pieces >= self.full_from_piece:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.killed_at_piece is not None and self.num_pieces >= self.killed_at_piece:
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_pieces += 1
        if self.seconds_a_piece:
            time.sleep(self.seconds_a_piece)

    def holds(self, path: Any) -> bool:
        is_path = isinstance(path, str | os.PathLike)
        return is_path and Path(os.fspath(path)).absolute().is_relative_to(self.folder)

    def install(self) -> None:
        """From now on, for the rest of this process. It is not taken away again."""
        real_open, real_fsync = io.open, os.fsync

        def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wax") or not self.holds(file):
                return real_open(file, mode, *arguments, **options)
            raw = io.BufferedWriter(_Pieces(self, os.fspath(file), mode.replace("b", "").replace("t", "")))
            return raw if "b" in mode else io.TextIOWrapper(raw, **_of_text(arguments, options))

        def serialize_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
            content = safetensors.torch.serialize(tensors, metadata=metadata)
            with open_file(filename, "wb") as file:
                file.write(content)

        def fsync(descriptor: int) -> None:
            time.sleep(self.seconds_a_piece)
            real_fsync(descriptor)

        io.open = builtins.open = open_file  # type: ignore[assignment]
        os.fsync = fsync  # type: ignore[assignment]
        safetensors.torch.serialize_file = serialize_file


def _of_text(arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """What `open` is given of a text file: behind mode come buffering, encoding, errors and newline."""
    named = dict(zip(("buffering", "encoding", "errors", "newline"), arguments, strict=False)) | options
    return {name: named[name] for name in ("encoding", "errors", "newline") if name in named}


class _Pieces(io.FileIO):
    """A file that takes a piece at a time; whoever buffers goes on with the rest."""

    def __init__(self, disk: FaultyDisk, path: str, mode: str):
        super().__init__(path, mode)
        self.disk = disk

    def write(self, content: Any) -> int:
        self.disk.take()
        return super().write(memoryview(content).cast("B")[:PIECE]) or 0

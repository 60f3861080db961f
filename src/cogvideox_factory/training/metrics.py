"""What is written down while a run goes on: a line of metrics a step, and the memory of each phase."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from accelerate import Accelerator

from cogvideox_factory.data.files import write_durably

GIB = 1024**3


class MetricsLog:
    """metrics.jsonl of a run: one line an optimizer step, no gap and no repeat, also after a resume.

    Or another file of lines that have a step each. Written by the first rank only.
    """

    def __init__(
        self,
        run: Path,
        last_step: int,
        accelerator: Accelerator,
        name: str = "metrics.jsonl",
        also_to: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        """Lines after `last_step`, written by a run that died later than its checkpoint, are dropped. What is written
        goes to `also_to` too."""
        self._file: TextIO | None = None
        self._also_to = also_to
        self.kept: list[dict[str, Any]] = []  # lines that stand already
        if accelerator.is_main_process:
            path = run / name
            self.kept = [line for line in read_metrics(path) if line["step"] <= last_step]
            write_durably(path, "".join(json.dumps(line) + "\n" for line in self.kept).encode())
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # it writes once more what could not be written
                self._file.close()

    def write(self, **values: Any) -> None:
        if self._file:
            try:
                self._file.write(json.dumps(values, allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:  # writing alone names no file
                raise OSError(error.errno, error.strerror or str(error), self._file.name) from error
            if self._also_to:
                self._also_to(values)


def finite_or_none(value: float) -> float | None:
    """A value as JSON knows it: there is no NaN in it."""
    return value if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; one that was cut short by the end of a process, or damaged, is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                content = json.loads(line)
                if isinstance(content, dict) and isinstance(content.get("step"), int):
                    lines.append(content)
    return lines


class MemoryMeter:
    """Peak memory of each phase, in GiB: of the GPU where there is one, else of the process."""

    def __init__(self, device: torch.device, path: Path, planned: Mapping[str, float] | None = None):
        """`path` is the run's memory.json; what an earlier part of the run measured is kept. `planned` are the figures
        that were planned for a GPU, under the names of those measured."""
        self._is_cuda = device.type == "cuda"
        self._process = psutil.Process()
        self._peak = 0.0
        self._path = path
        self.planned = planned
        self.measured: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self.measured.update(json.loads(path.read_text())["measured"])
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            earlier = json.loads(path.read_text())["planned"]
            self.planned = {**earlier, **(planned or {})}

    def current(self) -> float:
        """What is in use, in GiB. Called once a step, it also follows the peak where the device does not."""
        held = torch.cuda.memory_allocated() if self._is_cuda else self._process.memory_info().rss
        self._peak = max(self._peak, held / GIB)
        return held / GIB

    def start_phase(self) -> None:
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._peak = 0.0
        self.current()

    def peak(self) -> float:
        """Peak since the phase started, in GiB. On a CPU: the highest of the moments looked at."""
        self.current()
        return max(self._peak, torch.cuda.max_memory_allocated() / GIB if self._is_cuda else 0.0)

    def record(self, name: str, value: float) -> None:
        """Keep the highest figure of a phase that comes several times."""
        self.measured[name] = max(round(value, 3), self.measured.get(name, 0.0))

    def write(self) -> None:
        kind = "GPU memory allocated" if self._is_cuda else "resident memory of the process"
        content = {"kind": kind, "unit": "GiB", "measured": self.measured, "planned": self.planned}
        write_durably(self._path, json.dumps(content, indent=2).encode())

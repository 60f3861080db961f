"""Where a run keeps its checkpoints and videos, and which of them belong to its present course."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from cogvideox_factory.data.manifest import MANIFEST

STEP_FOLDER = re.compile(r"step-\d{8}")


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


def validation_folder(run: Path, step: int) -> Path:
    return run / "validation" / f"step-{step:08}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; whether one was damaged since is not looked at."""
    return [path for path in step_folders(run / "checkpoints") if (path / MANIFEST).is_file()]


def set_aside_after(folder: Path, step: int) -> None:
    """Rename what lies in `folder` of later steps to left-step-N.

    It belongs to a course that was left when the run went on from before it: kept, but no longer counted.
    """
    for left in step_folders(folder):
        if step_of(left) > step:
            set_aside(left, "left")


def set_aside(folder: Path, why: str) -> Path:
    """Rename a step's folder to why-step-N, in the place of an earlier one of that name, and give that name."""
    kept_as = folder.with_name(f"{why}-{folder.name}")
    shutil.rmtree(kept_as, ignore_errors=True)
    os.replace(folder, kept_as)
    return kept_as


def step_folders(folder: Path) -> list[Path]:
    """Folders of steps, oldest first; copies and what was set aside do not count."""
    return sorted(path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name))

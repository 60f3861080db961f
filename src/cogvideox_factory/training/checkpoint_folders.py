"""Checkpoints as folders of a run: complete or absent, the newest whole one found again, the oldest removed."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from cogvideox_factory.config import UserError
from cogvideox_factory.data.manifest import MANIFEST, damage_of, flush_folder, seal
from cogvideox_factory.run_folder import (
    checkpoint_folder,
    list_checkpoints,
    set_aside,
    set_aside_after,
    step_folders,
)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def new_checkpoint(
    run: Path, step: int, keep: int | None = None, hashes: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """An empty folder to write a checkpoint into, whatever files and folders it consists of.

    When the block ends, all of it is flushed, listed in a manifest and renamed to the checkpoint of `step`; only then
    are the oldest beyond `keep` removed. When the block raises, the folder is removed and nothing has changed. One
    process enters it; where others write into the folder too, that process waits for them inside the block, before and
    after. `hashes`, which the block may fill, are of files that need not be read again: see `seal`.
    """
    folder = checkpoint_folder(run, step)
    part = _unfinished(folder)
    for unfinished in folder.parent.glob(".step-*.part"):  # of a run that died while it saved
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        seal(part, hashes)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # a full disk needs its space back
        raise
    if folder.exists():  # of an earlier course of this run, which went on from before it
        os.replace(folder, _unfinished(folder, "replaced"))
    os.replace(part, folder)
    set_aside_after(folder.parent, step)
    flush_folder(folder.parent)
    shutil.rmtree(_unfinished(folder, "replaced"), ignore_errors=True)
    whole = [path for path in list_checkpoints(run) if not damage_of(path, is_quick=True)]
    for old in whole[: -keep if keep else 0]:
        os.replace(old, _unfinished(old, "removed"))  # never half removed under its name
        shutil.rmtree(_unfinished(old, "removed"), ignore_errors=True)


def _unfinished(folder: Path, what: str = "new") -> Path:
    """The name under which a checkpoint is written or removed; what is left of it goes when the next one is saved."""
    return folder.with_name(f".{folder.name}.{what}.part")


def find_checkpoint(run: Path, choice: str) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, whole to the last bit; None for `latest` where there is none
    yet.

    All of it is read. `latest` takes the newest that is whole; damaged ones that are newer are kept under another name.
    Raises UserError where there is no such checkpoint, or where none is whole.
    """
    if choice == "latest":
        return _latest_whole(run)
    # The original's folders are given by name within the run, or as a path.
    for folder in (Path(choice), run / choice, run / "checkpoints" / choice):
        if (folder / MANIFEST).is_file() or (folder / "state.json").is_file():
            damage = _damage(folder)
            if damage:
                raise UserError(
                    f"--resume_from_checkpoint {choice}: {folder} is damaged: {damage}; take another, or `latest` for "
                    "the newest that is whole"
                )
            return folder
    names = [path.name for path in list_checkpoints(run)]
    raise UserError(
        f"--resume_from_checkpoint {choice}: no such checkpoint; {run} has {', '.join(names) or 'none'} "
        "(`latest` takes the newest)"
    )


def _latest_whole(run: Path) -> Path | None:
    damaged: dict[Path, str] = {}
    for folder in reversed(step_folders(run / "checkpoints")):
        damage = _damage(folder)
        if damage is None:
            break
        damaged[folder] = damage
    else:
        if damaged:
            if not any((folder / MANIFEST).exists() for folder in damaged):
                raise UserError(
                    f"--resume_from_checkpoint latest: no checkpoint of {run} has a {MANIFEST}: they are of an earlier "
                    "version, which this one does not go on from; start anew in another --output_dir"
                )
            listed = "; ".join(f"{folder.name}: {damage}" for folder, damage in damaged.items())
            raise UserError(
                f"--resume_from_checkpoint latest: every checkpoint of {run} is damaged ({listed}); put back a copy, "
                "or start anew in another --output_dir"
            )
        return None
    for bad, damage in damaged.items():
        kept_as = set_aside(bad, "damaged")
        logger.warning("checkpoint %s is damaged: %s; kept as %s", bad, damage, kept_as.name)
    if damaged:
        logger.warning("going on from %s, the newest that is whole", folder.name)
    return folder


def _damage(folder: Path) -> str | None:
    try:
        return damage_of(folder)
    except PermissionError as error:
        raise UserError(f"checkpoint {folder} may not be read: {error.filename}; mend its permissions") from error

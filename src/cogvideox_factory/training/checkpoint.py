"""Saving a training so that it goes on exactly where it stopped.

    checkpoints/step-00000500/
      pytorch_lora_weights.safetensors   of a LoRA: what diffusers loads, for trying out
      trainable.safetensors              the trained weights as the optimizer holds them (fp32 masters if any)
      ema.safetensors                    their moving average, where one is kept
      optimizer.safetensors, state.json  everything else that resumes
      manifest.json                      size and hash of each of these, by which damage is found

A checkpoint is written in a folder of another name, flushed and renamed: it is complete or absent. Rejected:
accelerate's `save_state`, which pickles the optimizer and the generators.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cogvideox_factory.config import UserError
from cogvideox_factory.data.files import write_durably
from cogvideox_factory.data.manifest import MANIFEST, damage_of, flush_folder, seal
from cogvideox_factory.data.sampler import Layout, Position
from cogvideox_factory.model.adapters import TRAINED_FILE, is_lora, save_lora, trainable_parameters
from cogvideox_factory.run_folder import (
    checkpoint_folder,
    list_checkpoints,
    set_aside,
    set_aside_after,
    step_folders,
)
from cogvideox_factory.training.ema import WeightAverage, averaged
from cogvideox_factory.training.fp32_steps import held_weights, set_weights
from cogvideox_factory.training.tensor_tree import flatten, unflatten

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that a resumed training needs besides tensors. `position` is that of the next step, in `layout`."""

    step: int = 0
    position: Position = field(default_factory=Position)
    samples_seen: int = 0
    identity: Mapping[str, Any] = field(default_factory=dict)  # what must not change: the base model, the adapter
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    order: Mapping[str, Any] = field(default_factory=dict)  # what the order of the clips depends on
    layout: Layout = field(default_factory=lambda: Layout(1))
    scaler: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: Path, state: TrainState, transformer, optimizer, keep: int | None, average: WeightAverage | None = None
) -> Path:
    """Write the checkpoint of `state.step`, then remove the oldest beyond `keep`."""
    with new_checkpoint(run, state.step, keep) as part:
        _write_checkpoint(part, state, transformer, optimizer, average)
    return checkpoint_folder(run, state.step)


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


def _write_checkpoint(part: Path, state: TrainState, transformer, optimizer, average: WeightAverage | None) -> None:
    if is_lora(transformer):  # full fine-tuning is tried out from the weights as they are, which are gigabytes
        with averaged(average):
            save_lora(transformer, part)
    if average:
        average.save(part)
    weights = held_weights(optimizer, trainable_parameters(transformer))
    _save_tensors({name: value.cpu() for name, value in weights.items()}, part / TRAINED_FILE)
    tensors, rest = flatten(optimizer.state_dict(), "state")
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    _save_tensors(tensors, part / "optimizer.safetensors")
    write_durably(part / "state.json", json.dumps({**asdict(state), "optimizer": rest}, indent=2).encode())


def read_state(folder: Path) -> TrainState:
    """What a checkpoint holds besides tensors. Raises UserError where it cannot be read."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        content.pop("optimizer")
        return _state_from_json(content)
    except Exception as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from error


def load_checkpoint(folder: Path, transformer, optimizer, average: WeightAverage | None = None) -> TrainState:
    """Put weights, optimizer and generators back, and give the rest.

    Raises UserError where the checkpoint is of another adapter or cannot be read. That it is of the same kind of
    optimizer is for the caller to see, from `read_state`.
    """
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        rest = content.pop("optimizer")
        state = _state_from_json(content)
        weights = load_file(folder / TRAINED_FILE)
        tensors = load_file(folder / "optimizer.safetensors")
        random_state, cuda_random_state = tensors.pop("rng.torch"), tensors.pop("rng.cuda", None)
        optimizer_state = unflatten(tensors, rest)
        averages = WeightAverage.read(folder) if average else None
    except Exception as error:  # safetensors raises its own kind for every sort of damage
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from error
    parameters = trainable_parameters(transformer)
    _compare(folder, weights, parameters)
    set_weights(optimizer, parameters, weights)
    if average:
        average.start_from(averages)
    torch.set_rng_state(random_state)
    if cuda_random_state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_random_state)
    optimizer.load_state_dict(optimizer_state)
    return state


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


def _state_from_json(content: Mapping[str, Any]) -> TrainState:
    position = content["position"]
    earlier = tuple((Layout(**layout), num_steps) for layout, num_steps in position["earlier"])
    return TrainState(
        **{
            **content,
            "position": Position(**{**position, "earlier": earlier}),
            "layout": Layout(**content["layout"]),
        }
    )


def _compare(folder: Path, weights: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError with the first difference between what is saved and what is trained."""
    for name in sorted(weights.keys() ^ parameters.keys()):
        where = "the checkpoint trains it, these settings do not" if name in weights else "not in the checkpoint"
        raise UserError(f"checkpoint {folder} is of other --target_modules or another model: {name}: {where}")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise UserError(
                f"checkpoint {folder} is of another --rank or another model: {name} is {list(weights[name].shape)} "
                f"there and {list(parameter.shape)} here"
            )


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())

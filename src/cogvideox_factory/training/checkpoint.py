"""Saving a training so that it goes on exactly where it stopped.

    checkpoints/step-00000500/
      pytorch_lora_weights.safetensors   of a LoRA: what diffusers loads, for trying out
      trainable.safetensors              the trained weights as the optimizer holds them (fp32 masters if any)
      ema.safetensors                    their moving average, where one is kept
      optimizer.safetensors, state.json  everything else that resumes

A checkpoint is written in a folder of another name, flushed and renamed: it is complete or absent. Rejected:
accelerate's `save_state`, which pickles the optimizer and the generators.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cogvideox_factory.config import UserError
from cogvideox_factory.data.files import write_durably
from cogvideox_factory.data.sampler import Layout, Position
from cogvideox_factory.model.adapters import TRAINED_FILE, is_lora, save_lora, trainable_parameters
from cogvideox_factory.run_folder import checkpoint_folder, list_checkpoints, set_aside_after
from cogvideox_factory.training.ema import WeightAverage, averaged
from cogvideox_factory.training.fp32_steps import held_weights, set_weights
from cogvideox_factory.training.tensor_tree import flatten, unflatten


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
    folder = checkpoint_folder(run, state.step)
    part = folder.with_name(f".{folder.name}.part")
    for unfinished in folder.parent.glob(".step-*.part"):  # of a run that died while it saved
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write_checkpoint(part, state, transformer, optimizer, average)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # a full disk needs its space back
        raise
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier course of this run, which went on from before it
    os.replace(part, folder)
    set_aside_after(folder.parent, state.step)
    _flush_folder(folder.parent)
    for old in list_checkpoints(run)[: -keep if keep else 0]:
        shutil.rmtree(old)
    return folder


def _write_checkpoint(part: Path, state: TrainState, transformer, optimizer, average: WeightAverage | None) -> None:
    part.mkdir(parents=True)
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
    """The checkpoint that --resume_from_checkpoint names; None for `latest` where there is none yet."""
    if choice == "latest":
        return next(iter(reversed(list_checkpoints(run))), None)
    # The original's folders are given by name within the run, or as a path.
    for folder in (Path(choice), run / choice, run / "checkpoints" / choice):
        if (folder / "state.json").is_file():
            return folder
    names = [path.name for path in list_checkpoints(run)]
    raise UserError(
        f"--resume_from_checkpoint {choice}: no such checkpoint; {run} has {', '.join(names) or 'none'} "
        "(`latest` takes the newest)"
    )


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


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut (on systems where a folder can be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

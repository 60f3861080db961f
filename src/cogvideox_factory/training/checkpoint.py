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

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cogvideox_factory.config import UserError
from cogvideox_factory.data.files import write_durably
from cogvideox_factory.data.sampler import Layout, Position
from cogvideox_factory.model.adapters import (
    AVERAGE_FILE,
    TRAINED_FILE,
    LoraContent,
    is_lora,
    lora_content,
    trainable_parameters,
    write_lora,
)
from cogvideox_factory.run_folder import checkpoint_folder
from cogvideox_factory.training.checkpoint_folders import new_checkpoint
from cogvideox_factory.training.ema import WeightAverage, averaged
from cogvideox_factory.training.fp32_steps import held_weights, set_weights
from cogvideox_factory.training.gathering import whole_shape
from cogvideox_factory.training.tensor_file import write_tensors
from cogvideox_factory.training.tensor_tree import flatten, unflatten

OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass
class TrainState:
    """Everything that a resumed training needs besides tensors. `position` is that of the next step, in `layout`."""

    step: int = 0
    position: Position = field(default_factory=Position)
    samples_seen: int = 0
    model: str = ""  # the base model's name as the user gave it
    identity: Mapping[str, Any] = field(default_factory=dict)  # what must not change: the base model, the adapter
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    order: Mapping[str, Any] = field(default_factory=dict)  # what the order of the clips depends on
    layout: Layout = field(default_factory=lambda: Layout(1))
    scaler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from: tensors by file and name, a LoRA as others load it, all else as JSON.

    The tensors are those of the training, which its next step changes, unless they were `copied`.
    """

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    lora: LoraContent | None
    state: bytes

    @classmethod
    def take(cls, state: TrainState, transformer, optimizer, average: WeightAverage | None = None) -> Snapshot:
        """The present state of a training."""
        lora = None
        if is_lora(transformer):  # full fine-tuning is tried out from the weights as they are, which are gigabytes
            with averaged(average):
                lora = lora_content(transformer)
        tensors, rest = flatten(optimizer.state_dict(), "state")
        tensors["rng.torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        of_files = {
            TRAINED_FILE: held_weights(optimizer, trainable_parameters(transformer)),
            OPTIMIZER_FILE: tensors,
            **({AVERAGE_FILE: average.by_name()} if average else {}),
        }
        content = json.dumps({**asdict(state), "optimizer": rest}, indent=2).encode()
        return cls(state.step, of_files, lora, content)

    @property
    def num_bytes(self) -> int:
        """What its copies take on the host."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._all())

    def copied(self) -> Snapshot:
        """The same, which no step changes: every tensor is copied to the host's memory."""
        tensors = {file: _copies(of_file) for file, of_file in self.tensors.items()}
        lora = self.lora and LoraContent(_copies(self.lora.weights), self.lora.metadata)
        return replace(self, tensors=tensors, lora=lora)

    def write(self, run: Path, keep: int | None) -> Path:
        """The checkpoint on disk, complete or absent; the oldest beyond `keep` are then removed."""
        hashes: dict[str, str] = {}
        with new_checkpoint(run, self.step, keep, hashes) as part:
            if self.lora:
                write_lora(self.lora, part)
            for file, tensors in self.tensors.items():
                hashes[file] = write_tensors(tensors, part / file)
            write_durably(part / "state.json", self.state)
        return checkpoint_folder(run, self.step)

    def _all(self) -> Iterator[torch.Tensor]:
        for of_file in (*self.tensors.values(), self.lora.weights if self.lora else {}):
            yield from of_file.values()


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
        tensors = load_file(folder / OPTIMIZER_FILE)
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
        if weights[name].shape != whole_shape(parameter):
            raise UserError(
                f"checkpoint {folder} is of another --rank or another model: {name} is {list(weights[name].shape)} "
                f"there and {list(whole_shape(parameter))} here"
            )


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

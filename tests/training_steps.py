"""A few optimizer steps of the training loop on prepared clips, without the command around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from cogvideox_factory.config import LoraOptions, MemoryOptions, MethodOptions, OptimizerOptions, Train
from cogvideox_factory.data.loader import PreparedClips, StepBatches
from cogvideox_factory.data.sampler import Position, Sampler
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.adapters import trainable_parameters
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.training import loop
from cogvideox_factory.training.fp32_steps import held_weights
from cogvideox_factory.training.optimizers import build_optimizer

SEED = 7
# Alphas and rates at which five steps move the weights far enough to see a wrong gradient.
LORA = LoraOptions(rank=4, lora_alpha=8)
OPTIMIZER = OptimizerOptions(learning_rate=1e-2)


@dataclass
class Course:
    """What a training went through."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Course)
            and self.losses == other.losses
            and self.norms == other.norms
            and self.weights.keys() == other.weights.keys()
            and all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())
        )


def steps_of(prepared: PreparedSet, entries: list[Entry], num_steps: int, accumulate: int = 1) -> Iterator[StepBatches]:
    """Steps of two clips a batch, always the same."""
    sampler = Sampler([entry.bucket for entry in entries], 2, num_micro_batches=accumulate, seed=SEED)
    clips = PreparedClips(prepared, entries, prepared.read_settings()["empty_prompt"], seed=SEED, caption_dropout=0.1)
    order = [(epoch, step) for epoch in range(num_steps) for step in sampler.epoch(epoch)]
    for epoch, step in order[:num_steps]:
        yield clips[Position(epoch), step]


def train(
    checkpoint: Checkpoint,
    prepared: PreparedSet,
    entries: list[Entry],
    memory: MemoryOptions,
    dtype: torch.dtype = torch.float32,
    *,
    training_type: Any = "lora",
    lora: LoraOptions = LORA,
    optimizer_options: OptimizerOptions = OPTIMIZER,
    num_steps: int = 5,
    accumulate: int = 1,
    device: torch.device | None = None,
    before_step: Callable[[int, Any], None] | None = None,
) -> Course:
    """Train with the loop's own functions. `before_step` is called with the step and the transformer."""
    options = Train(
        memory=memory,
        lora=lora,
        method=MethodOptions(training_type=training_type),
        optimizer=optimizer_options,
        seed=SEED,
    )
    accelerator = Accelerator(cpu=device is None or device.type == "cpu")
    transformer = loop.build_model(options, checkpoint, dtype, accelerator.device)
    trained = trainable_parameters(transformer)
    raw_optimizer = build_optimizer(
        list(trained.values()), options.optimizer, 2, in_backward=memory.optimizer_in_backward
    )
    model, optimizer = loop.wrap(accelerator, transformer, raw_optimizer)
    transformer.train()
    denoiser, scheduler, course = Denoiser(checkpoint, dtype), load_scheduler(checkpoint), Course()
    for number, step in enumerate(steps_of(prepared, entries, num_steps, accumulate)):
        if before_step:
            before_step(number, transformer)
        result = loop.optimizer_step(
            step, accelerator, model, optimizer, denoiser, scheduler, list(trained.values()), options
        )
        course.losses.append(result.loss)
        course.norms.append(result.grad_norm)
    course.weights = {name: value.clone().cpu() for name, value in held_weights(raw_optimizer, trained).items()}
    return course

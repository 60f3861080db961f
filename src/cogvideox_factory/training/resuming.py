"""Going on from a checkpoint: what must be the same, what may change, and where the training then stands.

The learning rate is a function of the step alone, so that nothing of the schedule is saved. Rejected: saving its state;
a run that is made longer on resume would take one more step at the rate of its old course.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cogvideox_factory.config import OptimizerOptions, Train, UserError
from cogvideox_factory.data.files import hash_of
from cogvideox_factory.data.sampler import Position, Sampler
from cogvideox_factory.data.store import Entry
from cogvideox_factory.model.adapters import identity_of
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.training.checkpoint import TrainState, load_checkpoint, read_state
from cogvideox_factory.training.checkpoint_folders import find_checkpoint
from cogvideox_factory.training.ema import WeightAverage
from cogvideox_factory.training.optimizers import build_schedule, keep_settings, optimizer_name, set_rate

logger = logging.getLogger(__name__)
BASE_MODEL = "base model"  # of an identity: told by the model's name, compared by its files, which may have moved
# Of the group of training options: what changes the course of a training that goes on.
TOLD_WHEN_CHANGED = ("caption_dropout", "noised_image_dropout", "mixed_precision")


def resume(
    options: Train,
    checkpoint: Checkpoint,
    transformer,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    entries: Sequence[Entry],
    sampler: Sampler,
    average: WeightAverage | None = None,
) -> TrainState:
    """The state of a new training, or that of the checkpoint which the options name, loaded into model and optimizer.

    Raises UserError where there is no such checkpoint, or where it is of another model or adapter.
    """
    assert options.output_dir is not None
    fresh = new_state(options, checkpoint, entries, sampler)
    choice = options.training.resume_from_checkpoint
    folder = _chosen(options.output_dir, choice, accelerator) if choice else None
    if folder is None:
        if choice:
            logger.info("no checkpoint in %s yet: starting from the beginning", options.output_dir)
        return fresh
    before = read_state(folder)
    check_identity(before, fresh, f"checkpoint {folder}")
    check_same_optimizer(before, options.optimizer, f"checkpoint {folder}")  # before its state is loaded
    settings = [dict(group) for group in optimizer.param_groups]
    saved = load_checkpoint(folder, transformer, optimizer, average)
    keep_settings(optimizer, settings)  # those of the options, not those of the checkpoint
    tell_optimizer_changes(saved, fresh)
    if accelerator.scaler and saved.scaler:
        accelerator.scaler.load_state_dict(dict(saved.scaler))
    logger.info("going on from %s", folder)
    position = resumed_position(saved, fresh, sampler)
    return dataclasses.replace(fresh, step=saved.step, samples_seen=saved.samples_seen, position=position)


def _chosen(run: Path, choice: str, accelerator: Accelerator) -> Path | None:
    """What the first rank finds, on every rank, or its error: it alone reads them, and renames damaged ones."""
    found: Path | None = None
    problem: Exception | None = None
    if accelerator.is_main_process:
        try:
            found = find_checkpoint(run, choice)
        except Exception as error:
            problem = error
    found, problem = broadcast_object_list([found, problem])
    if problem:
        raise problem
    return found


def new_state(options: Train, checkpoint: Checkpoint, entries: Sequence[Entry], sampler: Sampler) -> TrainState:
    """The state before the first step."""
    return TrainState(
        model=checkpoint.name,
        identity={
            BASE_MODEL: checkpoint.fingerprint("transformer"),
            **identity_of(options.method, options.lora),
            **{f"--{name}": value for name, value in dataclasses.asdict(options.conditioning).items()},
        },
        optimizer_options={
            **dataclasses.asdict(options.optimizer),
            **dataclasses.asdict(options.objective),
            "ema_decay": options.method.ema_decay,
            "quantize_base": options.memory.quantize_base,  # of what uses less memory the one that is felt
            **{name: getattr(options.training, name) for name in TOLD_WHEN_CHANGED},
        },
        order={"clips": hash_of([entry.key for entry in entries]), "seed": sampler.seed},
        layout=sampler.layout,
    )


def check_identity(saved: TrainState, fresh: TrainState, name: str) -> None:
    """Raises UserError, with every difference, where the saved weights are not of the model and method that the options
    ask for."""
    differing = [what for what, value in fresh.identity.items() if saved.identity.get(what) != value]
    if "--training_type" in differing:  # the other options are of one of the two
        differing = ["--training_type"]
    told = []
    for what in differing:
        there, here = saved.identity.get(what), fresh.identity[what]
        if what == BASE_MODEL and saved.model == fresh.model:
            told.append(f"another --pretrained_model_name_or_path {fresh.model}: its weights are not those of before")
            continue
        if what == BASE_MODEL:
            what, there, here = "base model (--pretrained_model_name_or_path)", saved.model, fresh.model
        told.append(f"another {what}: {_words(there)} there, {_words(here)} here")
    if told:
        raise UserError(f"{name} is of {'; '.join(told)}; give the same, or start anew in another --output_dir")


def _words(value: Any) -> str:
    return " ".join(value) or "none" if isinstance(value, list) else str(value)


def check_same_optimizer(saved: TrainState, options: OptimizerOptions, name: str) -> None:
    """Raises UserError where the saved state is of another optimizer than the options ask for."""
    known = {field.name for field in dataclasses.fields(OptimizerOptions)}
    values = {option: value for option, value in saved.optimizer_options.items() if option in known}
    theirs, ours = optimizer_name(OptimizerOptions(**values)), optimizer_name(options)
    if theirs != ours:
        raise UserError(
            f"--optimizer: {name} is of {theirs}, and these options are of {ours}, whose state is another; go on with "
            "the same, or start anew in another --output_dir"
        )


def tell_optimizer_changes(saved: TrainState, fresh: TrainState) -> None:
    changed = [
        f"--{option}"
        for option, value in fresh.optimizer_options.items()
        if saved.optimizer_options.get(option) != value
    ]
    if changed:
        logger.warning("from now on with another %s than before", ", ".join(changed))


def resumed_position(saved: TrainState, fresh: TrainState, sampler: Sampler) -> Position:
    """Where the sampler goes on: in the order in which it stopped, or with an epoch of a new order."""
    differing = [what for what, value in fresh.order.items() if saved.order.get(what) != value]
    if differing:
        logger.warning("%s differ from those of the checkpoint: going on with the next epoch", ", ".join(differing))
        stands_between_epochs = saved.position == Position(saved.position.epoch)
        return saved.position if stands_between_epochs else Position(saved.position.epoch + 1)
    if saved.layout != fresh.layout:
        logger.info("batches are made in another way than before: what is left of this epoch is divided anew")
    return sampler.take_over(saved.position, saved.layout)


def schedule_at(step: int, optimizer: torch.optim.Optimizer, options: OptimizerOptions, num_steps: int):
    """The schedule of a training of `num_steps`, with the optimizer at the rate of its step `step`, counted from 0."""
    schedule = build_schedule(optimizer, options, num_steps)
    schedule.last_epoch = step
    for group, rate, course in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        set_rate(group, rate * course(step))
    return schedule

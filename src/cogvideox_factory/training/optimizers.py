"""The optimizer, and the schedule of its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from cogvideox_factory.config import OptimizerOptions, UserError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], options: OptimizerOptions, clips_per_step: int
) -> torch.optim.Optimizer:
    """The optimizer that the options name; `clips_per_step` counts all ranks and accumulated batches."""
    return OPTIMIZERS[options.optimizer](
        parameters,
        lr=options.learning_rate * (clips_per_step if options.scale_lr else 1),
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
    )


def build_schedule(optimizer: torch.optim.Optimizer, options: OptimizerOptions, num_steps: int):
    """The learning rate over `num_steps` optimizer steps; `step()` is called once after each of them.

    diffusers' `constant` ignores the warm-up in silence; here a warm-up that is asked for takes place.
    """
    from diffusers.optimization import get_scheduler

    warms_up = options.lr_scheduler == "constant" and options.lr_warmup_steps > 0
    # A warm-up that fills the training leaves nothing to decay over, which diffusers' polynomial divides by.
    warms_up = warms_up or (options.lr_scheduler == "polynomial" and options.lr_warmup_steps >= num_steps)
    end_of_polynomial = 1e-7  # diffusers' own
    if options.lr_scheduler == "polynomial" and optimizer.defaults["lr"] <= end_of_polynomial:
        raise UserError(
            f"--learning_rate {optimizer.defaults['lr']:g}: must be more than {end_of_polynomial:g}, where "
            "--lr_scheduler polynomial ends"
        )
    return get_scheduler(
        "constant_with_warmup" if warms_up else options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )

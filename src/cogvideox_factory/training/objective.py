"""A batch of latents → a loss.

CogVideoX predicts the velocity v = sqrt(ᾱ)·ε − sqrt(1−ᾱ)·x₀ (Salimans and Ho, "Progressive Distillation", 2022,
Appendix D). The loss |x₀ − x̂₀|² / (1 − ᾱ) that other trainers of this model compute is the same number as |v − v̂|².

Noising, target and loss are in fp32: in bf16, ᾱ is rounded and some timesteps get no noise at all.
"""

from __future__ import annotations

import torch

from cogvideox_factory.data.loader import Batch
from cogvideox_factory.model.denoiser import Denoiser, pad_frames


def timesteps_from_quantiles(quantiles: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """Timesteps, (B,) int64, uniform over the schedule, from numbers in [0, 1)."""
    return (quantiles * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def velocity_loss(model, denoiser: Denoiser, scheduler, batch: Batch) -> torch.Tensor:
    """Mean squared error of the predicted velocity, (B,) fp32, a value a clip."""
    checkpoint = denoiser.checkpoint
    latents = pad_frames(batch.raw_latents * checkpoint.scaling_factor, checkpoint.latent_frame_multiple)
    timesteps = timesteps_from_quantiles(batch.timestep_quantiles, scheduler.config.num_train_timesteps)
    noisy_latents = scheduler.add_noise(latents, batch.noise, timesteps)
    target = scheduler.get_velocity(latents, batch.noise, timesteps)
    velocity = denoiser.predict(model, noisy_latents, timesteps, batch.prompt_embeds, batch.raw_image_latents)
    return (velocity - target).square().flatten(1).mean(1)

"""A batch of latents → a loss.

CogVideoX predicts the velocity v = sqrt(ᾱ)·ε − sqrt(1−ᾱ)·x₀ (Salimans and Ho, "Progressive Distillation", 2022,
Appendix D). The loss |x₀ − x̂₀|² / (1 − ᾱ) that other trainers of this model compute is the same number as |v − v̂|².

Noising, target and loss are in fp32: in bf16, ᾱ is rounded and some timesteps get no noise at all.
"""

from __future__ import annotations

import torch

from cogvideox_factory.config import ObjectiveOptions
from cogvideox_factory.data.loader import Batch
from cogvideox_factory.model.denoiser import Denoiser, pad_frames

PLAIN = ObjectiveOptions()  # all timesteps come equally often and weigh alike


def timesteps_from_quantiles(
    quantiles: torch.Tensor, num_train_timesteps: int, objective: ObjectiveOptions = PLAIN
) -> torch.Tensor:
    """Timesteps, (B,) int64, from the quantiles of their distribution, numbers in [0, 1).

    With logit_normal the place in the schedule is sigmoid(m + s·z) of a standard normal z (Esser et al., "Scaling
    Rectified Flow Transformers", 2024, Section 3.1); z is the normal quantile, so that one number a clip is drawn
    whatever the distribution.
    """
    places = quantiles
    if objective.timestep_sampling == "logit_normal":
        normal = torch.special.ndtri(quantiles.double())  # double: next to 1, fp32 has few numbers
        places = torch.sigmoid(objective.logit_mean + objective.logit_std * normal)
    return (places * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def min_snr_weights(scheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weights of the velocity's squared error, (B,) fp32: min(SNR, γ) / (SNR + 1) with SNR = ᾱ / (1 − ᾱ).

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023. Multiplied out, it divides by
    nothing: it is 0, not NaN, where ᾱ is 0 (the last timestep of a schedule with zero terminal SNR) or 1.
    """
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return torch.minimum(alphas, gamma * (1 - alphas)).float()


def velocity_loss(
    model, denoiser: Denoiser, scheduler, batch: Batch, objective: ObjectiveOptions = PLAIN
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, weighted as `objective` says: (B,) fp32, a value a clip."""
    checkpoint = denoiser.checkpoint
    latents = pad_frames(batch.raw_latents * checkpoint.scaling_factor, checkpoint.latent_frame_multiple)
    timesteps = timesteps_from_quantiles(batch.timestep_quantiles, scheduler.config.num_train_timesteps, objective)
    noisy_latents = scheduler.add_noise(latents, batch.noise, timesteps)
    target = scheduler.get_velocity(latents, batch.noise, timesteps)
    velocity = denoiser.predict(model, noisy_latents, timesteps, batch.prompt_embeds, batch.raw_image_latents)
    losses = (velocity - target).square().flatten(1).mean(1)
    if objective.snr_gamma is not None:
        losses = losses * min_snr_weights(scheduler, timesteps, objective.snr_gamma)
    return losses

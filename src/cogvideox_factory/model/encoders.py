"""Captions → embeddings, and pixels → the VAE's latent distribution.

`pixels` are what a video holds (uint8), `raw_latents` are in the VAE's own scale; `latents`, which the transformer
sees, are raw latents times the checkpoint's scaling factor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cogvideox_factory.config import UserError
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.progress import show_bars_of_diffusers

logger = logging.getLogger(__name__)

# Of the noise on the image that image-to-video models are conditioned on: the logarithm of its strength.
IMAGE_NOISE_LOG_MEAN, IMAGE_NOISE_LOG_STD = -3.0, 0.5


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizer and T5 of a checkpoint, used through the stock pipeline so that embeddings are the same to the bit."""

    pipeline: Any
    max_tokens: int
    device: torch.device

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        max_tokens: int | None,
        dtype: torch.dtype,
        device: torch.device,
        place: Callable[[Any, torch.device], Any] = torch.nn.Module.to,
    ) -> TextEncoder:
        """`place` brings the text encoder to the device."""
        from diffusers import CogVideoXPipeline

        show_bars_of_diffusers()
        pipeline = CogVideoXPipeline.from_pretrained(
            checkpoint.folder, transformer=None, vae=None, variant=checkpoint.variant, dtype=dtype
        )
        place(pipeline.text_encoder.requires_grad_(False), device)
        return cls(pipeline, max_tokens or checkpoint.max_text_tokens, device)

    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:
        """Embedding of one prompt, (tokens, width), in the encoder's type."""
        tell_if_cut(self.pipeline.tokenizer, prompt, self.max_tokens)
        embeds, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens,
            device=self.device,
        )
        return embeds[0]


@dataclass(frozen=True)
class VideoEncoder:
    """The encoder half of a checkpoint's VAE."""

    vae: Any

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        use_tiling: bool = False,
    ) -> VideoEncoder:
        return cls.of(load_vae(checkpoint, dtype).to(device), checkpoint, use_tiling=use_tiling)

    @classmethod
    def of(cls, vae: Any, checkpoint: Checkpoint, *, use_tiling: bool) -> VideoEncoder:
        """From a VAE that is loaded; it loses its decoder."""
        vae.decoder = None  # never used here, and half of the weights
        # A clip stays uint8 until the VAE takes a few frames, or a tile, of it: a quarter of the memory of fp32.
        vae.encoder.register_forward_pre_hook(_normalize_pixels)
        spare_memory(vae, checkpoint, use_slicing=False, use_tiling=use_tiling)
        return cls(vae)

    @torch.no_grad()
    def encode(self, pixels_FHWC: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the raw latents, (channels, frames, height, width), of one uint8 video."""
        return self.encode_tensor(torch.from_numpy(np.ascontiguousarray(pixels_FHWC)).to(self.vae.device))

    @torch.no_grad()
    def encode_tensor(self, pixels_FHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `encode`, of a tensor on the VAE's device."""
        distribution = self.vae.encode(pixels_FHWC.permute(3, 0, 1, 2)[None]).latent_dist
        return distribution.mean[0], distribution.logvar[0]

    @torch.no_grad()
    def encode_noised_images(
        self, pixels_HWC: np.ndarray, num_draws: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the raw latents, (draws, channels, height, width), of one uint8 image.

        Image-to-video models condition on their first frame with noise on its pixels, of a strength drawn anew each
        time: sigma = exp(N(-3, 0.5)), as CogVideoX was trained ("CogVideoX: Text-to-Video Diffusion Models with An
        Expert Transformer", 2024, and its official code).
        """
        pixels = to_unit_range(torch.from_numpy(np.ascontiguousarray(pixels_HWC)).to(self.vae.device))
        draws = []
        for _ in range(num_draws):
            sigma = torch.exp(IMAGE_NOISE_LOG_MEAN + IMAGE_NOISE_LOG_STD * torch.randn((), generator=generator))
            noise = torch.randn(pixels.shape, generator=generator)  # on the CPU: the same for every device
            noised = (pixels + (sigma * noise).to(pixels.device)).to(self.vae.dtype)
            draws.append(self.vae.encode(noised.permute(2, 0, 1)[None, :, None]).latent_dist)
        return (
            torch.cat([draw.mean[:, :, 0] for draw in draws]),
            torch.cat([draw.logvar[:, :, 0] for draw in draws]),
        )


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels from 0 … 255 to -1 … 1, in fp32."""
    return pixels.float().div_(127.5).sub_(1)


def _normalize_pixels(encoder: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What the VAE's encoder is called with, where that is uint8, in the encoder's type; rounded once."""
    pixels, *rest = arguments
    if pixels.dtype == torch.uint8:
        pixels = to_unit_range(pixels).to(next(encoder.parameters()).dtype)
    return pixels, *rest


def tell_if_cut(tokenizer, prompt: str, max_tokens: int) -> None:
    """Warn of a prompt of which the text encoder does not see the end."""
    num_tokens = len(tokenizer(prompt).input_ids)
    if num_tokens > max_tokens:
        logger.warning("a caption is cut at %d of its %d tokens: %s", max_tokens, num_tokens, prompt)


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype):
    """The VAE of a checkpoint, frozen."""
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(
        checkpoint.folder, subfolder="vae", variant=checkpoint.variant, dtype=dtype
    )
    follow_config(vae, checkpoint)
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def decode_image(vae, raw_latents: torch.Tensor) -> np.ndarray:
    """The picture, uint8 of shape (height, width, 3), of raw latents of shape (channels, height, width)."""
    frame = vae.decode(raw_latents[None, :, None]).sample[0, :, 0]
    return frame.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def follow_config(vae, checkpoint: Checkpoint) -> None:
    """Let the stock pipeline scale the latents of an image as the checkpoint's mapping says."""
    vae.register_to_config(invert_scale_latents=bool(checkpoint.vae.get("invert_scale_latents")))


def spare_memory(vae, checkpoint: Checkpoint, *, use_slicing: bool, use_tiling: bool) -> None:
    """Let a VAE work clip by clip and tile by tile.

    Raises UserError where its tiles do not add up: diffusers rounds the overlap in latents and in pixels apart, and
    then gives videos of another size than was asked for.
    """
    if use_slicing:
        vae.enable_slicing()
    if not use_tiling:
        return
    for tile, overlap in (
        (vae.tile_latent_min_height, vae.tile_overlap_factor_height),
        (vae.tile_latent_min_width, vae.tile_overlap_factor_width),
    ):
        step = int(tile * (1 - overlap))
        pixels = tile * checkpoint.spatial_factor
        if step * checkpoint.spatial_factor != pixels - int(pixels * overlap) or step != tile - int(tile * overlap):
            raise UserError(
                f"tiling does not work with the VAE of {checkpoint.name}: a tile of {tile} latents cannot overlap the "
                f"next by {overlap:.3f}; leave out --use_tiling and --enable_tiling"
            )
    vae.enable_tiling()

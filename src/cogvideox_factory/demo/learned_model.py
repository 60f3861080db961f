"""The tiny CogVideoX that has learned the demo's world: how it is built, and where it lies.

`tools/tiny_model` trains it; the weights, in half precision, are part of the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cogvideox_factory.data.files import write_durably
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.demo.world import NATIVE_SIZE

FOLDER = Path(__file__).with_name("weights")
LATENT_CHANNELS = 16  # as the published models have
MAX_TEXT_TOKENS = 32  # a caption has a dozen; the 226 of the published models would be most of the work


def build_vae():
    """Its video autoencoder, before it has learned anything."""
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # a group of one channel would lose its mean, and with it the colour of a plain picture
        sample_height=96,
        sample_width=160,
    )
    with torch.no_grad():  # starts with little noise on its latents, not with more noise than signal
        vae.encoder.conv_out.conv.bias[LATENT_CHANNELS:] = -5.0
    return vae


def build_pipeline(seed: int, vae: Any):
    """The whole pipeline around a VAE that has learned, before its transformer has."""
    frames, height, width = NATIVE_SIZE
    return build_tiny_pipeline(
        seed,
        vae=vae,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=32,
        max_text_seq_length=MAX_TEXT_TOKENS,
        sample_frames=frames,
        sample_height=height // 8,
        sample_width=width // 8,
    )


def copy_learned_model(folder: Path) -> None:
    """Write the pipeline that has learned to a folder, where stock diffusers loads it."""
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file():  # without its mode: an installation may be read-only, the copy is not
            write_durably(folder / path.relative_to(FOLDER), path.read_bytes())

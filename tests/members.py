"""The five published members of the CogVideoX family, as tiny models that differ from each other as those do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cogvideox_factory.demo.tiny_model import build_tiny_pipeline

_V1_5: dict[str, Any] = {
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 20,  # of the largest grid of positions, not of the videos
    "sample_width": 24,
    "vae_options": {"invert_scale_latents": True},
}
MEMBERS: dict[str, dict[str, Any]] = {
    "2b": {
        "use_rotary_positional_embeddings": False,
        "vae_options": {"scaling_factor": 1.15258426},
        "scheduler_options": {"snr_shift_scale": 3.0},
    },
    "5b": {},
    "5b-I2V": {"in_channels": 16, "use_learned_positional_embeddings": True},
    "1.5-5B": _V1_5,
    "1.5-5B-I2V": {**_V1_5, "in_channels": 16, "ofs_embed_dim": 64},
}
IMAGE_TO_VIDEO = ("5b-I2V", "1.5-5B-I2V")


def save_member(name: str, folder: Path) -> Path:
    """Write the tiny model of a member's name."""
    pipeline = build_tiny_pipeline(num_layers=2, **MEMBERS[name])
    patch_embed = pipeline.transformer.patch_embed
    if patch_embed.use_learned_positional_embeddings:  # they are made as sines; learning has changed them
        generator = torch.Generator().manual_seed(1)
        patch_embed.pos_embedding += torch.randn(patch_embed.pos_embedding.shape, generator=generator)
    pipeline.save_pretrained(folder)
    return folder

"""The text encoder layer by layer: T5-XXL is as large as the transformer, and works for a moment only."""

from __future__ import annotations

import torch

from cogvideox_factory.config import TextEncoderOptions
from cogvideox_factory.memory.block_swap import swap_blocks

# Layers of it on the GPU at a time: one that is computed, and one that is on its way.
RESIDENT_LAYERS = 2


def place_text_encoder(text_encoder, options: TextEncoderOptions, device: torch.device) -> None:
    """Put a T5 encoder, frozen and on the host, on a device: whole, or with its layers passing through."""
    if options.offload_text_encoder:
        swap_blocks(text_encoder, RESIDENT_LAYERS, device, blocks=text_encoder.encoder.block)
    else:
        text_encoder.to(device)

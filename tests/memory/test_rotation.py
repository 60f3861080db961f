"""Attention whose rotary positions are applied in parts, against the stock one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogvideox_factory.memory import rotation
from cogvideox_factory.memory.rotation import RotationInParts, rotate_in_parts
from cogvideox_factory.memory.tracker import MemoryTracker
from cogvideox_factory.model.denoiser import Denoiser, load_transformer
from cogvideox_factory.model.family import Checkpoint

CPU = torch.device("cpu")


def predict(transformer: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return transformer(
        hidden_states=torch.randn(2, 3, 8, 8, 12, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(2, 10, 32, generator=generator).to(dtype),
        timestep=torch.tensor([3, 700]),
        image_rotary_emb=Denoiser(checkpoint, dtype).rotary_embedding(3, 8, 12, CPU),
    ).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_are_the_stock_ones_to_the_bit(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    transformer = load_transformer(checkpoint, dtype)
    with torch.no_grad():
        expected = predict(transformer, checkpoint, dtype)
        rotate_in_parts(transformer)
        assert all(type(value) is RotationInParts for value in transformer.attn_processors.values())
        with pytest.MonkeyPatch.context() as patch:
            parts: list[int] = []

            def rotate(heads: torch.Tensor, positions: Any) -> torch.Tensor:
                parts.append(heads.shape[1])
                return apply(heads, positions)

            apply = rotation.apply_rotary_emb
            patch.setattr(rotation, "apply_rotary_emb", rotate)
            ours = predict(transformer, checkpoint, dtype)
        assert torch.equal(ours, expected)
        without = transformer(
            hidden_states=torch.ones(1, 3, 8, 8, 12, dtype=dtype),
            encoder_hidden_states=torch.ones(1, 10, 32, dtype=dtype),
            timestep=torch.tensor([3]),
        ).sample
    heads = transformer.config.num_attention_heads
    assert len(parts) > 1 and sum(parts) == 2 * heads * len(transformer.transformer_blocks)
    assert torch.isfinite(without).all() and not torch.equal(without, expected[:1])  # no positions: nothing is rotated
    assert not any(module._forward_hooks for module in transformer.modules())


def test_gradients_are_the_stock_ones(checkpoint: Checkpoint) -> None:
    gradients = []
    for in_parts in (False, True):
        transformer = load_transformer(checkpoint, torch.float32).requires_grad_(True)
        if in_parts:
            rotate_in_parts(transformer)
        predict(transformer, checkpoint, torch.float32).square().sum().backward()
        gradients.append([value.grad for value in transformer.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@torch.no_grad()
def test_less_lives_at_the_highest_moment(checkpoint: Checkpoint) -> None:
    transformer = load_transformer(checkpoint, torch.bfloat16)
    attention = transformer.transformer_blocks[0].attn1
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    text, video = torch.zeros(2, 10, width).bfloat16(), torch.zeros(2, 2000, width).bfloat16()
    positions = (torch.ones(2000, 32), torch.zeros(2000, 32))
    peaks = []
    for in_parts in (False, True):
        if in_parts:
            rotate_in_parts(transformer)
        with MemoryTracker(CPU) as tracker:
            attention(video, encoder_hidden_states=text, image_rotary_emb=positions)
            peaks.append(tracker.peak)
    assert peaks[1] < 0.8 * peaks[0]

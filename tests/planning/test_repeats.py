"""Calls that are remembered count as traced ones."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from transformers import T5Config, T5EncoderModel

from cogvideox_factory.config import TextEncoderOptions
from cogvideox_factory.memory.text_encoder import place_text_encoder
from cogvideox_factory.planning.fakes import GPU, FakeTracker, build, fake_world
from cogvideox_factory.planning.repeats import remember_blocks, remember_calls


def make_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_height=96,
        sample_width=160,
    )


@pytest.mark.parametrize("is_tiled", [False, True])
def test_a_remembered_vae_takes_what_a_traced_one_takes(is_tiled: bool) -> None:
    counted = []
    for remembers in (False, True):
        with fake_world(), FakeTracker() as tracker, torch.no_grad():
            vae = build(make_vae, torch.float32).to(GPU)
            num_calls = 0
            trace = vae.decoder.forward

            def count(*args, trace=trace, **kwargs):
                nonlocal num_calls
                num_calls += 1
                return trace(*args, **kwargs)

            vae.decoder.forward = count
            if is_tiled:
                vae.enable_tiling()
            if remembers:
                remember_calls(vae.decoder, tracker)
            tracker.start_phase()
            video = vae.decode(torch.empty(1, 4, 11, 8, 14, device=GPU)).sample
            counted.append((tuple(video.shape), tracker.peak, tracker.current, num_calls))
    (*traced, all_calls), (*remembered, few_calls) = counted
    assert remembered == traced
    assert few_calls < all_calls


@pytest.mark.parametrize("passes_through", [False, True])
def test_remembered_blocks_take_what_traced_ones_take(passes_through: bool) -> None:
    """T5's first block makes the position bias that the others are given; weights may pass through the GPU."""
    config = T5Config(vocab_size=8, d_model=64, d_kv=16, d_ff=256, num_layers=5, num_heads=4, feed_forward_proj="gelu")
    counted = []
    for remembers in (False, True):
        with fake_world(), FakeTracker() as tracker, torch.no_grad():
            text_encoder = build(lambda: T5EncoderModel(config), torch.bfloat16)
            with tracker.part("weights"):
                place_text_encoder(text_encoder, TextEncoderOptions(offload_text_encoder=passes_through), GPU)
            tracker.add([*text_encoder.parameters()], "weights")
            num_calls = 0
            for block in text_encoder.encoder.block:

                def count(*args, trace=block.forward, **kwargs):
                    nonlocal num_calls
                    num_calls += 1
                    return trace(*args, **kwargs)

                block.forward = count
            if remembers:
                remember_blocks(text_encoder.encoder.block, tracker)
            tracker.start_phase()
            text_encoder(torch.zeros(1, 32, dtype=torch.int64, device=GPU))
            counted.append((dict(tracker.peak_parts), tracker.host_peak, tracker.current, num_calls))
    (*traced, all_calls), (*remembered, few_calls) = counted
    assert remembered == traced
    assert (all_calls, few_calls) == (5, 2)

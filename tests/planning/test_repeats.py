"""Calls that are remembered count as traced ones."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvideox_factory.planning.fakes import GPU, FakeTracker, build, fake_world
from cogvideox_factory.planning.repeats import remember_calls


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

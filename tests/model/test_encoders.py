"""The encoders give what stock diffusers gives: embeddings to the last bit, latents of pixels in [-1, 1]."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

from cogvideox_factory.config import ModelOptions, UserError
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.demo.world import PROMPTS
from cogvideox_factory.model.encoders import TextEncoder, VideoEncoder, load_vae, spare_memory
from cogvideox_factory.model.family import Checkpoint, open_checkpoint

CPU = torch.device("cpu")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LONG_PROMPT = " ".join(["a red square moving left"] * 60)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """A video of noise, in which every value from 0 to 255 occurs."""
    values = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    assert len(np.unique(values)) == 256
    return values


def stock_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae", dtype=dtype).eval()


def stock_latents(vae: AutoencoderKLCogVideoX, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of pixels that were brought to [-1, 1] in full precision."""
    scaled = torch.from_numpy(pixels.astype(np.float64) / 127.5 - 1).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        distribution = vae.encode(scaled.float().to(vae.dtype)).latent_dist
    return distribution.mean[0], distribution.logvar[0]


# --- captions ---


@TYPES
@pytest.mark.parametrize("prompt", [PROMPTS[0], "", "Zebras? Ünknown!", LONG_PROMPT])
def test_embedding_equals_the_stock_pipelines_to_the_last_bit(
    checkpoint: Checkpoint, tiny_model: Path, prompt: str, dtype: torch.dtype
) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model, dtype=dtype)
    with torch.no_grad():  # as in the pipeline's call; with gradients, other kernels round otherwise
        expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    embedding = TextEncoder.load(checkpoint, None, dtype, CPU).encode(prompt)
    assert embedding.dtype == dtype
    assert embedding.shape == (226, 32)
    assert torch.equal(embedding, expected[0])


@pytest.mark.parametrize("max_tokens", [1, 16, 226])
def test_number_of_tokens_is_the_one_asked_for(checkpoint: Checkpoint, tiny_model: Path, max_tokens: int) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            PROMPTS[0], do_classifier_free_guidance=False, max_sequence_length=max_tokens
        )
    embedding = TextEncoder.load(checkpoint, max_tokens, torch.float32, CPU).encode(PROMPTS[0])
    assert torch.equal(embedding, expected[0])
    assert embedding.shape[0] == max_tokens


def test_number_of_tokens_is_the_checkpoints_by_default(tmp_path: Path) -> None:
    build_tiny_pipeline(max_text_seq_length=24).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(tmp_path)))
    assert TextEncoder.load(checkpoint, None, torch.float32, CPU).encode("a red square").shape == (24, 32)


def test_text_encoder_is_frozen_and_nothing_else_is_loaded(checkpoint: Checkpoint) -> None:
    encoder = TextEncoder.load(checkpoint, None, torch.float32, CPU)
    assert not any(parameter.requires_grad for parameter in encoder.pipeline.text_encoder.parameters())
    assert not encoder.encode("a red square").requires_grad
    assert encoder.pipeline.transformer is None
    assert encoder.pipeline.vae is None


def test_text_encoder_has_no_dropout(checkpoint: Checkpoint) -> None:
    encoder = TextEncoder.load(checkpoint, None, torch.float32, CPU)
    assert not encoder.pipeline.text_encoder.training
    assert torch.equal(encoder.encode(PROMPTS[1]), encoder.encode(PROMPTS[1]))


# --- pixels ---


@TYPES
def test_latents_equal_those_of_the_stock_vae(
    checkpoint: Checkpoint, tiny_model: Path, pixels: np.ndarray, dtype: torch.dtype
) -> None:
    encoder = VideoEncoder.load(checkpoint, dtype, CPU)
    mean, logvar = encoder.encode(pixels)
    expected_mean, expected_logvar = stock_latents(stock_vae(tiny_model, dtype), pixels)
    assert mean.dtype == logvar.dtype == dtype
    assert mean.shape == logvar.shape == (8, 3, 4, 6)
    # In bf16 equal to the bit: pixels are rounded once. In fp32 a division may differ in the last bit.
    tolerance = 0 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(logvar, expected_logvar, rtol=0, atol=tolerance)


@TYPES
def test_the_vae_sees_every_pixel_value_rounded_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    encoder = VideoEncoder.load(checkpoint, dtype, CPU)
    seen: list[torch.Tensor] = []
    forward = encoder.vae.encoder.forward

    def spy(pixels: torch.Tensor, **caches: Any) -> Any:
        seen.append(pixels.clone())
        return forward(pixels, **caches)

    monkeypatch.setattr(encoder.vae.encoder, "forward", spy)
    values = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (1, 1, 1, 3))
    encoder.encode(values)
    exact = torch.arange(256, dtype=torch.float64).reshape(16, 16) / 127.5 - 1
    assert seen[0].shape == (1, 3, 1, 16, 16)
    tolerance = 0.0 if dtype == torch.bfloat16 else 1e-7
    for channel in seen[0][0, :, 0]:
        torch.testing.assert_close(channel, exact.float().to(dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("frames", [8, 9, 16, 17])
def test_every_frame_counts(checkpoint: Checkpoint, tiny_model: Path, frames: int) -> None:
    pixels = np.random.default_rng(frames).integers(0, 256, (frames, 16, 32, 3), dtype=np.uint8)
    mean, _ = VideoEncoder.load(checkpoint, torch.float32, CPU).encode(pixels)
    expected, _ = stock_latents(stock_vae(tiny_model, torch.float32), pixels)
    assert mean.shape == (8, (frames + 3) // 4, 2, 4)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-5)
    changed = pixels.copy()
    changed[-1] = 255 - changed[-1]
    other, _ = VideoEncoder.load(checkpoint, torch.float32, CPU).encode(changed)
    assert not torch.allclose(other[:, -1], mean[:, -1])


def test_pixels_are_left_as_they_were(checkpoint: Checkpoint, pixels: np.ndarray) -> None:
    before = pixels.copy()
    VideoEncoder.load(checkpoint, torch.float32, CPU).encode(pixels)
    assert np.array_equal(pixels, before)


def test_tiling_is_that_of_the_stock_vae(checkpoint: Checkpoint, tiny_model: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    vae = stock_vae(tiny_model, torch.float32)
    whole, _ = stock_latents(vae, pixels)
    vae.enable_tiling()
    tiled, _ = stock_latents(vae, pixels)
    assert not torch.allclose(tiled, whole)  # else this size has but one tile
    ours, _ = VideoEncoder.load(checkpoint, torch.float32, CPU, use_tiling=True).encode(pixels)
    torch.testing.assert_close(ours, tiled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_on", [False, True])
def test_tiling_is_on_where_asked_for_and_only_there(checkpoint: Checkpoint, is_on: bool) -> None:
    tiling = VideoEncoder.load(checkpoint, torch.float32, CPU, use_tiling=is_on).vae
    assert (tiling.use_slicing, tiling.use_tiling) == (False, is_on)


def vae_of(checkpoint: Checkpoint, height: int, width: int) -> AutoencoderKLCogVideoX:
    """A VAE of random weights whose config names this size, from which its tiles follow."""
    config = {**checkpoint.vae, "sample_height": height, "sample_width": width}
    return AutoencoderKLCogVideoX.from_config(config).eval()


@torch.no_grad()
def sizes_through_tiles(vae: AutoencoderKLCogVideoX) -> tuple[list[int], list[int]]:
    """Latents of a frame of 64×96 pixels, and pixels of its 8×12 latents, height and width each."""
    vae.enable_tiling()
    latents = vae.encode(torch.zeros(1, 3, 1, 64, 96)).latent_dist.mean
    return list(latents.shape[3:]), list(vae.decode(torch.zeros(1, 8, 1, 8, 12)).sample.shape[3:])


@pytest.mark.parametrize(("height", "width"), [(96, 160), (96, 240)])
def test_tiling_is_accepted_where_its_tiles_add_up(checkpoint: Checkpoint, height: int, width: int) -> None:
    vae = vae_of(checkpoint, height, width)
    spare_memory(vae, checkpoint, use_slicing=False, use_tiling=True)
    assert vae.use_tiling
    assert sizes_through_tiles(vae) == ([8, 12], [64, 96])


def test_tiling_is_accepted_for_the_published_vaes(checkpoint: Checkpoint) -> None:
    vae = vae_of(checkpoint, 480, 720)
    spare_memory(vae, checkpoint, use_slicing=False, use_tiling=True)
    assert vae.use_tiling


@pytest.mark.parametrize(("height", "width"), [(64, 160), (96, 96), (64, 96)])
def test_tiling_is_refused_where_stock_tiles_give_another_size(checkpoint: Checkpoint, height: int, width: int) -> None:
    vae = vae_of(checkpoint, height, width)
    with pytest.raises(UserError, match="--use_tiling") as error:
        spare_memory(vae, checkpoint, use_slicing=False, use_tiling=True)
    assert checkpoint.name in str(error.value)
    assert not vae.use_tiling
    if width == 160:  # of the others, some tiles are too small for the VAE's kernels
        assert sizes_through_tiles(vae) != ([8, 12], [64, 96])
    spare_memory(vae, checkpoint, use_slicing=True, use_tiling=False)  # which has nothing to do with tiles
    assert vae.use_slicing


def test_video_encoder_holds_no_decoder_and_is_frozen(checkpoint: Checkpoint, pixels: np.ndarray) -> None:
    encoder = VideoEncoder.load(checkpoint, torch.float32, CPU)
    assert not any(name.startswith("decoder") for name, _ in encoder.vae.named_parameters())
    assert not any(parameter.requires_grad for parameter in encoder.vae.parameters())
    assert not encoder.encode(pixels)[0].requires_grad


@TYPES
def test_load_vae_gives_the_whole_frozen_vae_of_the_checkpoint(
    checkpoint: Checkpoint, tiny_model: Path, dtype: torch.dtype
) -> None:
    ours, theirs = load_vae(checkpoint, dtype), stock_vae(tiny_model, dtype)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(value.dtype == dtype and torch.equal(value, expected[name]) for name, value in state.items())


def test_encoders_take_the_weights_of_the_variant(tmp_path: Path) -> None:
    """Two sets of weights in one folder: --variant chooses, as in stock diffusers."""
    build_tiny_pipeline(seed=0).save_pretrained(tmp_path)
    other = build_tiny_pipeline(seed=1)
    other.vae.save_pretrained(tmp_path / "vae", variant="fp16")
    other.text_encoder.save_pretrained(tmp_path / "text_encoder", variant="fp16")
    checkpoint = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(tmp_path), variant="fp16"))
    name, weight = next(iter(other.vae.named_parameters()))
    assert torch.equal(dict(load_vae(checkpoint, torch.float32).named_parameters())[name], weight)
    with torch.no_grad():
        pipeline = CogVideoXPipeline.from_pretrained(tmp_path, variant="fp16")
        expected, _ = pipeline.encode_prompt("a red square", do_classifier_free_guidance=False)
    embedding = TextEncoder.load(checkpoint, None, torch.float32, CPU).encode("a red square")
    assert torch.equal(embedding, expected[0])
    default = TextEncoder.load(dataclasses.replace(checkpoint, variant=None), None, torch.float32, CPU)
    assert not torch.allclose(embedding, default.encode("a red square"))


def test_tiling_is_refused_where_stock_diffusers_would_give_another_size(checkpoint: Checkpoint) -> None:
    fits, does_not = load_vae(checkpoint, torch.float32), load_vae(checkpoint, torch.float32)
    does_not.tile_sample_min_height, does_not.tile_latent_min_height = 32, 4  # a sixth of 4 latents is no whole latent
    latents = torch.zeros(1, 8, 1, 12, 20)
    for vae in (fits, does_not):
        vae.enable_tiling()
    assert fits.decode(latents).sample.shape[3:] == (96, 160)
    assert does_not.decode(latents).sample.shape[3:] != (96, 160)  # the reason for the refusal
    spare_memory(fits, checkpoint, use_slicing=False, use_tiling=True)
    with pytest.raises(UserError, match="leave out --use_tiling and --enable_tiling"):
        spare_memory(does_not, checkpoint, use_slicing=False, use_tiling=True)

"""The transformer is given exactly what the stock CogVideoXPipeline gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_factory.config import ModelOptions
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler, load_transformer, pad_frames
from cogvideox_factory.model.family import Checkpoint, open_checkpoint

CPU = torch.device("cpu")
PROMPT = "a red square moving left"
FAMILY: dict[str, dict[str, Any]] = {
    "1.0-rotary": {},
    "1.0-sin-cos": {"use_rotary_positional_embeddings": False},
    "1.5": {"patch_size_t": 2, "patch_bias": False, "sample_height": 20, "sample_width": 24},
}
Open = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """A tiny checkpoint of each kind, made when first asked for."""
    made: dict[str, Checkpoint] = {}

    def get(kind: str) -> Checkpoint:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            build_tiny_pipeline(num_layers=2, **FAMILY[kind]).save_pretrained(folder)
            made[kind] = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(folder)))
        return made[kind]

    return get


class Spy:
    """Records what a transformer is called with, and what it answers."""

    def __init__(self, transformer: torch.nn.Module):
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[torch.Tensor] = []
        transformer.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
        assert not args
        self.inputs.append(kwargs)
        self.outputs.append(output[0])


# --- positions ---


@pytest.mark.parametrize(
    ("kind", "frames"),
    [("1.0-rotary", 1), ("1.0-rotary", 2), ("1.0-rotary", 5), ("1.0-rotary", 13), ("1.5", 2), ("1.5", 6), ("1.5", 22)],
)
@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(64, 96, id="native"),
        pytest.param(96, 64, id="portrait"),
        pytest.param(64, 64, id="square"),
        pytest.param(32, 96, id="wide"),
        pytest.param(160, 144, id="larger"),
        pytest.param(16, 16, id="one-patch"),
    ],
)
def test_rotary_embedding_equals_the_stock_pipelines(
    family: Open, kind: str, height: int, width: int, frames: int
) -> None:
    checkpoint = family(kind)
    pipeline = CogVideoXPipeline.from_pretrained(checkpoint.folder)
    expected = pipeline._prepare_rotary_positional_embeddings(height, width, frames, CPU)
    ours = Denoiser(checkpoint, torch.float32).rotary_embedding(frames, height // 8, width // 8, CPU)
    assert ours is not None
    for our_part, expected_part in zip(ours, expected, strict=True):
        assert torch.equal(our_part, expected_part)


@pytest.mark.parametrize("frames", [1, 5, 21])
def test_rotary_embedding_of_1_5_counts_half_a_patch_as_the_stock_pipeline_does(family: Open, frames: int) -> None:
    checkpoint = family("1.5")
    pipeline = CogVideoXPipeline.from_pretrained(checkpoint.folder)
    expected = pipeline._prepare_rotary_positional_embeddings(64, 96, frames, CPU)
    ours = Denoiser(checkpoint, torch.float32).rotary_embedding(frames, 8, 12, CPU)
    assert ours is not None
    assert torch.equal(torch.stack(ours), torch.stack(expected))


def test_rotary_embedding_of_1_0_differs_between_landscape_and_portrait(family: Open) -> None:
    """The crop is fitted to the clip: a test of the test's sizes above."""
    denoiser = Denoiser(family("1.0-rotary"), torch.float32)
    landscape, portrait = (denoiser.rotary_embedding(5, *size, CPU) for size in ((8, 12), (12, 8)))
    assert landscape is not None and portrait is not None
    assert landscape[0].shape == portrait[0].shape == (5 * 4 * 6, 32)
    assert not torch.allclose(landscape[0], portrait[0])


def test_sin_cos_models_get_no_rotary_embedding(family: Open) -> None:
    assert Denoiser(family("1.0-sin-cos"), torch.float32).rotary_embedding(5, 8, 12, CPU) is None


def test_rotary_embedding_is_of_this_checkpoint_also_after_another_was_asked(family: Open) -> None:
    """Grids are remembered: those of one model must not be handed to another."""
    first = Denoiser(family("1.0-rotary"), torch.float32).rotary_embedding(6, 8, 12, CPU)
    second = Denoiser(family("1.5"), torch.float32).rotary_embedding(6, 8, 12, CPU)
    again = Denoiser(family("1.0-rotary"), torch.float32).rotary_embedding(6, 8, 12, CPU)
    assert first is not None and second is not None and again is not None
    assert second[0].shape[0] * 2 == first[0].shape[0]  # two frames in a patch
    assert torch.equal(first[0], again[0])


# --- frames ---


@given(frames=st.integers(1, 30), multiple=st.integers(1, 5))
def test_padding_puts_copies_of_the_first_frame_before_the_clip(frames: int, multiple: int) -> None:
    latents = torch.arange(2 * frames * 12, dtype=torch.float32).reshape(2, frames, 3, 2, 2)
    padded = pad_frames(latents, multiple)
    missing = padded.shape[1] - frames
    assert padded.shape[1] % multiple == 0
    assert 0 <= missing < multiple
    assert torch.equal(padded[:, missing:], latents)
    for index in range(missing):
        assert torch.equal(padded[:, index], latents[:, 0])


@pytest.mark.parametrize(("frames", "multiple", "expected"), [(21, 2, 22), (20, 2, 20), (13, 1, 13), (1, 4, 4)])
def test_padded_number_of_frames(frames: int, multiple: int, expected: int) -> None:
    assert pad_frames(torch.zeros(1, frames, 1, 1, 1), multiple).shape == (1, expected, 1, 1, 1)


# --- the forward pass ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(FAMILY))
@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (48, 112)])
def test_transformer_is_called_as_the_stock_pipeline_calls_it(
    family: Open, kind: str, height: int, width: int, dtype: torch.dtype
) -> None:
    checkpoint = family(kind)
    pipeline = CogVideoXPipeline.from_pretrained(checkpoint.folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    theirs = Spy(pipeline.transformer)
    frames = 6 if kind == "1.5" else 5  # of latents: the stock pipeline rounds 17 frames of a video up to that
    latents = torch.randn(2, frames, 8, height // 8, width // 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    pipeline(
        prompt=[PROMPT, "a blue circle"],
        latents=latents,
        height=height,
        width=width,
        num_frames=17,
        num_inference_steps=1,
        guidance_scale=1,
        output_type="latent",
    )
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt([PROMPT, "a blue circle"], do_classifier_free_guidance=False)
        transformer = load_transformer(checkpoint, dtype)
        ours = Spy(transformer)
        timesteps = pipeline.scheduler.timesteps.expand(2)
        velocity = Denoiser(checkpoint, dtype).predict(transformer, latents.float(), timesteps, embeds.float())

    (expected,), (given_to_ours,) = theirs.inputs, ours.inputs
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        assert given_to_ours[name].dtype == expected[name].dtype, name
        assert torch.equal(given_to_ours[name], expected[name]), name
    if kind == "1.0-sin-cos":
        assert given_to_ours["image_rotary_emb"] is expected["image_rotary_emb"] is None
    else:
        for our_part, expected_part in zip(
            given_to_ours["image_rotary_emb"], expected["image_rotary_emb"], strict=True
        ):
            assert our_part.dtype == expected_part.dtype
            assert torch.equal(our_part, expected_part)
    # Whatever else either of them passes says nothing.
    rest = {"hidden_states", "encoder_hidden_states", "timestep", "image_rotary_emb", "return_dict"}
    assert not [name for call in (expected, given_to_ours) for name, v in call.items() if name not in rest and v]
    assert velocity.dtype == torch.float32
    assert velocity.shape == latents.shape
    assert torch.equal(velocity, theirs.outputs[0].float())


def test_each_clip_of_a_batch_has_its_own_timestep(checkpoint: Checkpoint) -> None:
    transformer = load_transformer(checkpoint, torch.float32)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 3, 8, 4, 6, generator=generator)
    embeds = torch.randn(2, 7, 32, generator=generator)
    denoiser = Denoiser(checkpoint, torch.float32)
    with torch.no_grad():
        together = denoiser.predict(transformer, latents, torch.tensor([10, 900]), embeds)
        for index, timestep in enumerate((10, 900)):
            part = slice(index, index + 1)
            alone = denoiser.predict(transformer, latents[part], torch.tensor([timestep]), embeds[part])
            torch.testing.assert_close(together[part], alone, rtol=1e-5, atol=1e-5)
        swapped = denoiser.predict(transformer, latents, torch.tensor([900, 10]), embeds)
    assert not torch.allclose(together, swapped, atol=1e-3)


def test_prediction_carries_the_gradient_in_fp32(checkpoint: Checkpoint) -> None:
    transformer = load_transformer(checkpoint, torch.bfloat16)
    weight = transformer.proj_out.weight.requires_grad_(True)
    latents, embeds = torch.randn(1, 3, 8, 4, 6), torch.randn(1, 7, 32)
    velocity = Denoiser(checkpoint, torch.bfloat16).predict(transformer, latents, torch.tensor([500]), embeds)
    velocity.square().mean().backward()
    assert velocity.dtype == torch.float32
    assert weight.grad is not None and weight.grad.abs().sum() > 0


# --- loading ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_load_transformer_gives_the_stock_weights_frozen(
    checkpoint: Checkpoint, tiny_model: Path, dtype: torch.dtype
) -> None:
    ours = load_transformer(checkpoint, dtype)
    expected = CogVideoXTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer", dtype=dtype)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    theirs = dict(expected.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(theirs)
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, theirs[name])


def test_load_transformer_takes_the_variant(tmp_path: Path) -> None:
    build_tiny_pipeline(seed=0, num_layers=1).save_pretrained(tmp_path)
    other = build_tiny_pipeline(seed=1, num_layers=1).transformer
    other.save_pretrained(tmp_path / "transformer", variant="fp16")
    for variant, is_other in ((None, False), ("fp16", True)):
        options = ModelOptions(pretrained_model_name_or_path=str(tmp_path), variant=variant)
        loaded = load_transformer(open_checkpoint(options), torch.float32)
        assert torch.equal(loaded.proj_out.weight, other.proj_out.weight) == is_other


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_load_scheduler_gives_the_checkpoints_class_and_schedule(tmp_path: Path, scheduler_class: Any) -> None:
    pipeline = build_tiny_pipeline(num_layers=1)
    pipeline.scheduler = scheduler_class.from_config({**pipeline.scheduler.config, "snr_shift_scale": 3.0})
    pipeline.save_pretrained(tmp_path)
    loaded = load_scheduler(open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(tmp_path))))
    assert type(loaded) is scheduler_class
    assert loaded.config.snr_shift_scale == 3.0
    assert torch.equal(loaded.alphas_cumprod, pipeline.scheduler.alphas_cumprod)

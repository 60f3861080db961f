"""The transformer is given exactly what the stock CogVideoXPipeline gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from hypothesis import given
from hypothesis import strategies as st
from members import IMAGE_TO_VIDEO, MEMBERS
from PIL import Image

from cogvideox_factory.config import ConditioningOptions, ModelOptions
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.model import encoders
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler, load_transformer, pad_frames
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning

CPU = torch.device("cpu")
PROMPT = "a red square moving left"
Open = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def family(member: Callable[[str], Path]) -> Open:
    return lambda name: open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(member(name))))


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
    [("5b", 1), ("5b", 2), ("5b", 5), ("5b", 13), ("1.5-5B", 2), ("1.5-5B", 6), ("1.5-5B", 22)],
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
    checkpoint = family("1.5-5B")
    pipeline = CogVideoXPipeline.from_pretrained(checkpoint.folder)
    expected = pipeline._prepare_rotary_positional_embeddings(64, 96, frames, CPU)
    ours = Denoiser(checkpoint, torch.float32).rotary_embedding(frames, 8, 12, CPU)
    assert ours is not None
    assert torch.equal(torch.stack(ours), torch.stack(expected))


def test_rotary_embedding_of_1_0_differs_between_landscape_and_portrait(family: Open) -> None:
    """The crop is fitted to the clip: a test of the test's sizes above."""
    denoiser = Denoiser(family("5b"), torch.float32)
    landscape, portrait = (denoiser.rotary_embedding(5, *size, CPU) for size in ((8, 12), (12, 8)))
    assert landscape is not None and portrait is not None
    assert landscape[0].shape == portrait[0].shape == (5 * 4 * 6, 32)
    assert not torch.allclose(landscape[0], portrait[0])


def test_sin_cos_models_get_no_rotary_embedding(family: Open) -> None:
    assert Denoiser(family("2b"), torch.float32).rotary_embedding(5, 8, 12, CPU) is None


def test_rotary_embedding_is_of_this_checkpoint_also_after_another_was_asked(family: Open) -> None:
    """Grids are remembered: those of one model must not be handed to another."""
    first = Denoiser(family("5b"), torch.float32).rotary_embedding(6, 8, 12, CPU)
    second = Denoiser(family("1.5-5B"), torch.float32).rotary_embedding(6, 8, 12, CPU)
    again = Denoiser(family("5b"), torch.float32).rotary_embedding(6, 8, 12, CPU)
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
@pytest.mark.parametrize("num_frames", [17, 16])
@pytest.mark.parametrize("size", [(64, 96), (96, 64)], ids=["native", "portrait"])
@pytest.mark.parametrize("name", list(MEMBERS))
def test_transformer_is_called_as_the_stock_pipeline_calls_it(
    family: Open, name: str, size: tuple[int, int], num_frames: int, dtype: torch.dtype
) -> None:
    """Trap: the number of frames guessed back from the latents: 16 and 17 frames are told apart."""
    height, width = size
    ignores_positions = name == "5b-I2V" and size != (64, 96)
    checkpoint = with_conditioning(family(name), ConditioningOptions(ignores_positions))
    takes_image = name in IMAGE_TO_VIDEO
    stock_class = CogVideoXImageToVideoPipeline if takes_image else CogVideoXPipeline
    pipeline = stock_class.from_pretrained(checkpoint.folder, dtype=dtype)
    if ignores_positions:  # what the model card tells users of such a LoRA to do
        pipeline.transformer.patch_embed.use_learned_positional_embeddings = False
    pipeline.set_progress_bar_config(disable=True)
    theirs = Spy(pipeline.transformer)
    frames = 6 if name.startswith("1.5") and num_frames == 17 else (num_frames - 1) // 4 + 1  # of latents
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, frames, 8, height // 8, width // 8, generator=generator).to(dtype)
    prompts = [PROMPT, "a blue circle"]
    pictures = [picture(height, width, seed) for seed in (1, 2)]
    pipeline(
        **({"image": pictures} if takes_image else {}),
        prompt=prompts,
        latents=latents,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=1,
        guidance_scale=1,
        generator=torch.Generator().manual_seed(3),  # of the sample of the image's latents
        output_type="latent",
    )
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        raw_image_latents = None
        if takes_image:
            pixels = pipeline.video_processor.preprocess(pictures, height=height, width=width).to(dtype)
            draws = torch.Generator().manual_seed(3)
            encoded = [pipeline.vae.encode(part[None, :, None]).latent_dist.sample(draws)[0, :, 0] for part in pixels]
            raw_image_latents = torch.stack(encoded).float()
        transformer = load_transformer(checkpoint, dtype)
        ours = Spy(transformer)
        timesteps = pipeline.scheduler.timesteps.expand(2)
        denoiser = Denoiser(checkpoint, dtype)
        velocity = denoiser.predict(transformer, latents.float(), timesteps, embeds.float(), raw_image_latents)

    (expected,), (given_to_ours,) = theirs.inputs, ours.inputs
    assert given_to_ours["hidden_states"].shape[2] == (16 if takes_image else 8)
    assert (given_to_ours["ofs"] is not None) == (name == "1.5-5B-I2V")
    for key in ("hidden_states", "encoder_hidden_states", "timestep", "image_rotary_emb", "ofs"):
        assert_same(key, given_to_ours[key], expected.get(key))  # the text-to-video pipeline gives no ofs
    # Whatever else either of them passes says nothing.
    rest = {"hidden_states", "encoder_hidden_states", "timestep", "image_rotary_emb", "ofs", "return_dict"}
    assert not [name for call in (expected, given_to_ours) for name, v in call.items() if name not in rest and v]
    assert velocity.dtype == torch.float32
    assert velocity.shape == latents.shape
    assert torch.equal(velocity, theirs.outputs[0].float())


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_same(name: str, ours: Any, theirs: Any) -> None:
    """Equal to the bit, and of one type, however deep."""
    if isinstance(theirs, tuple):
        for our_part, their_part in zip(ours, theirs, strict=True):
            assert_same(name, our_part, their_part)
    elif theirs is None:
        assert ours is None, name
    else:
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_of_sines_are_kept_in_the_type_that_computes(family: Open, dtype: torch.dtype) -> None:
    checkpoint = family("2b")
    stock = CogVideoXTransformer3DModel.from_pretrained(checkpoint.folder, subfolder="transformer", dtype=dtype)
    ours = load_transformer(checkpoint, dtype)
    assert stock.patch_embed.pos_embedding.dtype == torch.float64
    assert ours.patch_embed.pos_embedding.dtype == dtype
    generator = torch.Generator().manual_seed(0)
    channels, height, width = (stock.config[name] for name in ("in_channels", "sample_height", "sample_width"))
    frames = (stock.config.sample_frames - 1) // stock.config.temporal_compression_ratio + 1
    for size in ((frames, height, width), (frames + 1, height, width)):  # which the kept ones are for, and another
        inputs = {
            "hidden_states": torch.randn(1, size[0], channels, *size[1:], generator=generator).to(dtype),
            "encoder_hidden_states": torch.randn(
                1, stock.config.max_text_seq_length, stock.config.text_embed_dim, generator=generator
            ).to(dtype),
            "timestep": torch.tensor([5]),
        }
        with torch.no_grad():
            assert torch.equal(ours(**inputs).sample, stock(**inputs).sample)


def test_learned_positions_are_left_out_only_where_that_is_asked_for(family: Open) -> None:
    checkpoint = family("5b-I2V")
    asked = with_conditioning(checkpoint, ConditioningOptions(ignore_learned_positional_embeddings=True))
    stock = CogVideoXTransformer3DModel.from_pretrained(checkpoint.folder, subfolder="transformer")
    with_them, without = (load_transformer(choice, torch.float32) for choice in (checkpoint, asked))
    assert torch.equal(with_them.patch_embed.pos_embedding, stock.patch_embed.pos_embedding.float())
    assert with_them.config.use_learned_positional_embeddings is True
    assert without.config.use_learned_positional_embeddings is False
    portrait = {
        "hidden_states": torch.zeros(1, 5, 16, 12, 8),
        "encoder_hidden_states": torch.zeros(1, 7, 32),
        "timestep": torch.tensor([5]),
        "image_rotary_emb": Denoiser(checkpoint, torch.float32).rotary_embedding(5, 12, 8, CPU),
    }
    with torch.no_grad():
        without(**portrait)
        with pytest.raises(ValueError, match="different resolution"):
            with_them(**portrait)


def test_scale_of_the_images_latents_can_be_another_than_the_stock_pipelines(family: Open) -> None:
    latents = torch.randn(1, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    for name, choice, factor in (("5b-I2V", "divide", 1 / 0.7), ("1.5-5B-I2V", "multiply", 0.7)):
        options = ConditioningOptions(image_latents_scale=choice)  # type: ignore[arg-type]
        checkpoint = with_conditioning(family(name), options)
        condition = Denoiser(checkpoint, torch.float32).image_condition(latents, 4)
        torch.testing.assert_close(condition[:, 0], latents * factor)
        assert not condition[:, 1:].any()
        pipeline = CogVideoXImageToVideoPipeline.from_pretrained(checkpoint.folder)
        encoders.follow_config(pipeline.vae, checkpoint)  # as validation and `sample` do
        given = pipeline.prepare_latents(
            picture_tensor := torch.rand(1, 3, 32, 48) * 2 - 1,
            *(1, 8, 13, 32, 48, torch.float32, CPU),
            generator=torch.Generator().manual_seed(0),
        )[1]
        with torch.no_grad():
            raw = pipeline.vae.encode(picture_tensor[:, :, None]).latent_dist.sample(torch.Generator().manual_seed(0))
        torch.testing.assert_close(given[:, 0], raw[:, :, 0] * factor)


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

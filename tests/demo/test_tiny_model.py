"""The tiny model is a real CogVideoX in all but size: stock diffusers saves, loads and samples it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from transformers import T5Tokenizer

from cogvideox_factory.demo.tiny_model import MAX_TEXT_TOKENS, build_scheduler, build_tiny_pipeline, build_tokenizer
from cogvideox_factory.demo.world import PROMPTS

MODELS = ("transformer", "vae", "text_encoder")


def weights(pipeline: CogVideoXPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{model}.{name}": value for model in MODELS for name, value in getattr(pipeline, model).state_dict().items()
    }


def sample(pipeline: CogVideoXPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=PROMPTS[0],
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> CogVideoXPipeline:
    return CogVideoXPipeline.from_pretrained(tiny_model)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights(build_tiny_pipeline(seed=3))
    torch.manual_seed(2)
    again = weights(build_tiny_pipeline(seed=3))
    other = weights(build_tiny_pipeline(seed=4))
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for model in MODELS:
        assert any(not torch.equal(value, other[name]) for name, value in first.items() if name.startswith(model))


def test_the_global_generator_is_untouched() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_tiny_pipeline(seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_saved_model_loads_in_stock_diffusers_with_the_same_weights(loaded: CogVideoXPipeline) -> None:
    expected = weights(build_tiny_pipeline(seed=0))
    ours = weights(loaded)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_pipeline_in_memory_samples_what_the_saved_one_samples(loaded: CogVideoXPipeline) -> None:
    """As from_pretrained, it comes ready for inference: without dropout."""
    pipeline = build_tiny_pipeline(seed=0)
    assert [model for model in MODELS if getattr(pipeline, model).training] == []
    assert np.array_equal(sample(pipeline), sample(loaded))


def test_its_videos_are_finite_and_not_of_one_colour(loaded: CogVideoXPipeline) -> None:
    frames = sample(loaded)
    assert frames.shape == (1, 9, 32, 48, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0.01


def test_native_size_is_17_frames_of_64_by_96(loaded: CogVideoXPipeline) -> None:
    config = loaded.transformer.config
    assert config.sample_frames == 17
    assert config.sample_height * loaded.vae_scale_factor_spatial == 64
    assert config.sample_width * loaded.vae_scale_factor_spatial == 96
    assert config.in_channels == config.out_channels == loaded.vae.config.latent_channels
    assert config.use_rotary_positional_embeddings
    assert config.max_text_seq_length == MAX_TEXT_TOKENS == 226
    assert config.text_embed_dim == loaded.text_encoder.config.d_model


def test_it_is_tiny(tiny_model: Path) -> None:
    assert sum(path.stat().st_size for path in tiny_model.rglob("*") if path.is_file()) < 10_000_000


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 1, "max_text_seq_length": 24},
        {"patch_size_t": 2, "patch_bias": False, "sample_height": 20, "sample_width": 24},
        {"use_rotary_positional_embeddings": False},
        {"in_channels": 16},
    ],
    ids=["small", "1.5", "sin-cos", "image-to-video"],
)
def test_options_of_the_transformer_win(options: dict[str, Any]) -> None:
    config = build_tiny_pipeline(**options).transformer.config
    assert {name: config[name] for name in options} == options
    assert config.num_attention_heads == 4


# --- the schedule ---


def test_schedule_is_the_published_one_of_5b(tiny_model: Path) -> None:
    saved = json.loads((tiny_model / "scheduler" / "scheduler_config.json").read_text())
    published = {
        "_class_name": "CogVideoXDDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }
    assert {name: saved[name] for name in published} == published


def test_schedule_ends_without_signal() -> None:
    scheduler = build_scheduler()
    assert isinstance(scheduler, CogVideoXDDIMScheduler)
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.alphas_cumprod[0] > 0.99
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


# --- the tokenizer ---


def test_words_of_the_demos_captions_are_one_token_each() -> None:
    tokenizer = build_tokenizer()
    for prompt in PROMPTS:
        tokens = tokenizer(prompt).input_ids
        unknown, spaces = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("▁")
        assert unknown not in tokens
        words = [token for token in tokens[:-1] if token != spaces]
        assert len(words) == len(prompt.split())
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens, skip_special_tokens=True) == prompt


@pytest.mark.parametrize("text", ["Zebras run.", "x = 3 * (y + 1)?", "MiXeD 42", "don't"])
def test_other_words_are_spelled_and_read_back(text: str) -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_special_tokens_are_those_of_t5() -> None:
    tokenizer = build_tokenizer()
    assert isinstance(tokenizer, T5Tokenizer)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("ж").input_ids[-2:] == [2, 1]
    padded = tokenizer("a red square", padding="max_length", max_length=12).input_ids
    assert len(padded) == 12
    assert padded[-1] == 0


def test_text_encoder_has_a_vector_for_every_token(loaded: CogVideoXPipeline) -> None:
    assert len(loaded.tokenizer) == loaded.text_encoder.config.vocab_size
    assert max(loaded.tokenizer(" ".join(PROMPTS)).input_ids) < len(loaded.tokenizer)


@pytest.mark.parametrize("text", [*PROMPTS[:2], "", "Zebras run.", "naïve"])
def test_saved_tokenizer_gives_the_same_tokens(loaded: CogVideoXPipeline, text: str) -> None:
    expected = build_tokenizer()(text, padding="max_length", max_length=40, truncation=True)
    assert loaded.tokenizer(text, padding="max_length", max_length=40, truncation=True).input_ids == expected.input_ids
    assert loaded.tokenizer.model_max_length == MAX_TEXT_TOKENS


def test_prompts_with_different_words_have_different_embeddings(loaded: CogVideoXPipeline) -> None:
    with torch.no_grad():
        embeds = [loaded.encode_prompt(prompt, do_classifier_free_guidance=False)[0] for prompt in (*PROMPTS[:3], "")]
    for index, embed in enumerate(embeds):
        for other in embeds[index + 1 :]:
            assert not torch.allclose(embed, other, atol=1e-3)

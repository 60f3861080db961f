"""The tiny model that ships has learned what its captions say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from cogvideox_factory.demo import SHOWN, lesson
from cogvideox_factory.demo.learned_model import FOLDER, MAX_TEXT_TOKENS, build_pipeline, build_vae, copy_learned_model
from cogvideox_factory.demo.world import NATIVE_SIZE, STYLES, Scene, all_scenes

FIGURES = Path(__file__).parents[2] / "tools/tiny_model/figures.json"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> CogVideoXPipeline:
    folder = tmp_path_factory.mktemp("learned") / "model"
    copy_learned_model(folder)
    pipeline = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_small_and_in_half_precision() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 5.3e6
    for part in ("transformer", "vae"):  # of the text encoder transformers keeps some in fp32
        stored = load_file(FOLDER / part / "diffusion_pytorch_model.safetensors")
        assert len(stored) > 100 and {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_it_tells_nothing_of_the_machine_that_made_it() -> None:
    texts = [path.read_text() for path in FOLDER.rglob("*.json")]
    assert texts and not any("_name_or_path" in text for text in texts)


def test_the_scripts_build_what_ships(learned: CogVideoXPipeline) -> None:
    built = build_pipeline(0, build_vae())
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (built, learned))
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert learned.transformer.config.max_text_seq_length == MAX_TEXT_TOKENS
    longest = max(len(learned.tokenizer(scene.caption).input_ids) for scene in all_scenes())
    assert longest <= MAX_TEXT_TOKENS


@torch.no_grad()
@pytest.mark.parametrize("style", STYLES)
def test_its_autoencoder_gives_back_both_styles(learned: CogVideoXPipeline, style: str) -> None:
    """The style that the demo teaches must be one that the latents can hold."""
    scene = Scene("purple", "cross", "moving up", "grey")
    clip = torch.from_numpy(scene.render(NATIVE_SIZE, style)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = learned.vae.encode(clip).latent_dist.mode()
    error = (learned.vae.decode(latents).sample.clamp(-1, 1) - clip).abs().mean() * 127.5
    figure = json.loads(FIGURES.read_text())["autoencoder"][f"{style}: error of pixels, of 255"]
    assert error < 2 * figure


def test_captions_give_their_scenes(learned: CogVideoXPipeline) -> None:
    """Of scenes that were held out of its training; see figures.json for more of them. Guessing would give a shape of
    six and a motion of seven."""
    scenes = all_scenes()
    order = np.random.default_rng(0).permutation(len(scenes))  # as tools/tiny_model/train_transformer.py does
    right = dict.fromkeys(("shape", "motion", "background"), 0)
    for scene in (scenes[index] for index in order[:6]):
        frames = learned(
            scene.caption,
            num_inference_steps=20,
            guidance_scale=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).frames[0]
        others = [other for other in scenes if other.colour == scene.colour]
        nearest = min(others, key=lambda other: np.abs(frames * 255 - other.render(NATIVE_SIZE)).mean())
        for name in right:
            right[name] += getattr(nearest, name) == getattr(scene, name)
    assert right["shape"] >= 4 and right["motion"] >= 5 and right["background"] == 6, right


def test_the_lesson_holds_nothing_that_is_shown() -> None:
    scenes = lesson(42)
    assert len(set(scenes)) == 24 and not set(SHOWN) & set(scenes)
    assert lesson(42) == scenes != lesson(43)

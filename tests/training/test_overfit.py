"""The whole way on one clip: a model that has seen nothing else gives that clip back.

Preparing, training and sampling are each tested against a reference of their own; that they agree with each other
(scale of the latents, noise schedule, positions, caption) shows here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from PIL import Image

from cogvideox_factory.data.store import PreparedSet
from cogvideox_factory.data.video import write_video
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.demo.world import Scene

Cli = Callable[..., tuple[int, str, str]]
CAPTION = "a red square moving left on a dark background"


def write_model(folder: Path) -> None:
    """The tiny model with latents as those of a trained VAE: nearly no spread around their mean, and of unit size."""
    pipeline = build_tiny_pipeline(seed=0)
    last = pipeline.vae.encoder.conv_out.conv  # its second half gives the log-variance
    channels = pipeline.vae.config.latent_channels
    with torch.no_grad():
        last.weight[channels:] = 0
        last.bias[channels:] = -30
    pipeline.vae.register_to_config(scaling_factor=3.0)  # the raw latents of this clip have a deviation of 0.32
    pipeline.save_pretrained(folder)


@torch.no_grad()
def loss_at_fixed_noise(model: Path, raw_latents: torch.Tensor, prompt_embeds: torch.Tensor) -> float:
    """Error of the velocity at ten timesteps, each with noise of its own, by stock diffusers."""
    pipeline = CogVideoXPipeline.from_pretrained(model)
    latents = raw_latents * pipeline.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(0)
    errors = []
    for timestep in torch.arange(50, 1000, 100):
        noise = torch.randn(latents.shape, generator=generator)
        velocity = pipeline.transformer(
            hidden_states=pipeline.scheduler.add_noise(latents, noise, timestep[None]),
            encoder_hidden_states=prompt_embeds,
            timestep=timestep[None],
            image_rotary_emb=pipeline._prepare_rotary_positional_embeddings(64, 96, 5, torch.device("cpu")),
            return_dict=False,
        )[0]
        errors.append((velocity - pipeline.scheduler.get_velocity(latents, noise, timestep[None])).square().mean())
    return torch.stack(errors).mean().item()


def read_frames(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]).astype(float)


@pytest.mark.slow
def test_a_model_trained_on_one_clip_gives_that_clip(cli: Cli, tmp_path: Path) -> None:
    model, clips, prepared, run = (tmp_path / name for name in ("model", "clips", "prepared", "run"))
    write_model(model)
    write_video(clips / "clip.mp4", Scene("red", "square", "moving left", "dark").render(), 8)
    (clips / "clip.txt").write_text(CAPTION)

    def command(name: str, *flags: str | Path) -> None:
        code, _, messages = cli(name, *flags)
        assert code == 0, messages

    base = ("--pretrained_model_name_or_path", model)
    # The caption has 10 tokens; 226 would be most of the sequence, and of the time.
    command("prepare", *base, "--data_root", clips, "--output_dir", prepared, "--max_sequence_length", "16")
    command(
        *("train", *base, "--data_root", prepared, "--load_tensors", "--output_dir", run),
        *("--training_type", "sft", "--max_train_steps", "500", "--learning_rate", "2e-3", "--weight_decay", "0"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "20", "--caption_dropout", "0"),
    )
    video = ("--prompt", CAPTION, "--guidance_scale", "1", "--num_inference_steps", "25")
    for name, step in (("untrained", ("--step", "0")), ("trained", ())):
        command("sample", "--run", run, *step, *video, "--output", tmp_path / name)

    (entry,) = PreparedSet(prepared).read_index()
    latents, embeds = (PreparedSet(prepared).read_tensors(entry.files[name][0]) for name in ("latents", "prompt"))
    raw_latents = latents["mean"].float()[None]  # (1, channels, frames, height, width)
    before, after = (
        loss_at_fixed_noise(folder, raw_latents.transpose(1, 2), embeds["prompt_embeds"].float()[None])
        for folder in (model, run)
    )
    assert after < 0.05 * before  # seen: 1.37 → 0.041

    pipeline = CogVideoXPipeline.from_pretrained(model)
    with torch.no_grad():
        decoded = pipeline.vae.decode(raw_latents).sample
    target = pipeline.video_processor.postprocess_video(decoded, output_type="np")[0] * 255
    untrained, trained = (np.abs(read_frames(tmp_path / name) - target).mean() for name in ("untrained", "trained"))
    # Seen: 18.6 and 3.5 of 255, where the target itself deviates by 18.4 from its mean.
    assert trained < 0.25 * untrained
    assert untrained == pytest.approx(18.6, abs=2)  # the bar is one that an untrained model does not pass

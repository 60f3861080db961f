"""The loss of a batch, against plain formulas on diffusers' schedulers in full precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_factory.config import ConditioningOptions, ModelOptions, ObjectiveOptions
from cogvideox_factory.data.loader import Batch
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler, load_transformer
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning
from cogvideox_factory.training.objective import min_snr_weights, timesteps_from_quantiles, velocity_loss

CPU = torch.device("cpu")
MODEL_1_5: dict[str, Any] = {"patch_size_t": 2, "patch_bias": False, "sample_height": 20, "sample_width": 24}
Build = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A tiny checkpoint with a scheduler of this class and these changes to its schedule, VAE and transformer."""
    made: dict[str, Checkpoint] = {}

    def get(
        scheduler_class: Any = CogVideoXDDIMScheduler,
        snr_shift_scale: float = 1.0,
        scaling_factor: float = 0.7,
        **transformer: Any,
    ) -> Checkpoint:
        key = repr((scheduler_class, snr_shift_scale, scaling_factor, transformer))
        if key not in made:
            pipeline = build_tiny_pipeline(num_layers=2, **transformer)
            config = {**pipeline.scheduler.config, "snr_shift_scale": snr_shift_scale}
            pipeline.scheduler = scheduler_class.from_config(config)
            pipeline.vae.register_to_config(scaling_factor=scaling_factor)
            folder = tmp_path_factory.mktemp("model")
            pipeline.save_pretrained(folder)
            made[key] = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(folder)))
        return made[key]

    return get


def make_batch(quantiles: list[float], frames: int = 5, padded_frames: int | None = None, seed: int = 0) -> Batch:
    """Clips of 4×6 latents with random content and noise."""
    generator = torch.Generator().manual_seed(seed)
    count = len(quantiles)
    return Batch(
        raw_latents=torch.randn(count, frames, 8, 4, 6, generator=generator),
        noise=torch.randn(count, padded_frames or frames, 8, 4, 6, generator=generator),
        timestep_quantiles=torch.tensor(quantiles),
        prompt_embeds=torch.randn(count, 16, 32, generator=generator),
        share=1.0,
    )


def part_of(batch: Batch, *indices: int) -> Batch:
    chosen = list(indices)
    return Batch(
        batch.raw_latents[chosen],
        batch.noise[chosen],
        batch.timestep_quantiles[chosen],
        batch.prompt_embeds[chosen],
        batch.share,
    )


@torch.no_grad()
def loss_of(
    checkpoint: Checkpoint, batch: Batch, dtype: torch.dtype = torch.float32, **options: ObjectiveOptions
) -> torch.Tensor:
    transformer = load_transformer(checkpoint, dtype)
    return velocity_loss(transformer, Denoiser(checkpoint, dtype), load_scheduler(checkpoint), batch, **options)


def test_image_to_video_sees_its_image(member: Callable[[str], Path]) -> None:
    """Trap: the image's latents scaled differently in training and inference, and CogVideoX 1.5 without its ofs."""
    for name, factor in (("5b-I2V", 0.7), ("1.5-5B-I2V", 1 / 0.7)):
        checkpoint = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(member(name))))
        options = ConditioningOptions(ignore_learned_positional_embeddings=name == "5b-I2V")
        checkpoint = with_conditioning(checkpoint, options)
        image = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(9))
        batch = dataclasses.replace(
            make_batch([0.2, 0.7], padded_frames=6 if name[0] == "1" else 5), raw_image_latents=image
        )
        pipeline = CogVideoXImageToVideoPipeline.from_pretrained(member(name))
        pipeline.transformer.patch_embed.use_learned_positional_embeddings = False
        losses = []
        for index, step in enumerate((200, 700)):
            clean = batch.raw_latents[index : index + 1] * 0.7
            noise, timestep = batch.noise[index : index + 1], torch.tensor([step])
            if noise.shape[1] > clean.shape[1]:
                clean = torch.cat([clean[:, :1], clean], dim=1)
            condition = torch.zeros_like(clean)
            condition[0, 0] = image[index] * factor
            with torch.no_grad():
                predicted = pipeline.transformer(
                    hidden_states=torch.cat([pipeline.scheduler.add_noise(clean, noise, timestep), condition], dim=2),
                    encoder_hidden_states=batch.prompt_embeds[index : index + 1],
                    timestep=timestep,
                    ofs=torch.tensor([2.0]) if name == "1.5-5B-I2V" else None,
                    image_rotary_emb=pipeline._prepare_rotary_positional_embeddings(32, 48, clean.shape[1], CPU),
                ).sample
            target = pipeline.scheduler.get_velocity(clean, noise, timestep)
            losses.append(torch.nn.functional.mse_loss(predicted, target))
        torch.testing.assert_close(loss_of(checkpoint, batch), torch.stack(losses), rtol=1e-5, atol=1e-6)
        without = dataclasses.replace(batch, raw_image_latents=torch.zeros_like(image))
        assert not torch.allclose(loss_of(checkpoint, without), torch.stack(losses), rtol=1e-3)


@torch.no_grad()
def reference(folder: Path, scheduler: Any, batch: Batch, timesteps: list[int]) -> torch.Tensor:
    """The loss a clip, one clip after the other, with nothing of ours in it."""
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    transformer: CogVideoXTransformer3DModel = pipeline.transformer
    losses = []
    for index, step in enumerate(timesteps):
        clean = batch.raw_latents[index : index + 1] * pipeline.vae.config.scaling_factor
        noise = batch.noise[index : index + 1]
        while clean.shape[1] < noise.shape[1]:
            clean = torch.cat([clean[:, :1], clean], dim=1)
        timestep = torch.tensor([step])
        frames, _, height, width = clean.shape[1:]
        predicted = transformer(
            hidden_states=scheduler.add_noise(clean, noise, timestep),
            encoder_hidden_states=batch.prompt_embeds[index : index + 1],
            timestep=timestep,
            image_rotary_emb=pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, frames, CPU)
            if transformer.config.use_rotary_positional_embeddings
            else None,
        ).sample
        losses.append(torch.nn.functional.mse_loss(predicted, scheduler.get_velocity(clean, noise, timestep)))
    return torch.stack(losses)


# --- timesteps ---


@pytest.mark.parametrize("count", [1000, 7, 1])
def test_quantiles_cover_every_timestep_uniformly(count: int) -> None:
    quantiles = (torch.arange(count * 8, dtype=torch.float64) + 0.5) / (count * 8)
    timesteps = timesteps_from_quantiles(quantiles.float(), count)
    assert timesteps.dtype == torch.int64
    assert torch.equal(torch.bincount(timesteps, minlength=count), torch.full((count,), 8))


def test_random_quantiles_give_uniform_timesteps() -> None:
    quantiles = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(timesteps_from_quantiles(quantiles, 1000), minlength=1000).double()
    assert len(counts) == 1000
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert 850 < chi_squared < 1150  # 999 ± 45 where all timesteps are alike


@given(quantile=st.floats(0, 1, width=32), count=st.integers(1, 5000))
def test_timesteps_stay_inside_the_schedule(quantile: float, count: int) -> None:
    (timestep,) = timesteps_from_quantiles(torch.tensor([quantile]), count).tolist()
    assert 0 <= timestep < count
    assert timestep == min(int(torch.tensor(quantile, dtype=torch.float32) * count), count - 1)


def test_the_ends_of_the_quantiles_are_the_ends_of_the_schedule() -> None:
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert timesteps_from_quantiles(torch.stack([torch.tensor(0.0), below_one]), 1000).tolist() == [0, 999]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.5), (1.2, 1.7)])
def test_logit_normal_timesteps_follow_the_analytic_distribution(mean: float, std: float) -> None:
    """The share of timesteps below t is Φ((logit(t / T) − m) / s)."""
    objective = ObjectiveOptions(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    quantiles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    timesteps = timesteps_from_quantiles(quantiles.float(), 1000, objective)
    assert timesteps.dtype == torch.int64
    below = torch.bincount(timesteps, minlength=1000).cumsum(0)[:-1].double() / 200_000
    places = torch.arange(1, 1000, dtype=torch.float64) / 1000
    expected = torch.special.ndtr((torch.logit(places) - mean) / std)
    assert (below - expected).abs().max() < 2e-5
    assert (below - places).abs().max() > 0.1  # and is not uniform


@given(
    quantile=st.floats(0, 1, width=32), mean=st.floats(-20, 20), std=st.floats(1e-3, 1e3), count=st.integers(1, 5000)
)
def test_logit_normal_timesteps_stay_inside_the_schedule(quantile: float, mean: float, std: float, count: int) -> None:
    objective = ObjectiveOptions(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    (timestep,) = timesteps_from_quantiles(torch.tensor([quantile]), count, objective).tolist()
    assert 0 <= timestep < count


def test_more_noise_with_a_higher_mean() -> None:
    low, high = (ObjectiveOptions(timestep_sampling="logit_normal", logit_mean=mean) for mean in (-1.0, 1.0))
    middle = torch.tensor([0.5])
    assert timesteps_from_quantiles(middle, 1000, low).tolist() == [268]  # sigmoid(−1) = 0.2689
    assert timesteps_from_quantiles(middle, 1000, high).tolist() == [731]


# --- weights ---


@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
@pytest.mark.parametrize("gamma", [5.0, 0.5])
def test_min_snr_weights_are_those_of_diffusers(build: Build, snr_shift_scale: float, gamma: float) -> None:
    """min(SNR, γ) / (SNR + 1), as diffusers' training scripts weigh v-prediction, with its compute_snr."""
    scheduler = CogVideoXDDIMScheduler.from_pretrained(build(snr_shift_scale=snr_shift_scale).folder / "scheduler")
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps).double()
    weights = min_snr_weights(scheduler, timesteps, gamma)
    expected = snr.clamp(max=gamma) / (snr + 1)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-7)
    assert weights.dtype == torch.float32
    assert weights[999] == 0 and weights[998] > 0  # the last timestep has no signal
    assert weights.max() < 1


def test_min_snr_weights_are_finite_without_noise_and_without_signal() -> None:
    class Schedule:
        alphas_cumprod = torch.tensor([1.0, 0.5, 0.0])

    weights = min_snr_weights(Schedule(), torch.tensor([0, 1, 2]), 5.0)
    assert weights.tolist() == [0.0, 0.5, 0.0]


def test_snr_gamma_weighs_the_loss_of_each_clip(build: Build) -> None:
    checkpoint = build()
    batch = make_batch([0.0505, 0.5005, 0.9995])
    scheduler = load_scheduler(checkpoint)
    weighted = loss_of(checkpoint, batch, objective=ObjectiveOptions(snr_gamma=5.0))
    expected = loss_of(checkpoint, batch) * min_snr_weights(scheduler, torch.tensor([50, 500, 999]), 5.0)
    torch.testing.assert_close(weighted, expected)
    assert weighted[2] == 0 and weighted[0] != weighted[1]


# --- the loss ---


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
def test_loss_equals_plain_mean_squared_error_of_the_velocity(
    build: Build, scheduler_class: Any, snr_shift_scale: float
) -> None:
    checkpoint = build(scheduler_class, snr_shift_scale)
    batch = make_batch([0.0, 0.2505, 0.7005, 0.9995])
    scheduler = scheduler_class.from_pretrained(checkpoint.folder, subfolder="scheduler")
    assert scheduler.config.snr_shift_scale == snr_shift_scale
    losses = loss_of(checkpoint, batch)
    assert losses.dtype == torch.float32
    expected = reference(checkpoint.folder, scheduler, batch, [0, 250, 700, 999])
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)


def test_loss_equals_the_formulas_of_the_paper(build: Build) -> None:
    """x_t = sqrt(ᾱ)·x₀ + sqrt(1−ᾱ)·ε and v = sqrt(ᾱ)·ε − sqrt(1−ᾱ)·x₀ in double precision, on a model that is known."""
    checkpoint = build(snr_shift_scale=3.0)
    batch = make_batch([0.1005, 0.5005, 0.9005])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    alphas = alphas / (3 + (1 - 3) * alphas)  # the shift of the signal-to-noise ratio
    roots = alphas.sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])  # zero signal at the last step
    signal = roots[[100, 500, 900]].reshape(-1, 1, 1, 1, 1)
    sigma = (1 - signal**2).sqrt()
    clean, noise = batch.raw_latents.double() * 0.7, batch.noise.double()
    noisy, velocity = signal * clean + sigma * noise, signal * noise - sigma * clean

    def half_of_its_input(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (hidden_states / 2,)

    denoiser = Denoiser(checkpoint, torch.float32)
    losses = velocity_loss(half_of_its_input, denoiser, load_scheduler(checkpoint), batch)
    expected = (noisy / 2 - velocity).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
def test_loss_is_the_originals_weighted_error_of_the_clean_latents(build: Build, snr_shift_scale: float) -> None:
    """|x₀ − x̂₀|² / (1 − ᾱ), with x̂₀ from the scheduler's formula, is the same number as |v − v̂|²."""
    checkpoint = build(snr_shift_scale=snr_shift_scale)
    batch = make_batch([0.0505, 0.2505, 0.7005, 0.9995])
    timesteps = torch.tensor([50, 250, 700, 999])
    scheduler = CogVideoXDDIMScheduler.from_pretrained(checkpoint.folder, subfolder="scheduler")
    clean = batch.raw_latents * 0.7
    noisy = scheduler.add_noise(clean, batch.noise, timesteps)
    transformer = load_transformer(checkpoint, torch.float32)
    with torch.no_grad():
        velocity = Denoiser(checkpoint, torch.float32).predict(transformer, noisy, timesteps, batch.prompt_embeds)
    estimate = scheduler.get_velocity(velocity, noisy, timesteps)  # sqrt(ᾱ)·x_t − sqrt(1−ᾱ)·v̂
    alphas = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1, 1)
    expected = ((clean - estimate).square() / (1 - alphas)).flatten(1).mean(1)
    torch.testing.assert_close(loss_of(checkpoint, batch).double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_loss_reaches_the_weights_through_the_prediction_alone(build: Build) -> None:
    """The gradient is that of the plain formula."""
    checkpoint = build()
    batch = make_batch([0.3005, 0.6005])
    gradients = []
    for is_ours in (True, False):
        transformer = load_transformer(checkpoint, torch.float32)
        weight = transformer.transformer_blocks[0].attn1.to_q.weight.requires_grad_(True)
        denoiser, scheduler = Denoiser(checkpoint, torch.float32), load_scheduler(checkpoint)
        if is_ours:
            losses = velocity_loss(transformer, denoiser, scheduler, batch)
        else:
            timesteps, clean = torch.tensor([300, 600]), batch.raw_latents * 0.7
            noisy = scheduler.add_noise(clean, batch.noise, timesteps)
            velocity = transformer(
                noisy, batch.prompt_embeds, timesteps, image_rotary_emb=denoiser.rotary_embedding(5, 4, 6, CPU)
            ).sample
            losses = (velocity - scheduler.get_velocity(clean, batch.noise, timesteps)).pow(2).mean(dim=(1, 2, 3, 4))
        losses.sum().backward()
        assert weight.grad is not None and weight.grad.abs().sum() > 0
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scaling_factor", [0.7, 1.15258426])
def test_latents_are_scaled_by_the_checkpoints_factor(build: Build, scaling_factor: float) -> None:
    checkpoint = build(scaling_factor=scaling_factor)
    batch = make_batch([0.2005, 0.8005])
    scheduler = CogVideoXDDIMScheduler.from_pretrained(checkpoint.folder, subfolder="scheduler")
    losses = loss_of(checkpoint, batch)
    torch.testing.assert_close(losses, reference(checkpoint.folder, scheduler, batch, [200, 800]), rtol=1e-6, atol=1e-6)
    other = dataclasses.replace(checkpoint, vae={**checkpoint.vae, "scaling_factor": 2 * scaling_factor})
    assert (loss_of(other, batch) - losses).abs().min() > 1e-2


@pytest.mark.parametrize(
    ("transformer", "frames", "padded"),
    [
        pytest.param({"use_rotary_positional_embeddings": False, "max_text_seq_length": 16}, 5, 5, id="sin-cos"),
        pytest.param(MODEL_1_5, 5, 6, id="1.5-odd"),
        pytest.param(MODEL_1_5, 4, 4, id="1.5-even"),
    ],
)
def test_loss_equals_the_reference_throughout_the_family(
    build: Build, transformer: dict[str, Any], frames: int, padded: int
) -> None:
    checkpoint = build(**transformer)
    batch = make_batch([0.3005, 0.9005], frames, padded)
    scheduler = CogVideoXDDIMScheduler.from_pretrained(checkpoint.folder, subfolder="scheduler")
    expected = reference(checkpoint.folder, scheduler, batch, [300, 900])
    torch.testing.assert_close(loss_of(checkpoint, batch), expected, rtol=1e-6, atol=1e-6)


# --- clips of a batch ---


def test_a_clips_loss_does_not_depend_on_the_rest_of_its_batch(build: Build) -> None:
    checkpoint = build()
    batch = make_batch([0.9005, 0.0505, 0.5005])
    together = loss_of(checkpoint, batch)
    assert together.shape == (3,)
    for index in range(3):
        torch.testing.assert_close(loss_of(checkpoint, part_of(batch, index)), together[[index]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_of(checkpoint, part_of(batch, 2, 0, 1)), together[[2, 0, 1]], rtol=1e-5, atol=1e-6)
    assert (together[0] - together[1]).abs() > 1e-2


# --- precision ---


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_noising_and_target_stay_fp32_under_a_bf16_model(
    build: Build, monkeypatch: pytest.MonkeyPatch, scheduler_class: Any
) -> None:
    checkpoint = build(scheduler_class)
    scheduler = load_scheduler(checkpoint)
    exact = scheduler_class.from_pretrained(checkpoint.folder, subfolder="scheduler")
    batch = make_batch([0.0005, 0.4005, 0.9985])
    timesteps = torch.tensor([0, 400, 998])
    seen: dict[str, torch.Tensor] = {}

    def spy(name: str) -> None:
        original = getattr(scheduler, name)

        def call(*tensors: torch.Tensor) -> torch.Tensor:
            assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in tensors)
            seen[name] = original(*tensors)
            return seen[name]

        monkeypatch.setattr(scheduler, name, call)

    spy("add_noise")
    spy("get_velocity")
    transformer = load_transformer(checkpoint, torch.bfloat16)
    given_to_model: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []

    def model(hidden_states: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor]:
        given_to_model.append(hidden_states)
        (answer,) = transformer(hidden_states, **inputs)
        answers.append(answer)
        return (answer,)

    with torch.no_grad():
        losses = velocity_loss(model, Denoiser(checkpoint, torch.bfloat16), scheduler, batch)
    clean = batch.raw_latents * 0.7
    noisy, target = exact.add_noise(clean, batch.noise, timesteps), exact.get_velocity(clean, batch.noise, timesteps)
    assert torch.equal(seen["add_noise"], noisy)
    assert torch.equal(seen["get_velocity"], target)
    assert given_to_model[0].dtype == answers[0].dtype == torch.bfloat16
    assert torch.equal(given_to_model[0], noisy.bfloat16())  # rounded once, at the model's door
    assert losses.dtype == torch.float32
    expected = (answers[0].float() - target).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-7)


def test_the_batch_and_the_schedule_are_left_as_they_were(build: Build) -> None:
    checkpoint = build()
    batch = make_batch([0.3005])
    before = [tensor.clone() for tensor in (batch.raw_latents, batch.noise, batch.prompt_embeds)]
    scheduler = load_scheduler(checkpoint)
    alphas = scheduler.alphas_cumprod.clone()
    transformer = load_transformer(checkpoint, torch.bfloat16)
    velocity_loss(transformer, Denoiser(checkpoint, torch.bfloat16), scheduler, batch)
    for tensor, copy in zip((batch.raw_latents, batch.noise, batch.prompt_embeds), before, strict=True):
        assert torch.equal(tensor, copy)
    assert torch.equal(scheduler.alphas_cumprod, alphas)

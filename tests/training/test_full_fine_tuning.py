"""A run of full fine-tuning, and what every method shares: the plain loop, resuming, the average, the last test."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from cogvideox_factory.data.loader import PreparedClips
from cogvideox_factory.data.sampler import Position, Sampler
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.training import loop
from cogvideox_factory.training import validation as validation_module
from cogvideox_factory.training.metrics import MetricsLog

Cli = Callable[..., tuple[int, str, str]]
LORA = "pytorch_lora_weights.safetensors"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SFT = ("--training_type", "sft", "--rank", "64", "--lora_alpha", "64", "--learning_rate", "1e-3")


@pytest.fixture
def train(cli: Cli, tiny_model: Path, prepared_folder: Path) -> Callable[..., tuple[int, str]]:
    """Call `train` on the prepared clips: exit code and standard error."""

    def call(run: Path, *flags: str | Path) -> tuple[int, str]:
        code, _, messages = cli(
            *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder),
            *("--load_tensors", "--report_to", "none", "--output_dir", run, "--rank", "4", "--lora_alpha", "8"),
            *("--learning_rate", "1e-2", "--train_batch_size", "2", *flags),
        )
        return code, messages

    return call


def assert_same_files(ours: Path, theirs: Path) -> None:
    """The same tensors, to the bit."""
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)


def plain_fine_tuning(
    model: Path, prepared: PreparedSet, entries: list[Entry], num_steps: int, trained: str, decay: float
) -> tuple[CogVideoXTransformer3DModel, dict[str, torch.Tensor]]:
    """Full fine-tuning in plain PyTorch and diffusers; the transformer, and the moving average of what is trained."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")
    weights = {name: value for name, value in transformer.named_parameters() if trained in name}
    transformer.requires_grad_(False)
    for value in weights.values():
        value.requires_grad_(True)
    averages = {name: value.detach().clone() for name, value in weights.items()}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    scheduler = CogVideoXDDIMScheduler.from_pretrained(model, subfolder="scheduler")
    pipeline = CogVideoXPipeline.from_pretrained(model)
    rotary = pipeline._prepare_rotary_positional_embeddings(64, 96, 5, torch.device("cpu"))
    sampler = Sampler([entry.bucket for entry in entries], 2, seed=7)
    clips = PreparedClips(prepared, entries, prepared.read_settings()["empty_prompt"], seed=7, caption_dropout=0.1)
    for step in list(sampler.epoch(0))[:num_steps]:
        (batch,) = clips[Position(0), step].batches
        latents = batch.raw_latents * pipeline.vae.config.scaling_factor
        timesteps = (batch.timestep_quantiles * 1000).long()
        velocity = transformer(
            hidden_states=scheduler.add_noise(latents, batch.noise, timesteps),
            encoder_hidden_states=batch.prompt_embeds,
            timestep=timesteps,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        (velocity - scheduler.get_velocity(latents, batch.noise, timesteps)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in weights.items():
            averages[name].lerp_(value.detach(), 1 - decay)
    return transformer, averages


@pytest.mark.parametrize("modules", ["", "attn1"])
def test_full_fine_tuning_equals_a_plain_loop_and_exports_a_pipeline_for_stock_diffusers(
    train, tmp_path: Path, tiny_model: Path, prepared: PreparedSet, entries: list[Entry], modules: str
) -> None:
    run, chosen = tmp_path / "run", ("--trainable_modules", modules) if modules else ()
    code, messages = train(run, "--seed", "7", "--max_train_steps", "4", *SFT, *chosen)
    assert code == 0, messages
    assert f"model      {run}\n" in messages and "without effect" not in messages
    theirs, _ = plain_fine_tuning(tiny_model, prepared, entries, 4, modules, 0.5)
    exported = CogVideoXPipeline.from_pretrained(run).transformer.state_dict()
    assert exported.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(exported[name], value), name
    base = CogVideoXPipeline.from_pretrained(tiny_model).transformer.state_dict()
    changed = {name for name in base if not torch.equal(base[name], exported[name])}
    assert changed and all(modules in name for name in changed)
    folder = run / "checkpoints/step-00000004"
    assert {path.name for path in folder.iterdir()} == {
        *(
            "trainable.safetensors",
            "optimizer.safetensors",
            "state.json",
            "manifest.json",
        )  # the weights once, and no LoRA
    }
    assert load_file(folder / "trainable.safetensors").keys() == {name for name in base if modules in name}
    assert not (run / LORA).exists()


def test_full_fine_tuning_with_gradient_checkpointing_gives_the_same_weights(train, tmp_path: Path) -> None:
    for name, flags in (("plain", ()), ("checkpointed", ("--gradient_checkpointing",))):
        assert train(tmp_path / name, "--max_train_steps", "3", *SFT, *flags)[0] == 0
    assert_same_files(tmp_path / "checkpointed" / WEIGHTS, tmp_path / "plain" / WEIGHTS)


def test_a_pipeline_that_is_missing_from_a_finished_run_is_written_again(train, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", ("--max_train_steps", "2", "--ema_decay", "0.5", *SFT)
    weights = run / WEIGHTS
    assert train(run, *flags)[0] == 0
    weights.rename(tmp_path / "first.safetensors")
    (run / "model_index.json").unlink()
    code, messages = train(run, *flags, "--resume_from_checkpoint", "latest")
    assert code == 0 and "finished" in messages
    assert_same_files(weights, tmp_path / "first.safetensors")


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a signal right after a step was logged, as a user or a cluster would."""
    write = MetricsLog.write

    def write_then_signal(log: MetricsLog, **values) -> None:
        write(log, **values)
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(MetricsLog, "write", write_then_signal)


BF16 = (*SFT, "--mixed_precision", "bf16")


@pytest.mark.slow  # in fp32: see test_resuming.py
@pytest.mark.parametrize("method", [BF16, ("--use_dora", "--use_rslora")], ids=["sft-bf16", "dora"])
def test_a_method_that_is_stopped_and_resumed_with_its_average_equals_one_never_stopped(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: tuple[str, ...]
) -> None:
    flags = ("--max_train_steps", "4", "--lr_scheduler", "cosine", "--ema_decay", "0.7", *method)
    assert train(tmp_path / "whole", *flags)[0] == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(tmp_path / "parts", *flags)[0] == 75
    assert not (tmp_path / "parts/model_index.json").exists() and not (tmp_path / "parts" / LORA).exists()
    code, messages = train(tmp_path / "parts", *flags, "--resume_from_checkpoint", "latest")
    assert code == 0, messages
    export = WEIGHTS if "sft" in method else LORA
    for file in (export, *(f"checkpoints/step-00000004/{name}.safetensors" for name in ("trainable", "ema"))):
        assert_same_files(tmp_path / "parts" / file, tmp_path / "whole" / file)


def test_a_run_in_bf16_exports_its_fp32_weights_rounded(train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, messages = train(run, "--max_train_steps", "2", *BF16)
    assert code == 0, messages
    exported, trained = load_file(run / WEIGHTS), load_file(run / "checkpoints/step-00000002/trainable.safetensors")
    assert exported.keys() == trained.keys()
    assert {value.dtype for value in trained.values()} == {torch.float32}
    for name, value in trained.items():
        assert exported[name].dtype == torch.bfloat16 and torch.equal(exported[name], value.bfloat16())
    assert any(not torch.equal(value.bfloat16().float(), value) for value in trained.values())


def test_what_is_shown_and_exported_is_the_average(
    train, tmp_path: Path, tiny_model: Path, prepared: PreparedSet, entries: list[Entry], monkeypatch
) -> None:
    shown: dict[int, dict[str, torch.Tensor]] = {}

    def look(validation, step: int, transformer, *_, **__) -> None:
        shown[step] = {name: value.detach().clone() for name, value in transformer.named_parameters()}
        (validation.folder(step)).mkdir(parents=True)

    monkeypatch.setattr(loop.Validation, "run_in_memory", look)
    run = tmp_path / "run"
    flags = ("--seed", "7", "--max_train_steps", "4", *SFT, "--ema_decay", "0.6", "--trainable_modules", "attn1")
    videos = ("--validation_prompt", "a", "--validation_steps", "2", "--num_inference_steps", "1")
    code, messages = train(run, *flags, *videos)
    assert code == 0, messages
    theirs, averages = plain_fine_tuning(tiny_model, prepared, entries, 4, "attn1", 0.6)
    exported = CogVideoXPipeline.from_pretrained(run).transformer.state_dict()
    last = load_file(run / "checkpoints/step-00000004/trainable.safetensors")
    for name, value in averages.items():
        assert torch.equal(exported[name], value), name
        assert torch.equal(last[name], theirs.state_dict()[name])  # the model itself trained on, untouched
        assert not torch.equal(exported[name], last[name])
    _, halfway = plain_fine_tuning(tiny_model, prepared, entries, 2, "attn1", 0.6)
    assert all(torch.equal(shown[2][name], value) for name, value in halfway.items())


def test_the_lora_of_a_checkpoint_is_the_average_too(train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--max_train_steps", "3", "--ema_decay", "0.5")[0] == 0
    folder = run / "checkpoints/step-00000003"
    assert_same_files(folder / LORA, run / LORA)
    average, lora = load_file(folder / "ema.safetensors"), load_file(folder / LORA)
    for name, value in average.items():
        scale = 2 if "lora_B" in name else 1  # alpha / rank
        assert torch.equal(lora["transformer." + name.replace(".default", "")], value * scale)


def test_a_checkpoint_of_another_method_is_refused_naming_the_difference(train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--max_train_steps", "1")[0] == 0
    more = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    for flags, said in (
        (SFT, "another --training_type: lora there, sft here"),
        (("--use_dora",), "another --use_dora: False there, True here"),
        (("--use_rslora",), "another --use_rslora: False there, True here"),
    ):
        code, messages = train(run, *more, *flags)
        assert code == 2 and said in messages and "Traceback" not in messages


def test_modules_to_train_that_do_not_exist_are_refused_before_the_run_is_written_down(train, tmp_path: Path) -> None:
    code, messages = train(tmp_path / "run", *SFT, "--trainable_modules", "atn1")
    assert code == 2 and "--trainable_modules atn1" in messages and "attn1" in messages and "Traceback" not in messages
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.slow
def test_the_videos_of_the_last_test_are_those_of_the_exported_pipeline(
    cli: Cli, train, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: the last test loads the base model, and what is saved is the transformer alone.

    Not those of the base model, and those that `sample` and stock diffusers give.
    """
    tested: list[np.ndarray] = []
    monkeypatch.setattr(validation_module, "write_video", lambda path, frames, fps: tested.append(frames))
    run, quick = tmp_path / "run", ("--num_inference_steps", "2", "--num_frames", "9")
    prompt = "a red square moving left"
    code, messages = train(run, "--max_train_steps", "2", "--seed", "42", *SFT, *quick, "--validation_prompt", prompt)
    assert code == 0, messages
    before, after = tested

    def stock(model: Path) -> np.ndarray:
        images = CogVideoXPipeline.from_pretrained(model)(
            prompt, height=64, width=96, num_frames=9, num_inference_steps=2, guidance_scale=6.0,
            generator=torch.Generator().manual_seed(42), output_type="pil",
        ).frames[0]  # fmt: skip
        return np.stack([np.asarray(image) for image in images])

    assert np.array_equal(before, stock(tiny_model))
    assert np.array_equal(after, stock(run))
    assert not np.array_equal(before, after)

    def sampled(*flags: str | Path) -> tuple[np.ndarray, dict]:
        output = tmp_path / "frames"
        arguments = ("sample", "--run", run, "--prompt", prompt, *quick, "--output", output, "--json", *flags)
        code, made, messages = cli(*arguments)
        assert code == 0, messages
        return np.stack([np.asarray(Image.open(path)) for path in sorted(output.iterdir())]), json.loads(made)

    frames, made = sampled()
    assert np.array_equal(frames, after)
    assert (made["model"], made["lora"], made["weights"]) == (str(run), None, None)
    frames, made = sampled("--step", "0")
    assert np.array_equal(frames, before) and made["model"] == str(tiny_model)
    (run / "model_index.json").unlink()  # as while the run still trains
    frames, made = sampled("--step", "2")
    assert np.array_equal(frames, after)
    assert (made["lora"], made["weights"]) == (None, str(run / "checkpoints/step-00000002"))
    code, _, messages = cli("sample", "--run", run, "--prompt", prompt, "--output", tmp_path / "more")
    assert code == 2 and "--step takes one of its checkpoints (it has 2)" in messages


def test_the_checkpoints_average_is_what_sample_shows_of_a_step(cli: Cli, train, tmp_path: Path) -> None:
    run, quick = tmp_path / "run", ("--num_inference_steps", "1", "--num_frames", "9")
    assert train(run, "--max_train_steps", "2", "--ema_decay", "0.5", *SFT)[0] == 0
    frames: list[np.ndarray] = []
    for flags in ((), ("--step", "2")):
        output = tmp_path / f"frames{len(frames)}"
        code, _, messages = cli("sample", "--run", run, "--prompt", "a", *quick, "--output", output, *flags)
        assert code == 0, messages
        frames.append(np.stack([np.asarray(Image.open(path)) for path in sorted(output.iterdir())]))
    assert np.array_equal(frames[0], frames[1])
    code, _, messages = cli(
        *("sample", "--run", run, "--pretrained_model_name_or_path", "other/model", "--prompt", "a"),
        *("--output", tmp_path / "more"),
    )
    assert code == 2 and "--pretrained_model_name_or_path other/model" in messages and "whole model" in messages

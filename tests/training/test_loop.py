"""The loop against a plain PyTorch loop, against an uninterrupted run, and against a user's mistakes."""

from __future__ import annotations

import datetime
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from cogvideox_factory.config import Train, TrainingOptions, UserError
from cogvideox_factory.data import loader
from cogvideox_factory.data.loader import PreparedClips
from cogvideox_factory.data.sampler import Position, Sampler
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.encoders import TextEncoder, VideoEncoder
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.prepare import PATIENCE
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.training import checkpoint as checkpoint_module
from cogvideox_factory.training import loop
from cogvideox_factory.training.metrics import MetricsLog, read_metrics
from cogvideox_factory.training.validation import Validation

Cli = Callable[..., tuple[int, str, str]]
LORA = "pytorch_lora_weights.safetensors"


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


def plain_loop(model: Path, prepared: PreparedSet, entries: list[Entry], num_steps: int, accumulate: int = 1):
    """Thirty lines of PyTorch, diffusers and peft that train the same adapter on the same clips; its LoRA weights."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer").requires_grad_(False)
    torch.manual_seed(7)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    scheduler = CogVideoXDDIMScheduler.from_pretrained(model, subfolder="scheduler")
    pipeline = CogVideoXPipeline.from_pretrained(model)
    rotary = pipeline._prepare_rotary_positional_embeddings(64, 96, 5, torch.device("cpu"))
    sampler = Sampler([entry.bucket for entry in entries], 2, num_micro_batches=accumulate, seed=7)
    clips = PreparedClips(prepared, entries, prepared.read_settings()["empty_prompt"], seed=7, caption_dropout=0.1)
    steps = [(epoch, step) for epoch in range(num_steps) for step in sampler.epoch(epoch)]
    for epoch, step in steps[:num_steps]:
        for batch in clips[Position(epoch), step].batches:
            latents = batch.raw_latents * pipeline.vae.config.scaling_factor
            timesteps = (batch.timestep_quantiles * 1000).long()
            velocity = transformer(
                hidden_states=scheduler.add_noise(latents, batch.noise, timesteps),
                encoder_hidden_states=batch.prompt_embeds,
                timestep=timesteps,
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
            error = velocity - scheduler.get_velocity(latents, batch.noise, timesteps)
            (error.square().flatten(1).mean(1).mean() / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.01)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: value for name, value in transformer.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_equal_those_of_a_plain_loop_bit_for_bit(
    train, tmp_path: Path, tiny_model: Path, prepared: PreparedSet, entries: list[Entry], accumulate: int
) -> None:
    code, messages = train(
        tmp_path / "run",
        *("--seed", "7", "--max_train_steps", "8", "--lr_warmup_steps", "3", "--max_grad_norm", "0.01"),
        *("--lr_scheduler", "constant_with_warmup", "--gradient_accumulation_steps", str(accumulate)),
    )
    assert code == 0, messages
    ours = load_file(tmp_path / "run/checkpoints/step-00000008/trainable.safetensors")
    theirs = plain_loop(tiny_model, prepared, entries, 8, accumulate)
    assert ours.keys() == theirs.keys()
    assert any(value.abs().max() > 0 for name, value in theirs.items() if "lora_B" in name)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_weight(train, tmp_path: Path) -> None:
    for name, flags in (("plain", ()), ("checkpointed", ("--gradient_checkpointing",))):
        assert train(tmp_path / name, "--max_train_steps", "4", *flags)[0] == 0
    plain, checkpointed = (load_file(tmp_path / name / LORA) for name in ("plain", "checkpointed"))
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_gradient_checkpointing_recomputes_the_blocks(train, tmp_path: Path, monkeypatch) -> None:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    calls = []
    forward = CogVideoXBlock.forward

    def counted(*arguments, **options):
        calls.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(CogVideoXBlock, "forward", counted)
    assert train(tmp_path / "run", "--max_train_steps", "1", "--gradient_checkpointing")[0] == 0
    assert len(calls) == 2 * 4  # four blocks, forward and once more in the backward pass


class StopAfter:
    """Sends this process a signal right after a given step was logged, as a user or a cluster would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals):
        write = MetricsLog.write

        def write_then_signal(log: MetricsLog, **values) -> None:
            write(log, **values)
            if values["step"] == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(MetricsLog, "write", write_then_signal)


def test_a_run_stopped_by_signals_and_resumed_equals_one_never_stopped(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: a resume that restarts the data, or any other part of the course."""
    flags = ("--max_train_steps", "7", "--lr_scheduler", "cosine", "--gradient_accumulation_steps", "2")
    assert train(tmp_path / "whole", *flags)[0] == 0
    resumed = (*flags, "--resume_from_checkpoint", "latest")
    for step, number in ((2, signal.SIGINT), (5, signal.SIGTERM)):  # each within an epoch: three steps make one
        with monkeypatch.context() as patch:
            StopAfter(patch, step, number)
            code, messages = train(tmp_path / "parts", *resumed)
        told = f"stopped after step {step} of 7"
        assert code == 75 and told in messages and "--resume_from_checkpoint latest" in messages
    assert not (tmp_path / "parts" / LORA).exists()
    code, messages = train(tmp_path / "parts", *resumed)
    assert code == 0, messages
    for file in (LORA, "checkpoints/step-00000007/trainable.safetensors"):
        whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    volatile = ("step_seconds", "data_seconds", "memory_gib")
    whole_lines, part_lines = (
        [{key: value for key, value in line.items() if key not in volatile} for line in read_metrics(path)]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "parts/metrics.jsonl")
    )
    assert part_lines == whole_lines and [line["step"] for line in part_lines] == list(range(1, 8))


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_8bit", "--trainable_dtype", "bf16", "--rank", "64"),  # large enough for 8 bits
        pytest.param(
            ("--optimizer", "prodigy", "--learning_rate", "1", "--prodigy_safeguard_warmup", "--lr_warmup_steps", "2"),
            marks=pytest.mark.slow,
        ),
        ("--optimizer", "came"),
    ],
    ids=["adamw8bit-bf16", "prodigy", "came"],
)
def test_any_optimizer_resumed_equals_one_never_stopped(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    flags = ("--max_train_steps", "5", *flags)
    assert train(tmp_path / "whole", *flags)[0] == 0
    with monkeypatch.context() as patch:
        StopAfter(patch, 3, signal.SIGINT)
        assert train(tmp_path / "parts", *flags)[0] == 75
    code, messages = train(tmp_path / "parts", *flags, "--resume_from_checkpoint", "latest")
    assert code == 0 and "from now on" not in messages, messages
    file = "checkpoints/step-00000005/trainable.safetensors"
    whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and whole.keys() == parts.keys()
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)
    assert {value.dtype for value in whole.values()} == {torch.bfloat16 if "bf16" in flags else torch.float32}
    rates = [[line["lr"] for line in read_metrics(tmp_path / part / "metrics.jsonl")] for part in ("whole", "parts")]
    assert rates[0] == rates[1]
    if "prodigy" in flags:  # the rate that it found
        assert rates[0][0] == 0 and 0 < rates[0][2] <= 1e-6 and rates[0][-1] >= rates[0][2]
    rank = ("--rank", "64") if "64" in flags else ()  # the same adapter, by another optimizer
    code, messages = train(tmp_path / "parts", "--max_train_steps", "7", "--resume_from_checkpoint", "latest", *rank)
    assert code == 2 and " is of " in messages and "these options are of adamw" in messages


def test_optimizer_options_that_contradict_are_refused_before_anything_is_made(train, tmp_path: Path) -> None:
    code, messages = train(tmp_path / "run", "--use_8bit", "--use_4bit")
    assert code == 2 and "--use_8bit --use_4bit" in messages and "Traceback" not in messages
    assert not (tmp_path / "run").exists()


def test_resuming_from_an_older_checkpoint_drops_the_lines_after_it(train, tmp_path: Path) -> None:
    flags = ("--max_train_steps", "6", "--checkpointing_steps", "2")
    assert train(tmp_path / "run", *flags)[0] == 0
    before = load_file(tmp_path / "run" / LORA)
    code, messages = train(tmp_path / "run", *flags, "--resume_from_checkpoint", "step-00000002")
    assert code == 0 and "step-00000002" in messages
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(1, 7))
    after = load_file(tmp_path / "run" / LORA)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_latest_starts_from_the_beginning_where_nothing_is_saved_yet(train, tmp_path: Path) -> None:
    """Told to programs: a line of JSON a message, and of each step what metrics.jsonl has."""
    flags = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--log_format", "json")
    code, messages = train(tmp_path / "run", *flags)
    assert code == 0 and "starting from the beginning" in messages
    lines = [json.loads(line) for line in messages.splitlines()]
    metrics = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["metrics"] for line in lines if "metrics" in line] == metrics and len(metrics) == 2
    assert all(line["level"] == "info" and line["message"] and line["time"] for line in lines)


def test_what_was_trained_is_saved_where_videos_cannot_be_made(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self, step: int, *args, **kwargs) -> None:
        if step == 2:
            raise UserError("a picture is gone")

    monkeypatch.setattr(Validation, "run_in_memory", fail)
    run = tmp_path / "run"
    prompt = ("--validation_prompt", "a ship", "--validation_steps", "1")
    code, messages = train(run, "--max_train_steps", "3", "--checkpointing_steps", "3", *prompt)
    assert code == 2 and "a picture is gone" in messages
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000002"]


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_finished_run_says_so_and_exits_with_0(train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--max_train_steps", "2")[0] == 0
    last = load_file(run / LORA)
    # A run that was made longer may have been killed at its end, before it exported: this is of its earlier end.
    save_file({name: value * 2 for name, value in last.items()}, run / LORA)
    code, messages = train(run, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert code == 0 and "finished" in messages
    assert len(read_metrics(run / "metrics.jsonl")) == 2
    assert_same(load_file(run / LORA), last)


def test_a_folder_that_holds_a_run_is_refused(train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--max_train_steps", "1")[0] == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    code, messages = train(tmp_path / "run", "--max_train_steps", "1")
    assert code == 2 and "holds a run already" in messages and "Traceback" not in messages
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_folder_that_holds_a_model_is_refused(
    cli: Cli, tmp_path: Path, tiny_model: Path, prepared_folder: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    before = (tmp_path / "model/transformer/config.json").stat().st_mtime_ns
    data = ("--data_root", prepared_folder, "--load_tensors", "--max_train_steps", "1", "--training_type", "sft")
    for model in (tiny_model, tmp_path / "model"):
        output = ("--output_dir", tmp_path / "model", "--resume_from_checkpoint", "latest")
        code, _, messages = cli("train", "--pretrained_model_name_or_path", model, *data, *output)
        assert code == 2 and "holds a model" in messages
    assert (tmp_path / "model/transformer/config.json").stat().st_mtime_ns == before
    assert not (tmp_path / "model/config.yaml").exists()


def test_a_result_without_its_checkpoints_is_never_replaced(train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--max_train_steps", "1")[0] == 0
    before = (tmp_path / "run" / LORA).read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints")
    code, messages = train(tmp_path / "run", "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert code == 2 and "no checkpoint to go on from" in messages
    assert (tmp_path / "run" / LORA).read_bytes() == before


def test_weights_that_are_no_numbers_are_never_saved(train, tmp_path: Path, monkeypatch) -> None:
    """An update can break them though loss and gradient are finite; the next loss would be the first to say so."""
    step = torch.optim.AdamW.step
    calls = []

    def broken(optimizer, *arguments):
        calls.append(1)
        step(optimizer, *arguments)
        if len(calls) == 2:
            optimizer.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    flags = ("--max_train_steps", "3", "--checkpointing_steps", "1")
    code, messages = train(tmp_path / "run", *flags)
    assert code == 1 and "checkpoint of step 1" in messages
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000001"]
    assert not (tmp_path / "run" / LORA).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target_modules", "to_qq"), "--target_modules to_qq"),
        (("--training_type", "sft", "--trainable_modules", "attn7"), "--trainable_modules attn7"),
        (("--num_frames", "18"), "--num_frames 18"),
        (("--height", "50"), "--height 50"),
        (("--learning_rate", "1e38"), "--learning_rate"),
    ],
)
def test_a_typing_error_is_told_before_anything_is_encoded(
    cli: Cli, tmp_path: Path, tiny_model: Path, clips: Path, flags: tuple[str, ...], message: str
) -> None:
    model = ("--pretrained_model_name_or_path", tiny_model, "--data_root", clips, "--output_dir", tmp_path / "run")
    code, _, messages = cli("train", *model, "--max_train_steps", "1", *flags)
    assert code == 2 and message in messages
    assert not (tmp_path / "run").exists()


def test_what_changes_the_course_is_told_on_resume(train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--max_train_steps", "1", "--ema_decay", "0.9")[0] == 0
    more = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--caption_dropout", "0.5")
    code, messages = train(tmp_path / "run", *more)
    assert code == 0 and "with another" in messages
    assert "--ema_decay" in messages and "--caption_dropout" in messages and "--mixed_precision" not in messages


def test_config_yaml_repeats_the_run(train, cli: Cli, tmp_path: Path) -> None:
    assert train(tmp_path / "first", "--max_train_steps", "3", "--seed", "5")[0] == 0
    code, _, messages = cli("train", "--config", tmp_path / "first/config.yaml", "--output_dir", tmp_path / "again")
    assert code == 0, messages
    first, again = load_file(tmp_path / "first" / LORA), load_file(tmp_path / "again" / LORA)
    assert all(torch.equal(first[name], again[name]) for name in first)
    settings = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("first", "again")]
    assert settings[0].pop("output_dir") != settings[1].pop("output_dir")
    assert settings[0] == settings[1]


def test_checkpoints_are_kept_up_to_the_limit_newest_last(train, tmp_path: Path) -> None:
    flags = ("--max_train_steps", "5", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert train(tmp_path / "run", *flags)[0] == 0
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000005"]


def test_every_file_of_the_contract_is_written(train, tmp_path: Path) -> None:
    code, messages = train(
        tmp_path / "run",
        *("--max_train_steps", "2", "--checkpointing_steps", "1", "--validation_prompt", "a red square ::: a circle"),
        *("--validation_steps", "1", "--num_inference_steps", "2"),
    )
    assert code == 0, messages
    run = tmp_path / "run"
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and [line["samples_seen"] for line in lines] == [2, 4]
    expected = {"step", "epoch", "loss", "lr", "grad_norm", "step_seconds", "data_seconds", "samples_seen"}
    assert expected | {"memory_gib"} == set(lines[0])
    memory = json.loads((run / "memory.json").read_text())
    assert memory["kind"] == "resident memory of the process"
    assert set(memory["measured"]) == {
        *("memory_before_training", "memory_before_validation", "memory_after_validation", "memory_after_testing")
    }
    for step in (0, 1, 2):
        folder = run / f"validation/step-{step:08}"
        listed = json.loads((folder / "prompts.json").read_text())
        assert [item["prompt"] for item in listed] == ["a red square", "a circle"]
        assert all((folder / item["file"]).stat().st_size > 0 for item in listed)
    assert (run / "report.html").exists() and (run / LORA).exists() and (run / "config.yaml").exists()
    assert not list(run.rglob("*.part")) and not list(run.rglob(".lora-*"))


def test_memory_of_the_gpu_is_never_claimed_on_a_cpu(train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--max_train_steps", "1")[0] == 0
    measured = json.loads((tmp_path / "run/memory.json").read_text())["measured"]
    assert 0.1 < measured["memory_before_training"] <= measured["memory_before_validation"] < 20


def test_raw_clips_are_prepared_into_the_run_and_reused(
    cli: Cli, tmp_path: Path, tiny_model: Path, few_clips: Path
) -> None:
    flags = ("--pretrained_model_name_or_path", tiny_model, "--data_root", few_clips, "--output_dir", tmp_path / "run")
    code, _, messages = cli("train", *flags, "--max_train_steps", "1")
    assert code == 0, messages
    report = json.loads((tmp_path / "run/prepared/report.json").read_text())
    assert (report["encoded"], report["reused"]) == (2, 0)
    code, _, messages = cli("train", *flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert code == 0, messages
    report = json.loads((tmp_path / "run/prepared/report.json").read_text())
    assert (report["encoded"], report["reused"]) == (0, 2)


def test_training_raw_clips_equals_training_the_prepared_set(
    cli: Cli, train, tmp_path: Path, tiny_model: Path, clips: Path
) -> None:
    code, _, messages = cli(
        *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", clips, "--output_dir"),
        *(tmp_path / "raw", "--rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2"),
        *("--train_batch_size", "2", "--max_train_steps", "3"),
    )
    assert code == 0, messages
    assert train(tmp_path / "prepared", "--max_train_steps", "3")[0] == 0
    raw, prepared = load_file(tmp_path / "raw" / LORA), load_file(tmp_path / "prepared" / LORA)
    assert all(torch.equal(raw[name], prepared[name]) for name in raw)


def test_a_set_prepared_with_another_vae_is_refused(
    cli: Cli, tmp_path: Path, prepared_folder: Path, tiny_model: Path
) -> None:
    from cogvideox_factory.demo.tiny_model import build_tiny_pipeline

    build_tiny_pipeline(seed=99).save_pretrained(tmp_path / "other")
    code, _, messages = cli(
        *("train", "--pretrained_model_name_or_path", tmp_path / "other", "--data_root", prepared_folder),
        *("--load_tensors", "--report_to", "none", "--output_dir", tmp_path / "run", "--max_train_steps", "1"),
    )
    assert code == 2 and "another vae" in messages and "Traceback" not in messages


def test_a_checkpoint_of_another_adapter_is_refused_naming_every_difference(train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--max_train_steps", "1")[0] == 0
    flags = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--rank", "8", "--lora_alpha", "16")
    code, messages = train(tmp_path / "run", *flags, "--target_modules", "to_q")
    assert code == 2 and "Traceback" not in messages
    assert "another --rank: 4 there, 8 here; another --lora_alpha: 8.0 there, 16.0 here" in messages
    assert "another --target_modules: to_k to_out.0 to_q to_v there, to_q here" in messages


def test_accumulated_micro_batches_give_the_loss_of_one_batch(train, tmp_path: Path) -> None:
    """Each clip of a step weighs the same however the step is cut, because its random numbers belong to it."""
    losses = []
    for size, accumulate in (("4", "1"), ("2", "2"), ("1", "4")):
        run = tmp_path / size
        flags = ("--train_batch_size", size, "--gradient_accumulation_steps", accumulate)
        assert train(run, "--max_train_steps", "4", *flags)[0] == 0
        losses.append([line["loss"] for line in read_metrics(run / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_the_frozen_base_is_what_it_was(train, tmp_path: Path, monkeypatch, tiny_model: Path) -> None:
    models = []
    build = loop.build_model

    def build_and_keep(*arguments):
        models.append(build(*arguments))
        return models[-1]

    monkeypatch.setattr(loop, "build_model", build_and_keep)
    assert train(tmp_path / "run", "--max_train_steps", "3")[0] == 0
    base = CogVideoXTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer").state_dict()
    trained = {name.replace(".base_layer", ""): value for name, value in models[0].state_dict().items()}
    assert all(torch.equal(trained[name], value) for name, value in base.items())


def test_a_finished_run_keeps_its_lora_and_config_when_started_with_other_settings(train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--max_train_steps", "2")[0] == 0
    before = [(run / name).read_bytes() for name in ("config.yaml", "memory.json")]
    lora = load_file(run / LORA)
    again = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    code, messages = train(run, *again, "--lora_alpha", "1000")
    assert code == 2 and "--lora_alpha: 8.0 there, 1000.0 here" in messages
    assert train(run, *again, "--learning_rate", "0.5")[0] == 0
    assert [(run / name).read_bytes() for name in ("config.yaml", "memory.json")] == before
    assert_same(load_file(run / LORA), lora)


def test_a_checkpoint_of_another_base_model_is_refused(cli: Cli, train, tiny_model: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--max_train_steps", "1")[0] == 0
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = other / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    flags = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--pretrained_model_name_or_path", other)
    code, messages = train(tmp_path / "run", *flags)
    named = f"another base model (--pretrained_model_name_or_path): {tiny_model} there, {other} here"
    assert code == 2 and named in messages


def test_a_learning_rate_changed_on_resume_takes_effect_and_is_told(train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--max_train_steps", "2")[0] == 0
    flags = ("--max_train_steps", "4", "--resume_from_checkpoint", "latest", "--learning_rate", "3e-3")
    code, messages = train(run, *flags)
    assert code == 0 and "another --learning_rate" in messages
    assert [line["lr"] for line in read_metrics(run / "metrics.jsonl")] == [1e-2, 1e-2, 3e-3, 3e-3]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Epoch and key of every clip that is read for training, in order."""
    seen: list[tuple[int, str]] = []
    generator = loader.clip_generator

    def note(seed: int, epoch: int, key: str) -> torch.Generator:
        seen.append((epoch, key))
        return generator(seed, epoch, key)

    monkeypatch.setattr(loader, "clip_generator", note)
    return seen


@pytest.mark.slow
def test_every_clip_once_an_epoch_though_the_batch_changes_in_it_twice(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[Entry], drawn: list[tuple[int, str]]
) -> None:
    """Trap, with other batches: four steps of two clips, two of one, the last two in a step of three; two epochs."""
    run = tmp_path / "run"
    flags = ["--num_train_epochs", "3", "--lr_scheduler", "linear", "--resume_from_checkpoint", "latest"]
    flags += ["--validation_prompt", "a", "--validation_epochs", "1", "--num_inference_steps", "1"]
    for size, last_step, num_steps in ((2, 4, 3 * 6), (1, 6, 4 + 4 + 2 * 12)):
        with monkeypatch.context() as patch:
            StopAfter(patch, last_step, signal.SIGINT)
            code, messages = train(run, *flags, "--train_batch_size", str(size))
        assert code == 75 and f"stopped after step {last_step} of {num_steps}" in messages
    num_steps = 4 + 2 + 1 + 2 * 4
    code, messages = train(run, *flags, "--train_batch_size", "3")
    assert code == 0 and f"steps      {num_steps}, of which 6 done; 4 an epoch" in messages
    assert "divided anew" in messages and "next epoch" not in messages
    assert sorted(drawn) == sorted((epoch, entry.key) for epoch in range(3) for entry in entries)
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [0] * 7 + [1] * 4 + [2] * 4
    assert [line["samples_seen"] for line in lines] == [2, 4, 6, 8, 9, 10, 12, *range(15, 37, 3)]
    # The rate goes to zero at the end, wherever that is by now.
    assert [line["lr"] for line in lines[6:]] == pytest.approx([1e-2 * (1 - step / 15) for step in range(6, 15)])
    videos = sorted(path.name for path in (run / "validation").iterdir())
    assert videos == [f"step-{step:08}" for step in (0, 7, 11, 15)]


@pytest.mark.parametrize(("last_step", "epochs"), [(4, [0] * 4 + [1] * 6), (6, [0] * 6 + [1] * 6)])
def test_another_order_begins_with_the_next_epoch(
    train, tmp_path: Path, entries: list[Entry], drawn: list[tuple[int, str]], last_step: int, epochs: list[int]
) -> None:
    run = tmp_path / "run"
    assert train(run, "--max_train_steps", str(last_step))[0] == 0
    drawn.clear()
    flags = ("--num_train_epochs", "2", "--resume_from_checkpoint", "latest", "--seed", "5")
    code, messages = train(run, *flags)
    assert code == 0 and "seed differ from those of the checkpoint: going on with the next epoch" in messages
    assert [line["epoch"] for line in read_metrics(run / "metrics.jsonl")] == epochs
    assert sorted(drawn) == sorted((1, entry.key) for entry in entries)


def test_other_clips_begin_with_the_next_epoch(
    train, tmp_path: Path, prepared: PreparedSet, entries: list[Entry], drawn: list[tuple[int, str]]
) -> None:
    run = tmp_path / "run"
    assert train(run, "--max_train_steps", "2")[0] == 0
    drawn.clear()
    flags = ("--num_train_epochs", "2", "--resume_from_checkpoint", "latest")
    code, messages = train(run, *flags, "--data_root", part_of(prepared, entries[:5], tmp_path / "five"))
    assert code == 0 and "clips differ from those of the checkpoint: going on with the next epoch" in messages
    assert sorted(drawn) == sorted((1, entry.key) for entry in entries[:5])


def test_a_run_of_whole_epochs_that_is_over_stays_over(train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--num_train_epochs", "2")[0] == 0
    for size in ("2", "1", "5"):
        flags = ("--num_train_epochs", "2", "--resume_from_checkpoint", "latest", "--train_batch_size", size)
        code, messages = train(tmp_path / "run", *flags)
        assert code == 0 and "finished" in messages
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 12


def test_a_run_made_longer_has_the_rate_of_its_new_course_at_once(train, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", ("--lr_scheduler", "cosine", "--resume_from_checkpoint", "latest")
    assert train(run, "--max_train_steps", "4", *flags)[0] == 0
    assert train(run, "--max_train_steps", "8", *flags)[0] == 0
    rates = [line["lr"] for line in read_metrics(run / "metrics.jsonl")]
    expected = [
        1e-2 * (1 + math.cos(math.pi * step / length)) / 2
        for length, steps in ((4, range(4)), (8, range(4, 8)))
        for step in steps
    ]
    assert rates == pytest.approx(expected)


def test_a_rate_that_scales_with_the_batch_follows_it_on_resume(train, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", ("--scale_lr", "--resume_from_checkpoint", "latest")
    assert train(run, "--max_train_steps", "2", *flags)[0] == 0
    assert train(run, "--max_train_steps", "4", *flags, "--train_batch_size", "3")[0] == 0
    assert [line["lr"] for line in read_metrics(run / "metrics.jsonl")] == pytest.approx([2e-2, 2e-2, 3e-2, 3e-2])


def test_drop_last_leaves_out_what_fills_no_batch(train, tmp_path: Path, drawn: list[tuple[int, str]]) -> None:
    flags = ("--num_train_epochs", "2", "--train_batch_size", "5", "--drop_last")
    assert train(tmp_path / "run", *flags)[0] == 0
    assert [line["samples_seen"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [5, 10, 15, 20]
    assert len(set(drawn)) == 20 and [epoch for epoch, _ in drawn] == [0] * 10 + [1] * 10


def test_drop_last_that_leaves_nothing_is_refused(train, tmp_path: Path) -> None:
    code, messages = train(tmp_path / "run", "--train_batch_size", "13", "--drop_last")
    assert code == 2 and "--train_batch_size 13" in messages and "12 of 17x64x96" in messages
    assert "Traceback" not in messages and not (tmp_path / "run/config.yaml").exists()


def test_processes_wait_for_the_slowest_as_long_as_preparing_takes(checkpoint: Checkpoint) -> None:
    handler = loop.make_accelerator(Train(), checkpoint).init_handler
    assert handler is not None and handler.timeout == PATIENCE


def test_nccl_timeout_is_how_long_processes_wait(checkpoint: Checkpoint) -> None:
    options = Train(training=TrainingOptions(nccl_timeout=1800))
    handler = loop.make_accelerator(options, checkpoint).init_handler
    assert handler is not None and handler.timeout == datetime.timedelta(minutes=30)


def test_the_objective_that_is_asked_for_is_what_is_minimised_and_shown(
    train, tmp_path: Path, tiny_model: Path, prepared: PreparedSet, entries: list[Entry]
) -> None:
    """The first step's loss, of a model whose adapter is still zero, from the formulas; a change of it is told."""
    run = tmp_path / "run"
    flags = ["--timestep_sampling", "logit_normal", "--logit_mean", "-0.5", "--logit_std", "1.5", "--seed", "7"]
    flags += ["--stratified_timesteps", "--gradient_accumulation_steps", "2", "--caption_dropout", "0"]
    assert train(run, "--max_train_steps", "1", *flags, "--snr_gamma", "0.5")[0] == 0
    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer")
    scheduler = CogVideoXDDIMScheduler.from_pretrained(tiny_model, subfolder="scheduler")
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    rotary = pipeline._prepare_rotary_positional_embeddings(64, 96, 5, torch.device("cpu"))
    step = Sampler([entry.bucket for entry in entries], 2, num_micro_batches=2, seed=7).epoch(0)[0]
    empty = prepared.read_settings()["empty_prompt"]
    clips = PreparedClips(prepared, entries, empty, seed=7, caption_dropout=0.0, stratified_timesteps=True)
    losses = []
    for batch in clips[Position(), step].batches:
        latents = batch.raw_latents * pipeline.vae.config.scaling_factor
        places = torch.sigmoid(-0.5 + 1.5 * torch.special.ndtri(batch.timestep_quantiles.double()))
        timesteps = (places * 1000).long()
        with torch.no_grad():
            velocity = transformer(
                hidden_states=scheduler.add_noise(latents, batch.noise, timesteps),
                encoder_hidden_states=batch.prompt_embeds,
                timestep=timesteps,
                image_rotary_emb=rotary,
            ).sample
        snr = compute_snr(scheduler, timesteps)
        error = (velocity - scheduler.get_velocity(latents, batch.noise, timesteps)).square().flatten(1).mean(1)
        losses.append(error * snr.clamp(max=0.5) / (snr + 1))
    (line,) = read_metrics(run / "metrics.jsonl")
    assert line["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    resumed = ("--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--snr_gamma", "5")
    code, messages = train(run, *flags, *resumed)
    assert code == 0 and "another --snr_gamma than before" in messages


def part_of(prepared: PreparedSet, entries: list[Entry], folder: Path) -> Path:
    """A prepared set of only these entries."""
    shutil.copytree(prepared.folder, folder)
    PreparedSet(folder).write_index(entries, prepared.read_settings())
    return folder


def train_on_two_processes(*flags: str | Path) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "cogvideox_factory", "train", *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_going_on_with_two_processes_gives_the_weights_of_one(
    train, tmp_path: Path, prepared: PreparedSet, entries: list[Entry]
) -> None:
    """Eleven clips by two, so that at an epoch's end a process has no clip of its own; two processes from step 3 on."""
    eleven = part_of(prepared, entries[:11], tmp_path / "eleven")
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, "--data_root", eleven, "--max_train_steps", "8", "--checkpointing_steps", "3")[0] == 0
    train_on_two_processes(
        *("--config", one / "config.yaml", "--output_dir", two, "--train_batch_size", "1"),
        *("--resume_from_checkpoint", one / "checkpoints/step-00000003"),
    )
    ours, theirs = load_file(two / LORA), load_file(one / LORA)
    before = load_file(one / "checkpoints/step-00000003" / LORA)
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-5), name
    assert any((before[name] - value).abs().max() > 1e-3 for name, value in theirs.items())
    per_step = [line["samples_seen"] for line in read_metrics(two / "metrics.jsonl")]
    assert per_step == [8, 10, 11, 13, 15]


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_last_good_state(train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--max_train_steps", "9", "--checkpointing_steps", "1", "--learning_rate", "1e30", "--max_grad_norm", "0")
    code, messages = train(run, *flags, "--max_skipped_steps", "2")
    assert code == 1 and "Traceback" not in messages and "the last good state is the checkpoint of step" in messages
    assert not (run / LORA).exists()
    json.loads("[" + ",".join((run / "metrics.jsonl").read_text().splitlines()) + "]", parse_constant=pytest.fail)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_names_the_last_good_one(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = tmp_path / "run", checkpoint_module.write_tensors

    def full(tensors: Any, path: Path) -> str:
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        return write(tensors, path)

    monkeypatch.setattr(checkpoint_module, "write_tensors", full)
    code, messages = train(run, "--max_train_steps", "9", "--checkpointing_steps", "2")
    assert code == 1 and "Traceback" not in messages
    assert "step 4 could not be written" in messages and "last good state is the checkpoint of step 2" in messages
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002"] and not (run / LORA).exists()
    assert not list((run / "checkpoints").glob(".*"))


def test_going_back_sets_the_later_course_aside(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: killed before it saves, a run must not go on from a checkpoint whose metrics are gone."""
    run = tmp_path / "run"
    there: list[list[str]] = []
    load = loop.load_steps

    def look_and_load(*arguments: Any, **options: Any) -> Any:
        there.append([path.name for path in list_checkpoints(run)])
        return load(*arguments, **options)

    monkeypatch.setattr(loop, "load_steps", look_and_load)
    flags = ["--checkpointing_steps", "2", "--validation_prompt", "a", "--validation_steps", "2"]
    flags += ["--num_inference_steps", "1"]
    assert train(run, "--max_train_steps", "6", *flags)[0] == 0
    code, messages = train(run, "--max_train_steps", "3", *flags, "--resume_from_checkpoint", "step-00000002")
    assert code == 0, messages
    assert there == [[], ["step-00000002"]]
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002", "step-00000003"]
    videos = sorted(path.name for path in (run / "validation").iterdir())
    assert videos == ["left-step-00000004", "left-step-00000006", *(f"step-{step:08}" for step in (0, 2, 3))]


def test_options_that_only_preparing_knows_are_told_to_be_without_effect(train, tmp_path: Path) -> None:
    code, messages = train(tmp_path / "run", "--max_train_steps", "1", "--id_token", "TOKEN", "--use_tiling")
    assert code == 0 and "--id_token --use_tiling: without effect" in messages
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["id_token"] is None


def test_a_prepared_set_that_lost_files_is_refused_before_the_training(
    cli: Cli, tiny_model: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(prepared_folder, tmp_path / "set")
    shutil.rmtree(damaged / "prompts")
    code, _, messages = cli(
        *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", damaged, "--load_tensors"),
        *("--output_dir", tmp_path / "run", "--max_train_steps", "1"),
    )
    assert code == 2 and "are missing" in messages and "prepare" in messages


def test_what_a_run_went_on_from_is_not_part_of_its_config(train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--max_train_steps", "1", "--resume_from_checkpoint", "latest")[0] == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["resume_from_checkpoint"] is None


def test_a_variable_named_rank_of_the_users_own_does_not_silence_the_run(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "16")
    code, messages = train(tmp_path / "run", "--max_train_steps", "1")
    assert code == 0 and "LoRA       " in messages and (tmp_path / "run/report.html").exists()


def test_a_step_waits_for_the_device_once(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: `.item()` per parameter for the gradient norm. Each such call makes the GPU's queue run dry."""
    waits: list[list[str]] = []
    is_counting = False

    def within(function: Callable[..., Any], counts: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal is_counting
            before, is_counting = is_counting, counts
            if counts:
                waits.append([])
            try:
                return function(*arguments, **options)
            finally:
                is_counting = before

        return call

    def noted(name: str) -> Callable[..., Any]:
        read = getattr(torch.Tensor, name)

        def call(*arguments: Any) -> Any:
            if is_counting:
                waits[-1].append(name)
            return read(*arguments)

        return call

    monkeypatch.setattr(loop, "optimizer_step", within(loop.optimizer_step, True))
    # The optimizer reads its own counter of steps, which lies on the CPU.
    monkeypatch.setattr(torch.optim.AdamW, "step", within(torch.optim.AdamW.step, False))
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, noted(name))
    flags = ("--max_train_steps", "3", "--gradient_accumulation_steps", "2", "--snr_gamma", "5")
    assert train(tmp_path / "run", *flags)[0] == 0
    assert waits[1:] == [["tolist"]] * 2  # the first step also makes what is kept, such as positions


def test_training_on_prepared_tensors_never_loads_an_encoder(train, tmp_path: Path, monkeypatch) -> None:
    """Trap: the T5 on the GPU even when training reads prepared tensors."""

    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(TextEncoder, "load", refused)
    monkeypatch.setattr(VideoEncoder, "load", refused)
    monkeypatch.setattr(CogVideoXPipeline, "from_pretrained", refused)
    code, messages = train(tmp_path / "run", "--max_train_steps", "1", "--validation_fraction", "0.4")
    assert code == 0, messages

"""What the training loop adds to a bare forward + backward + optimizer step on the same prepared tensors.

Both are interleaved step by step in one process: after every iteration of the real `train` command (timed from one
line of metrics to the next, so that loading, clipping, logging and the progress bar count) one step of a plain
PyTorch loop runs that has its tensors in memory and does nothing else. Whatever else the machine does falls on both.

    python benchmarks/training_step.py [--runs 5] [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig

from cogvideox_factory.cli import main as cli
from cogvideox_factory.data.loader import Batch, PreparedClips
from cogvideox_factory.data.sampler import Position, Sampler
from cogvideox_factory.data.store import PreparedSet
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.demo.world import render_clips
from cogvideox_factory.training.metrics import MetricsLog

BATCH_SIZE, RANK, WARM_UP = 4, 16, 10


class BareStep:
    """A LoRA training step of plain PyTorch, diffusers and peft."""

    def __init__(self, model: Path, batch: Batch):
        self.transformer = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")
        self.transformer.requires_grad_(False).train()
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        self.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        trained = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        pipeline = CogVideoXPipeline.from_pretrained(model)
        scheduler = CogVideoXDDIMScheduler.from_pretrained(model, subfolder="scheduler")
        latents = batch.raw_latents * pipeline.vae.config.scaling_factor
        timesteps = (batch.timestep_quantiles * 1000).long()
        frames, height, width = latents.shape[1], latents.shape[3] * 8, latents.shape[4] * 8
        self.inputs = {
            "hidden_states": scheduler.add_noise(latents, batch.noise, timesteps),
            "encoder_hidden_states": batch.prompt_embeds,
            "timestep": timesteps,
            "image_rotary_emb": pipeline._prepare_rotary_positional_embeddings(height, width, frames, latents.device),
        }
        self.target = scheduler.get_velocity(latents, batch.noise, timesteps)

    def __call__(self) -> None:
        velocity = self.transformer(**self.inputs, return_dict=False)[0]
        torch.nn.functional.mse_loss(velocity, self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def time_run(model: Path, prepared: Path, run: Path, steps: int, bare_step: BareStep) -> tuple[float, float]:
    """Median seconds of an iteration of the training loop, and of the bare steps run between them."""
    ours: list[float] = []
    bare: list[float] = []
    last = time.perf_counter()
    write = MetricsLog.write

    def write_then_run_a_bare_step(self: MetricsLog, **values: object) -> None:
        nonlocal last
        write(self, **values)
        written = time.perf_counter()
        bare_step()
        ours.append(written - last)
        last = time.perf_counter()
        bare.append(last - written)

    with mock.patch.object(MetricsLog, "write", write_then_run_a_bare_step):
        code = cli(
            [
                *("train", "--pretrained_model_name_or_path", str(model), "--data_root", str(prepared)),
                *("--load_tensors", "--output_dir", str(run), "--rank", str(RANK), "--lora_alpha", str(RANK)),
                *("--train_batch_size", str(BATCH_SIZE), "--max_train_steps", str(steps + WARM_UP)),
                *("--checkpointing_steps", "1000000"),
            ]
        )
    assert code == 0
    return statistics.median(ours[WARM_UP:]), statistics.median(bare[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_tiny_pipeline().save_pretrained(root / "model")
        render_clips(root / "clips")
        flags = ["--pretrained_model_name_or_path", root / "model", "--data_root", root / "clips"]
        assert cli(["prepare", *map(str, flags), "--output_dir", str(root / "prepared")]) == 0
        prepared = PreparedSet(root / "prepared")
        entries = prepared.read_index()
        empty_prompt = prepared.read_settings()["empty_prompt"]
        clips = PreparedClips(prepared, entries, empty_prompt, seed=0, caption_dropout=0.1)
        step = Sampler([entry.bucket for entry in entries], BATCH_SIZE).epoch(0)[0]
        batch = clips[Position(), step].batches[0]
        runs = []
        for index in range(arguments.runs):
            bare_step = BareStep(root / "model", batch)
            ours, bare = time_run(root / "model", root / "prepared", root / f"run-{index}", arguments.steps, bare_step)
            runs.append({"ours_ms": ours * 1000, "bare_ms": bare * 1000, "ratio": ours / bare})
            print(f"run {index + 1}: {ours * 1000:.1f} ms a step, bare {bare * 1000:.1f} ms, {ours / bare:.3f}×")
    ratios = [run["ratio"] for run in runs]
    print(f"ratio: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    if arguments.output:
        result = {
            "date": date.today().isoformat(),
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")},
            "runs": runs,
            "median_ratio": statistics.median(ratios),
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What is said before the first step of a training, and after its last."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml

from cogvideox_factory.config import Train
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.data.split import num_videos
from cogvideox_factory.model.adapters import LORA_FILE, describe_method
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.model.pipeline_folder import is_pipeline
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.training.run_data import TrainingData
from cogvideox_factory.training.step_progress import next_checkpoint

logger = logging.getLogger(__name__)
PHASES = {  # names in memory.json, as people call them
    "memory_before_validation": "training",
    "memory_after_validation": "validation",
    "memory_after_testing": "testing",
}


def tell_start(
    checkpoint: Checkpoint,
    options: Train,
    data: TrainingData,
    held_out_data: TrainingData | None,
    num_trained: int,
    num_steps: int,
    sampler: Sampler,
    step: int,
    planned: Mapping[str, float] | None,
) -> None:
    """What is about to happen, after `step` of `num_steps`. `planned` are peaks in GiB under memory.json's names."""
    buckets = [entry.bucket for entry in data.entries]
    sizes = ", ".join(f"{buckets.count(bucket)} of {bucket}" for bucket in sorted(set(buckets)))
    logger.info("model      %s (%s)", checkpoint.name, checkpoint.task)
    logger.info(
        "method     %s, %s trainable parameters",
        describe_method(options.method, options.lora),
        f"{num_trained:,}",
    )
    logger.info("clips      %s (frames × height × width)", sizes)
    if held_out_data:
        of_videos = num_videos(held_out_data.entries), num_videos(data.entries)
        logger.info("held out   %d clips of %d videos; %d are trained on", len(held_out_data.entries), *of_videos)
    logger.info("steps      %d, of which %d done; %d an epoch", num_steps, step, sampler.steps_per_epoch())
    phases = [f"{PHASES[name]} {peak:.1f}" for name, peak in (planned or {}).items() if name in PHASES]
    if phases:
        logger.info("memory     planned peaks in GiB of the GPU: %s", ", ".join(phases))
    if step < num_steps:
        upcoming = next_checkpoint(step, num_steps, options.training.checkpointing_steps)
        logger.info("saving     the next checkpoint after %d steps", upcoming - step)


def tell_end(run: Path, *, was_shared: bool) -> None:
    """What a complete run has written, with sizes, and what can be done with it."""
    is_whole = is_pipeline(run)
    result = run if is_whole else run / LORA_FILE
    logger.info("%-10s %s", "model" if is_whole else "LoRA", result)
    rows = [
        ("transformer" if is_whole else LORA_FILE, "what was trained"),
        ("report.html", "losses, memory and videos; open it in a browser"),
        ("README.md", "model card, with the lines of Python for diffusers"),
        ("validation", "the videos, step by step"),
        ("checkpoints", f"states to go on from: {len(list_checkpoints(run))}"),
        ("prepared", "latents and embeddings of the clips"),
    ]
    there = [(run / name, about) for name, about in rows if (run / name).exists()]
    for path, about in there:
        logger.info("written    %-35s %8s  %s", path.name + "/" * path.is_dir(), as_size(size_of(path)), about)
    image = " --image FILE" if _is_image_to_video(run) else ""
    sample = f'cogvideox-factory sample --run {shlex.quote(str(run))} --prompt "…"{image} --output video.mp4'
    logger.info("use it     %s", sample)
    if not was_shared:
        config = shlex.quote(str(run / "config.yaml"))
        command = f"cogvideox-factory train --config {config} --resume_from_checkpoint latest --push_to_hub"
        logger.info("share it   hf auth login && %s", command)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def as_size(num_bytes: float) -> str:
    """In the largest unit of which there is one, 1000 of the one before: 283 kB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def _is_image_to_video(run: Path) -> bool:
    """As the model card says, for the Hub, in the block at its top."""
    try:
        text = (run / "README.md").read_text(encoding="utf-8")
        return yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "image-to-video"
    except (OSError, LookupError, TypeError, yaml.YAMLError):  # edited, or not there: the command is almost right
        return False

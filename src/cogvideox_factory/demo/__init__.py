"""The whole chain on a CPU in minutes: ordinary commands on a tiny model and rendered clips.

Nothing elsewhere in the package knows of the demo; it makes input and runs the commands that a user would type.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from cogvideox_factory.config import Demo, MessageOptions, UserError

MARKER = ".cogvideox-factory-demo"
logger = logging.getLogger(__name__)


def run(options: Demo, command: Callable[[Sequence[str]], int]) -> None:
    """Make the input, then prepare, train, sample and report with `command`, the program's own entry point.

    Raises UserError where the output folder holds something else, and SystemExit with the code of a command that
    fails.
    """
    from cogvideox_factory.demo.clips import PROMPTS, render_clips
    from cogvideox_factory.demo.tiny_model import build_tiny_pipeline

    root = options.output_dir
    _empty_folder(root)
    model, clips, prepared, trained = root / "model", root / "clips", root / "prepared", root / "run"
    logger.info("1/6  a tiny CogVideoX of random weights → %s", model)
    build_tiny_pipeline(seed=options.seed).save_pretrained(model)
    logger.info("2/6  rendered clips with captions → %s", clips)
    render_clips(clips)

    def step(title: str, *arguments: str | Path) -> None:
        words = [*map(str, arguments), *_flags(options.messages)]
        logger.info("\n%s\n     $ cogvideox-factory %s", title, shlex.join(words))
        code = command(words)
        if code:
            raise SystemExit(code)

    model_flag = ("--pretrained_model_name_or_path", model)
    seed = ("--seed", str(options.seed))
    step(
        "3/6  clips and captions become latents and embeddings, once",
        *("prepare", *model_flag, "--data_root", clips, "--output_dir", prepared),
    )
    step(
        "4/6  a LoRA is trained on them, with videos of the model before and after",
        *("train", *model_flag, "--data_root", prepared, "--load_tensors", "--output_dir", trained, *seed),
        *("--rank", "16", "--lora_alpha", "16", "--learning_rate", "2e-3"),
        *("--train_batch_size", "4", "--max_train_steps", "150", "--lr_warmup_steps", "10"),
        *("--checkpointing_steps", "50", "--checkpoints_total_limit", "2"),
        *("--validation_prompt", ":::".join(PROMPTS[:2]), "--num_inference_steps", "20"),
    )
    step(
        "5/6  a video of the trained model",
        *("sample", "--run", trained, "--prompt", PROMPTS[0], "--num_inference_steps", "20", *seed),
        *("--output", root / "sample.mp4"),
    )
    step("6/6  the report", "report", "--run", trained)
    logger.info("\nDone. Open the report in a browser; it is one file.")
    logger.info("  LoRA    %s", trained / "pytorch_lora_weights.safetensors")
    logger.info("  videos  %s and %s", trained / "validation", root / "sample.mp4")
    logger.info("  report  %s", trained / "report.html")


def _flags(messages: MessageOptions) -> list[str]:
    """As they are given to the demo, for its commands."""
    given, default = dataclasses.asdict(messages), dataclasses.asdict(MessageOptions())
    return [word for name, value in given.items() if value != default[name] for word in (f"--{name}", value)]


def _empty_folder(root: Path) -> None:
    """An empty folder, marked as ours. Raises UserError where it has content that no demo wrote."""
    try:
        if root.exists() and any(root.iterdir()):
            if not (root / MARKER).exists():
                raise UserError(f"--output_dir {root}: is not empty and was not made by a demo; choose another folder")
            shutil.rmtree(root)
        root.mkdir(parents=True, exist_ok=True)
        (root / MARKER).touch()
    except OSError as error:
        raise UserError(
            f"--output_dir {root}: cannot be written to ({error.strerror}); choose another folder"
        ) from error

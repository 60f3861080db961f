"""The whole chain on a CPU in minutes: ordinary commands on a tiny model and rendered clips.

Nothing elsewhere in the package knows of the demo; it makes input and runs the commands that a user would type.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from cogvideox_factory.config import Demo, MessageOptions, UserError
from cogvideox_factory.demo.world import FPS, NATIVE_SIZE, Scene, all_scenes, render_clips

MARKER = ".cogvideox-factory-demo"
STYLE, NUM_CLIPS = "neon", 24
SHOWN = (
    Scene("red", "triangle", "growing", "light"),
    Scene("yellow", "circle", "moving right", "brown"),
    Scene("cyan", "square", "moving up", "grey"),
)
logger = logging.getLogger(__name__)


def run(options: Demo, command: Callable[[Sequence[str]], int]) -> None:
    """Make the input, then prepare, train, sample and report with `command`, the program's own entry point.

    Raises UserError where the output folder holds something else, and SystemExit with the code of a command that
    fails.
    """
    from cogvideox_factory.demo.learned_model import copy_learned_model

    root = options.output_dir
    _empty_folder(root)
    model, clips, prepared, trained = root / "model", root / "clips", root / "prepared", root / "run"
    logger.info("1/7  a tiny CogVideoX that paints coloured shapes → %s", model)
    copy_learned_model(model)
    logger.info("2/7  clips in a style that it cannot paint, %s, with captions → %s", STYLE, clips)
    render_clips(clips, lesson(options.seed), NATIVE_SIZE, STYLE)

    def step(title: str, *arguments: str | Path) -> None:
        words = [*map(str, arguments), *_flags(options.messages)]
        logger.info("\n%s\n     $ cogvideox-factory %s", title, shlex.join(words))
        code = command(words)
        if code:
            raise SystemExit(code)

    model_flag = ("--pretrained_model_name_or_path", model)
    seed = ("--seed", str(options.seed))
    video = ("--num_inference_steps", "20", "--guidance_scale", "3")
    step(
        "3/7  clips and captions become latents and embeddings, once",
        *("prepare", *model_flag, "--data_root", clips, "--output_dir", prepared),
    )
    step(
        "4/7  a LoRA is trained on them; as it learns, videos of captions that it is not trained on",
        *("train", *model_flag, "--data_root", prepared, "--load_tensors", "--output_dir", trained, *seed),
        *("--rank", "16", "--lora_alpha", "16", "--learning_rate", "2e-3"),
        *("--train_batch_size", "8", "--max_train_steps", "200", "--lr_warmup_steps", "10"),
        *("--checkpointing_steps", "100", "--checkpoints_total_limit", "2"),
        *("--validation_prompt", ":::".join(scene.caption for scene in SHOWN), "--validation_steps", "50", *video),
    )
    step(
        "5/7  a video of the trained model",
        *("sample", "--run", trained, "--prompt", SHOWN[0].caption, *video, *seed),
        *("--output", root / "sample.mp4"),
    )
    step("6/7  the report", "report", "--run", trained)
    logger.info("\n7/7  base, fine-tuned and target: how far each is from the target, of 255")
    picture = _compare(root, trained)
    logger.info("\nDone. Open the report in a browser; it is one file.")
    logger.info("  LoRA     %s", trained / "pytorch_lora_weights.safetensors")
    logger.info("  videos   %s and %s", trained / "validation", root / "sample.mp4")
    logger.info("  picture  %s: base, fine-tuned and target side by side", picture)
    logger.info("  report   %s", trained / "report.html")


def lesson(seed: int) -> list[Scene]:
    """The scenes that the LoRA is trained on, none of those that are shown."""
    scenes = [scene for scene in all_scenes() if scene not in SHOWN]
    return random.Random(seed).sample(scenes, NUM_CLIPS)


def _compare(root: Path, run: Path) -> Path:
    """Say the distances of the videos of before and after the training, and draw them beside what was to be learned."""
    from cogvideox_factory.demo.before_after import BeforeAfter, read_all, write_animation
    from cogvideox_factory.run_folder import step_folders

    before, *_, after = step_folders(run / "validation")
    rows = []
    for number, scene in enumerate(SHOWN):
        base, tuned = (read_all(folder / f"prompt-{number:02}-video-0.mp4") for folder in (before, after))
        rows.append(BeforeAfter(scene.caption, base, tuned, scene.render(NATIVE_SIZE, STYLE)))
        distances = (*rows[-1].distances, rows[-1].distance_of_nothing)
        logger.info("     base %6.1f → fine-tuned %6.1f (an empty night: %.1f)   %s", *distances, scene.caption)
    picture = root / "before-after.gif"
    write_animation(picture, rows, FPS)
    return picture


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
            f"--output_dir {root}: cannot be written to ({error.strerror or error}); choose another folder"
        ) from error

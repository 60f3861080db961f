"""Every member of the family from clips to frames: what a run saves, stock diffusers turns into the frames that
`sample` gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from members import IMAGE_TO_VIDEO, MEMBERS
from PIL import Image

from cogvideox_factory.data.video import write_video
from cogvideox_factory.demo.clips import PROMPTS, render
from cogvideox_factory.training.metrics import read_metrics

Cli = Callable[..., tuple[int, str, str]]
SIZES = {"native": (17, 64, 96), "portrait": (16, 96, 64)}


@pytest.fixture(scope="module")
def two_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-clips")
    for number, scene in enumerate((("red", "square", "left"), ("blue", "circle", "up"))):
        write_video(folder / f"{number}.mp4", render(*scene), 8)
        (folder / f"{number}.txt").write_text(f"a {scene[0]} {scene[1]} moving {scene[2]} on a dark background")
    return folder


@pytest.fixture(scope="module")
def start_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of neither shape, so that it has to be cropped."""
    path = tmp_path_factory.mktemp("image") / "start.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (100, 100, 3), dtype=np.uint8)).save(path)
    return path


def frames_in(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("name", list(MEMBERS))
def test_a_lora_gives_in_stock_diffusers_the_frames_that_sample_gives(
    cli: Cli, member: Callable[[str], Path], two_clips: Path, start_image: Path, tmp_path: Path, name: str, size: str
) -> None:
    frames, height, width = SIZES[size]
    run, takes_image = tmp_path / "run", name in IMAGE_TO_VIDEO
    ignores_positions = name == "5b-I2V" and size == "portrait"
    code, _, messages = cli(
        *("train", "--pretrained_model_name_or_path", member(name), "--data_root", two_clips, "--output_dir", run),
        *("--frame_buckets", frames, "--height_buckets", height, "--width_buckets", width, "--fps", 8),
        *("--num_decode_workers", 0, "--max_train_steps", 3, "--learning_rate", "0.1", "--lora_alpha", "16"),
        *("--rank", 8, "--num_image_draws", 1),
        *(("--ignore_learned_positional_embeddings",) if ignores_positions else ()),
    )
    assert code == 0, messages
    assert len(read_metrics(run / "metrics.jsonl")) == 3
    command = ("sample", "--prompt", PROMPTS[0], "--num_inference_steps", 2, "--seed", 4)
    image_flag = ("--image", start_image) if takes_image else ()
    code, _, messages = cli(*command, "--run", run, *image_flag, "--output", tmp_path / "ours")
    assert code == 0, messages

    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 6.0, "num_frames": frames}
    settings |= {"height": height, "width": width, "max_sequence_length": 226}
    pipeline_class = CogVideoXImageToVideoPipeline if takes_image else CogVideoXPipeline
    pipeline = pipeline_class.from_pretrained(member(name))
    if ignores_positions:
        pipeline.transformer.patch_embed.use_learned_positional_embeddings = False
    if takes_image:
        covering = Image.open(start_image).resize((max(height, width),) * 2, Image.Resampling.LANCZOS)
        left, top = (covering.width - width) // 2, (covering.height - height) // 2
        settings["image"] = covering.crop((left, top, left + width, top + height))
    pipeline.set_progress_bar_config(disable=True)

    def stock() -> np.ndarray:
        generator = torch.Generator().manual_seed(4)
        images = pipeline(prompt=PROMPTS[0], generator=generator, output_type="pil", **settings).frames[0]
        return np.stack([np.asarray(image) for image in images])

    untrained = stock()
    pipeline.load_lora_weights(run)
    expected, ours = stock(), frames_in(tmp_path / "ours")
    assert ours.shape == expected.shape == (frames, height, width, 3)
    assert np.array_equal(ours, expected)
    assert not np.array_equal(expected, untrained)

"""Every member of the family from clips to frames: what a run saves, stock diffusers turns into the frames that
`sample` gives."""

from __future__ import annotations

import json
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
from cogvideox_factory.demo.world import PROMPTS, Scene
from cogvideox_factory.training import validation
from cogvideox_factory.training.metrics import read_metrics

Cli = Callable[..., tuple[int, str, str]]
SIZES = {"native": (17, 64, 96), "portrait": (16, 96, 64)}


@pytest.fixture(scope="module")
def two_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-clips")
    scenes = (Scene("red", "square", "moving left", "dark"), Scene("blue", "circle", "moving up", "dark"))
    for number, scene in enumerate(scenes):
        write_video(folder / f"{number}.mp4", scene.render(), 8)
        (folder / f"{number}.txt").write_text(scene.caption)
    return folder


@pytest.fixture(scope="module")
def start_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of neither shape, so that it has to be cropped."""
    path = tmp_path_factory.mktemp("image") / "start.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (100, 100, 3), dtype=np.uint8)).save(path)
    return path


def cut(picture: Image.Image, height: int, width: int) -> Image.Image:
    """A picture scaled to cover a size, and what is too much cut off on both sides alike."""
    scale = max(height / picture.height, width / picture.width)
    left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
    box = (left, top, picture.width - left, picture.height - top)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box)


def frames_in(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize(
    ("name", "method", "size"),
    [
        *((name, "lora", "native") for name in MEMBERS),
        *((name, "sft", "portrait") for name in MEMBERS),
        ("5b-I2V", "lora", "portrait"),
    ],
)
def test_what_a_run_saves_gives_in_stock_diffusers_the_frames_that_sample_gives(
    cli: Cli,
    member: Callable[[str], Path],
    two_clips: Path,
    start_image: Path,
    tmp_path: Path,
    name: str,
    method: str,
    size: str,
) -> None:
    frames, height, width = SIZES[size]
    run, takes_image = tmp_path / "run", name in IMAGE_TO_VIDEO
    ignores_positions = name == "5b-I2V" and size == "portrait"
    code, _, messages = cli(
        *("train", "--pretrained_model_name_or_path", member(name), "--data_root", two_clips, "--output_dir", run),
        *("--frame_buckets", frames, "--height_buckets", height, "--width_buckets", width, "--fps", 8),
        *("--num_decode_workers", 0, "--num_image_draws", 1, "--max_train_steps", 3, "--report_to", "none"),
        *("--training_type", method, "--learning_rate", "0.1" if method == "lora" else "0.01"),
        *(("--rank", 8, "--lora_alpha", 16) if method == "lora" else ()),
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
    if takes_image:
        settings["image"] = cut(Image.open(start_image), height, width)

    def stock(pipeline) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(4)
        images = pipeline(prompt=PROMPTS[0], generator=generator, output_type="pil", **settings).frames[0]
        return np.stack([np.asarray(image) for image in images])

    pipeline_class = CogVideoXImageToVideoPipeline if takes_image else CogVideoXPipeline
    base = pipeline_class.from_pretrained(member(name))
    if ignores_positions:  # of a LoRA its user has to do so; the pipeline of a full fine-tuning says it itself
        base.transformer.patch_embed.use_learned_positional_embeddings = False
    untrained = stock(base)
    if method == "lora":
        base.load_lora_weights(run)
        expected = stock(base)
    else:
        expected = stock(pipeline_class.from_pretrained(run))
    ours = frames_in(tmp_path / "ours")
    assert ours.shape == expected.shape == (frames, height, width, 3)
    assert np.array_equal(ours, expected)
    assert not np.array_equal(expected, untrained)


@pytest.mark.slow
def test_validation_of_image_to_video_starts_from_its_pictures(
    cli: Cli, member: Callable[[str], Path], two_clips: Path, start_image: Path, tmp_path: Path, monkeypatch
) -> None:
    """From the model in memory and from what was saved alike, each against the stock pipeline."""
    made: list[np.ndarray] = []
    monkeypatch.setattr(validation, "write_video", lambda path, frames, fps: made.append(frames))
    run = tmp_path / "run"
    flags = (
        *(
            "train",
            "--pretrained_model_name_or_path",
            member("1.5-5B-I2V"),
            "--data_root",
            two_clips,
            "--output_dir",
            run,
        ),
        *("--frame_buckets", 9, "--height_buckets", 64, "--width_buckets", 96, "--fps", 8, "--num_decode_workers", 0),
        *("--max_train_steps", 1, "--learning_rate", "0.1", "--rank", 4, "--num_inference_steps", 2),
        *("--validation_prompt", "a red square:::a blue circle", "--validation_images", f"first_frame:::{start_image}"),
    )
    code, _, messages = cli(*flags)
    assert code == 0, messages
    assert len(made) == 4  # two before the training, two of what was saved
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(member("1.5-5B-I2V"))
    pipeline.set_progress_bar_config(disable=True)
    for step in (0, 1):
        listed = json.loads((run / f"validation/step-{step:08}/prompts.json").read_text())
        if step:
            pipeline.load_lora_weights(run)
        for number, video in enumerate(listed):
            picture = Image.open(run / "validation" / video["image"])
            assert picture.size == ((96, 64), (100, 100))[number]
            images = pipeline(
                cut(picture, 64, 96),
                video["prompt"],
                num_frames=9,
                height=64,
                width=96,
                num_inference_steps=2,
                guidance_scale=6.0,
                generator=torch.Generator().manual_seed(video["seed"]),
                output_type="pil",
            ).frames[0]
            assert np.array_equal(np.stack([np.asarray(image) for image in images]), made[2 * step + number])
    code, _, messages = cli(*flags, "--resume_from_checkpoint", "latest")
    assert code == 0 and "finished" in messages
    assert len(made) == 4  # nothing is made again


@pytest.mark.parametrize("is_raw", [True, False])
def test_learned_positions_are_refused_for_other_sizes_before_anything_is_encoded(
    cli: Cli, member: Callable[[str], Path], two_clips: Path, tmp_path: Path, is_raw: bool
) -> None:
    model = ("--pretrained_model_name_or_path", member("5b-I2V"), "--fps", 8, "--num_decode_workers", 0)
    size = ("--frame_buckets", 9, "--height_buckets", 96, "--width_buckets", 64)
    if not is_raw:
        assert cli("prepare", *model, *size, "--data_root", two_clips, "--output_dir", tmp_path / "set")[0] == 0
    data = (*size, "--data_root", two_clips) if is_raw else ("--load_tensors", "--data_root", tmp_path / "set")
    train = ("train", *model, *data, "--output_dir", tmp_path / "run", "--max_train_steps", 1)
    code, _, messages = cli(*train)
    assert code == 2 and "96×64" in messages and "--ignore_learned_positional_embeddings" in messages
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    native = (*model, "--data_root", two_clips, "--output_dir", tmp_path / "run", "--validation_prompt", "a")
    code, _, messages = cli("train", *native, "--height", 96, "--width", 64)  # of its videos alone
    assert code == 2 and "96×64" in messages
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    code, _, messages = cli(*train, "--ignore_learned_positional_embeddings")
    assert code == 0, messages
    resumed = ("--max_train_steps", 2, "--resume_from_checkpoint", "latest", "--image_latents_scale", "divide")
    code, _, messages = cli(*train, "--ignore_learned_positional_embeddings", *resumed)
    assert code == 2 and "--image_latents_scale" in messages

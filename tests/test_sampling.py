"""The `sample` command makes what stock diffusers makes of the same files, and refuses what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig
from PIL import Image

from cogvideox_factory.cli import main
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline

Cli = Callable[..., tuple[int, str, str]]
PROMPT = "a red square moving left"
LORA = "pytorch_lora_weights.safetensors"
SMALL = ("--height", "32", "--width", "48", "--num_frames", "9", "--num_inference_steps", "2")


def stock(model: Path, lora: Path | None = None, size: tuple[int, int, int] = (9, 32, 48), **options: Any) -> np.ndarray:
    """Frames that stock diffusers makes."""
    pipeline = CogVideoXPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    frames, height, width = size
    settings: dict[str, Any] = {"guidance_scale": 6.0, **options}
    images = pipeline(
        PROMPT,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="pil",
        **settings,
    ).frames[0]
    return np.stack([np.asarray(image) for image in images])


def read_pngs(folder: Path) -> np.ndarray:
    paths = sorted(folder.iterdir())
    assert {path.suffix for path in paths} == {".png"}
    return np.stack([np.asarray(Image.open(path)) for path in paths])


@pytest.fixture
def sample(cli: Cli, tmp_path: Path) -> Callable[..., np.ndarray]:
    """Frames that the command makes."""

    def call(*flags: str | Path, size: Sequence[str] = SMALL) -> np.ndarray:
        output = tmp_path / "frames"
        code, _, messages = cli("sample", "--prompt", PROMPT, "--output", output, "--seed", "5", *size, *flags)
        assert code == 0, messages
        return read_pngs(output)

    return call


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> np.ndarray:
    return stock(tiny_model)


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LoRA made by peft and diffusers, with alpha three times the rank."""
    folder = tmp_path_factory.mktemp("lora")
    transformer = CogVideoXPipeline.from_pretrained(tiny_model).transformer
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            weights[name.replace(".default", "")] = torch.randn(parameter.shape, generator=generator) * 0.2
    CogVideoXPipeline.save_lora_weights(
        folder, weights, transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict()
    )
    return folder


@pytest.fixture(scope="module")
def run(tiny_model: Path, prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two steps, each with a checkpoint, whose videos are to be 9×32×48."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--max_train_steps", "2", "--learning_rate", "1e-1", "--rank", "4", "--lora_alpha", "8"]
    sizes = ["--height", "32", "--width", "48", "--num_frames", "9", "--checkpointing_steps", "1"]
    arguments = ["train", "--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder]
    assert main([*map(str, arguments), "--load_tensors", "--output_dir", str(folder), *flags, *sizes]) == 0
    return folder


# --- what is made ---


def test_base_model_at_its_native_size(sample, tiny_model: Path) -> None:
    frames = sample("--pretrained_model_name_or_path", tiny_model, size=("--num_inference_steps", "2"))
    assert frames.shape == (17, 64, 96, 3)
    assert np.array_equal(frames, stock(tiny_model, size=(17, 64, 96)))


def test_size_and_seed_are_those_asked_for(sample, tiny_model: Path, base: np.ndarray) -> None:
    frames = sample("--pretrained_model_name_or_path", tiny_model)
    assert np.array_equal(frames, base)
    other = sample("--pretrained_model_name_or_path", tiny_model, "--seed", "6")
    assert other.shape == base.shape
    assert not np.array_equal(other, base)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (("--guidance_scale", "1"), {"guidance_scale": 1.0}),
        (("--guidance_scale", "30"), {"guidance_scale": 30.0}),
        (("--use_dynamic_cfg", "--guidance_scale", "30"), {"use_dynamic_cfg": True, "guidance_scale": 30.0}),
    ],
)
def test_guidance_is_that_of_stock(
    sample, tiny_model: Path, base: np.ndarray, flags: tuple[str, ...], options: dict[str, Any]
) -> None:
    frames = sample("--pretrained_model_name_or_path", tiny_model, *flags)
    assert np.array_equal(frames, stock(tiny_model, **options))
    assert not np.array_equal(frames, base)


@pytest.mark.parametrize("name", ["", LORA])
def test_lora_at_the_strength_of_its_metadata(
    sample, tiny_model: Path, lora: Path, base: np.ndarray, name: str
) -> None:
    frames = sample("--pretrained_model_name_or_path", tiny_model, "--lora", lora / name)
    assert np.array_equal(frames, stock(tiny_model, lora))
    assert not np.array_equal(frames, base)


def test_run_is_its_model_with_its_lora_at_its_size(sample, tiny_model: Path, run: Path, base: np.ndarray) -> None:
    frames = sample("--run", run, size=("--num_inference_steps", "2"))
    assert frames.shape == (9, 32, 48, 3)
    assert np.array_equal(frames, stock(tiny_model, run))
    assert not np.array_equal(frames, base)


def test_step_of_a_run_is_its_checkpoint(sample, tiny_model: Path, run: Path) -> None:
    frames = sample("--run", run, "--step", "1")
    assert np.array_equal(frames, stock(tiny_model, run / "checkpoints" / "step-00000001"))
    assert not np.array_equal(frames, stock(tiny_model, run))


def test_step_0_of_a_run_is_the_base_model(sample, run: Path, base: np.ndarray) -> None:
    assert np.array_equal(sample("--run", run, "--step", "0"), base)


def test_model_that_takes_latent_frames_in_pairs(sample, tmp_path: Path) -> None:
    model = tmp_path / "1.5"
    build_tiny_pipeline(patch_size_t=2, patch_bias=False, num_layers=1).save_pretrained(model)
    assert np.array_equal(sample("--pretrained_model_name_or_path", model), stock(model))


@pytest.mark.parametrize(("flags", "rate"), [((), 8), (("--fps", "12"), 12)])
def test_mp4_shows_the_frames_at_the_rate(
    cli: Cli, tmp_path: Path, tiny_model: Path, base: np.ndarray, flags: tuple[str, ...], rate: int
) -> None:
    output = tmp_path / "video.mp4"
    arguments = ("--pretrained_model_name_or_path", tiny_model, "--prompt", PROMPT, "--output", output, "--seed", "5")
    code, _, messages = cli("sample", *arguments, *SMALL, *flags)
    assert code == 0, messages
    with av.open(str(output)) as container:
        assert container.streams.video[0].average_rate == rate
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == base.shape
    ours, expected = (video.astype(float).mean(-1).reshape(9, -1) for video in (frames, base))
    likeness = np.corrcoef(ours, expected)[:9, 9:]  # of each frame's brightness: the colours are stored coarsely
    assert likeness.diagonal().min() > 0.9
    assert likeness.argmax(1).tolist() == list(range(9))
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_json_is_one_object_on_standard_output(cli: Cli, tmp_path: Path, tiny_model: Path, lora: Path) -> None:
    output = tmp_path / "frames"
    model = ("--pretrained_model_name_or_path", tiny_model, "--lora", lora)
    code, out, _ = cli("sample", *model, "--prompt", PROMPT, "--output", output, "--seed", "5", *SMALL, "--json")
    assert code == 0
    assert json.loads(out) == {
        "output": str(output),
        "prompt": PROMPT,
        "seed": 5,
        "model": str(tiny_model),
        "lora": str(lora),
        "frames": 9,
        "height": 32,
        "width": 48,
        "fps": 8.0,
    }
    assert len(list(output.iterdir())) == 9


def test_without_json_nothing_is_on_standard_output(cli: Cli, tmp_path: Path, tiny_model: Path) -> None:
    output = tmp_path / "frames"
    code, out, messages = cli(
        "sample", "--pretrained_model_name_or_path", tiny_model, "--prompt", PROMPT, "--output", output, *SMALL
    )
    assert (code, out) == (0, "")
    assert str(output) in messages


# --- what is refused ---


@pytest.fixture
def refusal(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """The one line that a refused command says; nothing may have been made."""

    def call(*flags: str | Path, output: str = "frames", prompt: Sequence[str] = ("--prompt", PROMPT)) -> str:
        code, out, messages = cli("sample", *flags, *prompt, "--output", tmp_path / output, "--num_inference_steps", "2")
        assert code == 2, messages
        assert out == ""
        assert "Traceback" not in messages
        errors = [line for line in messages.splitlines() if "error" in line]
        assert len(errors) == 1 and errors[0].startswith("cogvideox-factory: error: "), messages
        assert not (tmp_path / output).exists()
        return errors[0]

    return call


def test_unknown_kind_of_file_is_refused(refusal, tiny_model: Path) -> None:
    message = refusal("--pretrained_model_name_or_path", tiny_model, output="video.gif")
    assert "--output" in message and "video.gif" in message and ".mp4" in message


def test_run_with_lora_is_refused(refusal, run: Path, lora: Path) -> None:
    message = refusal("--run", run, "--lora", lora)
    assert "--run" in message and "--lora" in message


def test_step_without_run_is_refused(refusal, tiny_model: Path) -> None:
    message = refusal("--pretrained_model_name_or_path", tiny_model, "--step", "1")
    assert "--step 1" in message and "--run" in message


def test_missing_step_is_refused_with_those_that_are_there(refusal, run: Path) -> None:
    message = refusal("--run", run, "--step", "7")
    assert "--step 7" in message and message.endswith("it has 1, 2")


def test_neither_run_nor_model_is_refused(refusal) -> None:
    message = refusal()
    assert "--run" in message and "--pretrained_model_name_or_path" in message


def test_missing_run_is_refused(refusal, tmp_path: Path) -> None:
    message = refusal("--run", tmp_path / "no-such-run")
    assert str(tmp_path / "no-such-run") in message


def test_missing_lora_is_refused(refusal, tiny_model: Path, tmp_path: Path) -> None:
    message = refusal("--pretrained_model_name_or_path", tiny_model, "--lora", tmp_path / "no-such-lora")
    assert str(tmp_path / "no-such-lora") in message


def test_file_that_is_no_lora_is_refused(refusal, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_bytes(b"these are no weights")
    message = refusal("--pretrained_model_name_or_path", tiny_model, "--lora", tmp_path / "notes.safetensors")
    assert "--lora" in message and "notes.safetensors" in message


@pytest.mark.parametrize(
    ("flag", "value", "near"), [("height", "100", "96"), ("width", "90", "96"), ("height", "5", "16")]
)
def test_size_that_is_no_multiple_of_16_is_refused_with_one_that_is(
    refusal, tiny_model: Path, flag: str, value: str, near: str
) -> None:
    message = refusal("--pretrained_model_name_or_path", tiny_model, f"--{flag}", value)
    assert f"--{flag} {value}" in message and "multiple of 16" in message and near in message


def test_missing_prompt_is_refused(refusal, tiny_model: Path) -> None:
    assert "--prompt is missing" in refusal("--pretrained_model_name_or_path", tiny_model, prompt=())


def test_image_to_video_checkpoint_is_refused(refusal, tmp_path: Path) -> None:
    model = tmp_path / "model"
    build_tiny_pipeline(in_channels=16, num_layers=1).save_pretrained(model)
    message = refusal("--pretrained_model_name_or_path", model)
    assert f"--pretrained_model_name_or_path {model}" in message and "image-to-video" in message


def test_lora_of_another_model_is_refused(refusal, tmp_path: Path, lora: Path) -> None:
    model = tmp_path / "wider"
    build_tiny_pipeline(num_attention_heads=2, num_layers=1).save_pretrained(model)
    message = refusal("--pretrained_model_name_or_path", model, "--lora", lora)
    assert f"--lora {lora}" in message and str(model) in message

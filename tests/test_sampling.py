"""Videos are those of the stock pipeline, frame for frame; mistakes are told in one message before any work."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from cogvideox_factory import sampling
from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import (
    BlockOptions,
    LoraOptions,
    SamplingOptions,
    TextEncoderOptions,
    Train,
    UserError,
    config_text,
)
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.manifest import seal
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.memory.block_swap import BlockSwap, swap_of
from cogvideox_factory.memory.rotation import RotationInParts
from cogvideox_factory.memory.set_aside import set_model_aside
from cogvideox_factory.model.adapters import LORA_FILE, attach_lora, save_lora, trainable_parameters
from cogvideox_factory.model.denoiser import load_scheduler, load_transformer
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.sampling import Video, generate, place, resolve_sampling, write_video_list
from cogvideox_factory.stopping import StopRequest
from cogvideox_factory.training import validation
from cogvideox_factory.training.validation import Validation

Cli = Callable[..., tuple[int, str, str]]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # a device object needs no GPU
PROMPT = "a red square moving left"
SIZE = ("--num_frames", "9", "--height", "32", "--width", "48")
QUICK = ("--num_inference_steps", "2")


def stock_frames(pipeline: CogVideoXPipeline, seed: int = 42, **options: Any) -> np.ndarray:
    """What stock diffusers makes of the prompt, as pictures of its own rounding."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "prompt": PROMPT,
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 6.0,
        **options,
    }
    images = pipeline(generator=torch.Generator().manual_seed(seed), output_type="pil", **settings).frames[0]
    return np.stack([np.asarray(image) for image in images])


def read_pngs(folder: Path) -> np.ndarray:
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{index:05}.png" for index in range(len(files))]
    return np.stack([np.asarray(Image.open(file)) for file in files])


def read_mp4(path: Path) -> tuple[np.ndarray, Fraction]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        assert rate is not None
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), rate


def with_lora(checkpoint: Checkpoint, seed: int) -> Any:
    """A transformer with an adapter that shows (a fresh one adds nothing), alpha other than rank."""
    transformer = load_transformer(checkpoint, torch.float32)
    attach_lora(transformer, LoraOptions(rank=4, lora_alpha=8), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable_parameters(transformer).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return transformer


def train_options(checkpoint: Checkpoint, *flags: str) -> Train:
    """Options of a training, with the rate that a training fills in."""
    arguments = ["--pretrained_model_name_or_path", str(checkpoint.folder), "--data_root", "d", "--output_dir", "o"]
    options = parse_command(Train, "train", [*arguments, *flags])
    return dataclasses.replace(options, data=dataclasses.replace(options.data, fps=5.0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    """A run with a final LoRA and two checkpoints, each with a LoRA of its own."""
    run = tmp_path_factory.mktemp("run")
    options = train_options(checkpoint, *SIZE, "--max_sequence_length", "16")
    (run / "config.yaml").write_text(config_text(options))
    save_lora(with_lora(checkpoint, 1), run)
    for step in (2, 10):
        save_lora(with_lora(checkpoint, step), run / "checkpoints" / f"step-{step:08}")
        seal(run / "checkpoints" / f"step-{step:08}")
    return run


@pytest.fixture
def sample(cli: Cli, tiny_model: Path, tmp_path: Path) -> Callable[..., np.ndarray]:
    """Frames of a base model, as `sample` writes them."""

    def call(*flags: str | Path) -> np.ndarray:
        output = tmp_path / "frames"
        code, _, messages = cli(
            *("sample", "--pretrained_model_name_or_path", tiny_model, "--prompt", PROMPT, "--output", output),
            *(*QUICK, *flags),
        )
        assert code == 0, messages
        return read_pngs(output)

    return call


@pytest.fixture
def sample_run(cli: Cli, trained: Path, tmp_path: Path) -> Callable[..., np.ndarray]:
    """Frames of a run, as `sample` writes them."""

    def call(*flags: str | Path) -> np.ndarray:
        output = tmp_path / "frames"
        arguments = ("--run", trained, "--prompt", PROMPT, "--output", output)
        code, _, messages = cli("sample", *arguments, *QUICK, *flags)
        assert code == 0, messages
        return read_pngs(output)

    return call


# --- a base model ---


@pytest.mark.parametrize(
    ("flags", "seed", "settings"),
    [
        pytest.param((), 42, {}, id="defaults"),
        pytest.param(("--seed", "7"), 7, {}, id="another-seed"),
        pytest.param(("--guidance_scale", "1"), 42, {"guidance_scale": 1.0}, id="no-guidance"),
        pytest.param(("--guidance_scale", "2.5"), 42, {"guidance_scale": 2.5}, id="other-guidance"),
        pytest.param(("--num_inference_steps", "3"), 42, {"num_inference_steps": 3}, id="more-steps"),
        pytest.param(("--prompt", "a blue circle"), 42, {"prompt": "a blue circle"}, id="another-prompt"),
        pytest.param(("--width", "64"), 42, {"width": 64}, id="another-size"),
    ],
)
def test_frames_equal_those_of_the_stock_pipeline(
    sample: Callable[..., np.ndarray], tiny_model: Path, flags: tuple[str, ...], seed: int, settings: dict[str, Any]
) -> None:
    expected = stock_frames(CogVideoXPipeline.from_pretrained(tiny_model), seed, **settings)
    assert np.array_equal(sample(*SIZE, *flags), expected)


def test_dynamic_guidance_changes_the_frames_as_in_the_stock_pipeline(
    sample: Callable[..., np.ndarray], tiny_model: Path
) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    expected = stock_frames(pipeline, use_dynamic_cfg=True)
    assert not np.array_equal(expected, stock_frames(pipeline))
    assert np.array_equal(sample(*SIZE, "--use_dynamic_cfg"), expected)


def test_dtype_is_that_of_the_whole_stock_pipeline(sample: Callable[..., np.ndarray], tiny_model: Path) -> None:
    expected = stock_frames(CogVideoXPipeline.from_pretrained(tiny_model, dtype=torch.bfloat16))
    assert np.array_equal(sample(*SIZE, "--dtype", "bf16"), expected)


def test_size_is_the_checkpoints_by_default(sample: Callable[..., np.ndarray], tiny_model: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    expected = stock_frames(pipeline, height=64, width=96, num_frames=17, num_inference_steps=1)
    assert np.array_equal(sample("--num_inference_steps", "1"), expected)


def test_scheduler_is_the_checkpoints_own(cli: Cli, tmp_path: Path) -> None:
    pipeline = build_tiny_pipeline(num_layers=1)
    pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "model")
    arguments = ("--pretrained_model_name_or_path", tmp_path / "model", "--prompt", PROMPT, *SIZE)
    code, _, messages = cli("sample", *arguments, "--output", tmp_path / "frames", "--num_inference_steps", "3")
    assert code == 0, messages
    expected = stock_frames(CogVideoXPipeline.from_pretrained(tmp_path / "model"), num_inference_steps=3)
    assert np.array_equal(read_pngs(tmp_path / "frames"), expected)


def test_slicing_and_tiling_reach_the_vae(sample: Callable[..., np.ndarray], tiny_model: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    whole = stock_frames(pipeline, width=96)
    pipeline.vae.enable_tiling()
    tiled = stock_frames(pipeline, width=96)
    assert not np.array_equal(tiled, whole)
    assert np.array_equal(sample(*SIZE, "--width", "96", "--enable_tiling", "--enable_slicing"), tiled)


# --- a LoRA, a run ---


@pytest.mark.parametrize("is_file", [False, True], ids=["folder", "file"])
def test_lora_equals_stock_load_lora_weights(
    sample: Callable[..., np.ndarray], tiny_model: Path, trained: Path, is_file: bool
) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    base = stock_frames(pipeline)
    pipeline.load_lora_weights(trained, weight_name=LORA_FILE)
    expected = stock_frames(pipeline)
    assert not np.array_equal(expected, base)
    assert np.array_equal(sample(*SIZE, "--lora", trained / LORA_FILE if is_file else trained), expected)


@pytest.mark.parametrize(
    ("flags", "num_swaps"),
    [
        (("--resident_blocks", "2"), 1),
        (("--offload_text_encoder",), 1),
        (("--offload_text_encoder", "--resident_blocks", "1", "--guidance_scale", "1"), 2),
    ],
)
def test_models_that_pass_through_the_memory_make_the_same_frames(
    flags: tuple[str, ...], num_swaps: int, sample_run: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they are compared with is that of the stock pipeline, as other tests see."""
    swaps: list[BlockSwap] = []
    init = BlockSwap.__init__

    def remember(self: BlockSwap, *arguments: Any) -> None:
        init(self, *arguments)
        swaps.append(self)

    asides: list[Any] = []

    def aside(model: Any, device: torch.device) -> Any:
        asides.append(model)
        return set_model_aside(model, device)

    monkeypatch.setattr(BlockSwap, "__init__", remember)
    monkeypatch.setattr(sampling, "set_model_aside", aside)
    guidance = flags[-2:] if "--guidance_scale" in flags else ()
    expected = sample_run(*guidance)
    assert not swaps
    assert np.array_equal(sample_run(*flags), expected)
    assert len(swaps) == num_swaps and all(swap.num_copies >= 2 for swap in swaps)
    assert len(asides) == ("--resident_blocks" in flags)
    if asides:  # the LoRA travels too
        moved = swaps[-1].parameters()
        blocks = asides[0].transformer_blocks
        assert all(type(attention) is RotationInParts for attention in asides[0].attn_processors.values())
        assert moved == set(blocks.parameters()) and any("lora_A" in name for name, _ in blocks.named_parameters())


def test_the_feed_forward_of_sample_works_in_chunks(sample_run: Callable[..., np.ndarray]) -> None:
    expected = sample_run().astype(int)
    with pytest.MonkeyPatch.context() as patch:
        chunked: list[int] = []
        patch.setattr(sampling, "chunk_feed_forward", lambda transformer, num: chunked.append(num))
        sample_run("--feed_forward_chunks", "3")
    assert chunked == [3]
    assert np.abs(sample_run("--feed_forward_chunks", "3").astype(int) - expected).max() <= 1


def test_the_text_encoder_is_gone_before_the_other_models_come(checkpoint: Checkpoint, tiny_model: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    encoder = pipeline.text_encoder
    prompts = place(
        *(pipeline, checkpoint, SamplingOptions(), CPU),
        blocks=BlockOptions(resident_blocks=2),
        text_encoder=TextEncoderOptions(),
        prompts=[PROMPT, "a blue circle"],
        max_sequence_length=16,
    )
    assert pipeline.text_encoder is None and swap_of(encoder) is None
    stock = CogVideoXPipeline.from_pretrained(tiny_model)
    for prompt, ready in prompts.items():
        with torch.no_grad():
            embeds = stock.encode_prompt(prompt, max_sequence_length=16, device=CPU)
        for name, expected in zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True):
            assert torch.equal(ready[name], expected) and not ready[name].requires_grad
    assert list(prompts) == [PROMPT, "a blue circle"]


def test_run_gives_its_base_model_with_its_lora_at_its_size(
    sample_run: Callable[..., np.ndarray], tiny_model: Path, trained: Path
) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(trained, weight_name=LORA_FILE)
    expected = stock_frames(pipeline, max_sequence_length=16)  # as the run's captions were read
    assert not np.array_equal(expected, stock_frames(pipeline))
    assert np.array_equal(sample_run(), expected)


def test_flags_win_over_the_run(sample_run: Callable[..., np.ndarray], tiny_model: Path, trained: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(trained, weight_name=LORA_FILE)
    expected = stock_frames(pipeline, height=48, width=32, num_frames=17, max_sequence_length=16)
    assert np.array_equal(sample_run("--height", "48", "--width", "32", "--num_frames", "17"), expected)


def test_a_base_model_given_beside_a_run_is_taken(
    sample_run: Callable[..., np.ndarray], trained: Path, tmp_path: Path
) -> None:
    build_tiny_pipeline(seed=9).save_pretrained(tmp_path / "other")
    pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "other")
    pipeline.load_lora_weights(trained, weight_name=LORA_FILE)
    expected = stock_frames(pipeline, max_sequence_length=16)
    assert np.array_equal(sample_run("--pretrained_model_name_or_path", tmp_path / "other"), expected)


@pytest.mark.parametrize("step", [2, 10])
def test_step_gives_the_lora_of_that_checkpoint(
    sample_run: Callable[..., np.ndarray], tiny_model: Path, trained: Path, step: int
) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(trained / "checkpoints" / f"step-{step:08}", weight_name=LORA_FILE)
    assert np.array_equal(sample_run("--step", str(step)), stock_frames(pipeline, max_sequence_length=16))


def test_step_zero_gives_the_base_model(sample_run: Callable[..., np.ndarray], tiny_model: Path) -> None:
    expected = stock_frames(CogVideoXPipeline.from_pretrained(tiny_model), max_sequence_length=16)
    assert np.array_equal(sample_run("--step", "0"), expected)


# --- what is written and said ---


def test_mp4_holds_the_frames_at_the_rate(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "video.mp4"
    arguments = ("--pretrained_model_name_or_path", tiny_model, "--prompt", PROMPT, *SIZE, *QUICK)
    code, _, messages = cli("sample", *arguments, "--output", output, "--fps", "12")
    assert code == 0, messages
    frames, rate = read_mp4(output)
    assert rate == 12
    expected = stock_frames(CogVideoXPipeline.from_pretrained(tiny_model))
    assert frames.shape == expected.shape == (9, 32, 48, 3)
    # Noise of every colour is the worst that a codec with halved colour can meet; brightness survives it.
    assert np.abs(frames.mean(axis=3) - expected.mean(axis=3)).mean() < 6
    assert os.listdir(output.parent) == ["video.mp4"]


@pytest.mark.parametrize(("flags", "expected"), [((), 5), (("--fps", "24"), 24)], ids=["the-runs", "the-flags"])
def test_rate_of_a_run(cli: Cli, trained: Path, tmp_path: Path, flags: tuple[str, ...], expected: int) -> None:
    output = tmp_path / "video.mp4"
    code, _, messages = cli("sample", "--run", trained, "--prompt", PROMPT, *QUICK, "--output", output, *flags)
    assert code == 0, messages
    frames, rate = read_mp4(output)
    assert rate == expected
    assert frames.shape == (9, 32, 48, 3)


def test_rate_of_a_base_model_is_its_native_one(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--pretrained_model_name_or_path", tiny_model, "--prompt", PROMPT, *SIZE, *QUICK)
    assert cli("sample", *arguments, "--output", tmp_path / "video.mp4")[0] == 0
    assert read_mp4(tmp_path / "video.mp4")[1] == 8


def test_json_is_one_object_on_standard_output_that_says_what_was_made(
    cli: Cli, trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "frames"
    arguments = ("--run", trained, "--step", "2", "--prompt", "ein ‚rotes‘ Quadrat", "--seed", "3", "--output", output)
    code, out, messages = cli("sample", *arguments, *QUICK, "--json")
    assert code == 0, messages
    assert out.endswith("}\n")
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "output": str(output),
        "prompt": "ein ‚rotes‘ Quadrat",
        "seed": 3,
        "model": str(tiny_model),
        "lora": str(trained / "checkpoints" / "step-00000002"),
        "weights": None,
        "frames": 9,
        "height": 32,
        "width": 48,
        "fps": 5.0,
    }


def test_without_json_standard_output_is_empty(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--pretrained_model_name_or_path", tiny_model, "--prompt", PROMPT, *SIZE, *QUICK)
    code, out, messages = cli("sample", *arguments, "--output", tmp_path / "frames")
    assert (code, out) == (0, "")
    assert "9 frames of 48×32 at 8 fps" in messages


# --- mistakes ---


def refusal(cli: Cli, *flags: str | Path) -> str:
    """The one line of a call that is refused with exit code 2."""
    code, out, messages = cli("sample", *flags)
    assert code == 2, messages
    assert out == ""
    assert messages.startswith("cogvideox-factory: error: ")
    assert messages.count("\n") == 1
    return messages


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake is told before the gigabytes of a model are loaded or downloaded."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("was loaded before the mistake was told")

    monkeypatch.setattr(CogVideoXPipeline, "from_pretrained", load)
    monkeypatch.setattr(DiffusionPipeline, "download", load)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param(("--output", "video.gif"), ["--output video.gif", ".mp4"], id="gif"),
        pytest.param(("--height", "40"), ["--height 40", "multiple of 16"], id="height"),
        pytest.param(("--width", "50"), ["--width 50", "multiple of 16", "48"], id="width"),
        pytest.param(("--step", "2"), ["--step 2", "--run"], id="step-without-run"),
        pytest.param(("--lora", "nothing"), ["nothing", LORA_FILE], id="missing-lora"),
    ],
)
def test_mistake_with_a_base_model_is_told(
    cli: Cli, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ("--pretrained_model_name_or_path", tiny_model, "--prompt", PROMPT, "--output", "video.mp4")
    message = refusal(cli, *base, *flags)
    for part in said:
        assert part in message
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("missing", ["prompt", "output"])
def test_missing_prompt_or_output_is_told(cli: Cli, tiny_model: Path, tmp_path: Path, missing: str) -> None:
    given = {"prompt": PROMPT, "output": str(tmp_path / "video.mp4")}
    flags = [part for name, value in given.items() if name != missing for part in (f"--{name}", value)]
    assert f"--{missing} is missing" in refusal(cli, "--pretrained_model_name_or_path", tiny_model, *flags)


@pytest.mark.usefixtures("nothing_loads")
def test_no_model_at_all_is_told(cli: Cli, tmp_path: Path) -> None:
    message = refusal(cli, "--prompt", PROMPT, "--output", tmp_path / "video.mp4")
    assert "--run" in message and "--pretrained_model_name_or_path" in message


@pytest.mark.usefixtures("nothing_loads")
def test_run_and_lora_together_are_refused(cli: Cli, trained: Path, tmp_path: Path) -> None:
    message = refusal(cli, "--run", trained, "--lora", trained, "--prompt", PROMPT, "--output", tmp_path / "video.mp4")
    assert "--run and --lora" in message


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("flags", [("--step", "2"), ("--lora", "nothing")], ids=["step", "lora"])
def test_mistake_is_told_before_a_model_is_downloaded(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ("--pretrained_model_name_or_path", "someone/model", "--prompt", PROMPT, "--output", "video.mp4")
    assert flags[1] in refusal(cli, *base, *flags)


@pytest.mark.usefixtures("nothing_loads")
def test_missing_step_is_refused_with_those_that_are_there(cli: Cli, trained: Path, tmp_path: Path) -> None:
    flags = ("--run", trained, "--prompt", PROMPT, "--output", tmp_path / "video.mp4")
    assert "--step 3: the run has no such checkpoint; it has 2, 10\n" in refusal(cli, *flags, "--step", "3")


@pytest.mark.usefixtures("nothing_loads")
def test_a_damaged_checkpoint_is_never_shown(cli: Cli, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    folder = run / "checkpoints/step-00000002"
    file = folder / LORA_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    output = ("--prompt", "a", "--output", tmp_path / "frames")
    for flags in (("--run", run, "--step", "2"), ("--pretrained_model_name_or_path", "any", "--lora", folder)):
        message = refusal(cli, *flags, *output)
        assert f"{folder} is damaged: {LORA_FILE} is not what was written" in message
    (folder / "manifest.json").unlink()
    assert "manifest.json is missing" in refusal(cli, "--run", run, "--step", "2", *output)


@pytest.mark.usefixtures("nothing_loads")
def test_missing_step_of_a_run_without_checkpoints_says_so(cli: Cli, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    flags = ("--run", tmp_path / "run", "--prompt", PROMPT, "--output", tmp_path / "video.mp4")
    assert "it has none" in refusal(cli, *flags, "--step", "3")


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("exists", [False, True], ids=["no-folder", "no-run"])
def test_run_that_is_none_is_refused_by_the_flag_that_named_it(cli: Cli, tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "run").mkdir()
    message = refusal(cli, "--run", tmp_path / "run", "--prompt", PROMPT, "--output", tmp_path / "video.mp4")
    assert f"--run {tmp_path / 'run'}" in message
    assert "--config" not in message  # which was never given


@pytest.mark.usefixtures("nothing_loads")
def test_images_and_models_that_do_not_go_together_are_refused(
    cli: Cli, tmp_path: Path, tiny_model: Path, member: Callable[[str], Path]
) -> None:
    output = ("--prompt", PROMPT, "--output", tmp_path / "video.mp4", "--pretrained_model_name_or_path")
    picture = tmp_path / "a.png"
    Image.new("RGB", (96, 64)).save(picture)
    assert "--image is missing" in refusal(cli, *output, member("5b-I2V"))
    assert "text-to-video model and takes no image" in refusal(cli, *output, tiny_model, "--image", picture)
    for name, content, complaint in (("none.png", None, "no such file"), ("text.png", b"hello", "cannot be read as")):
        if content:
            (tmp_path / name).write_bytes(content)
        message = refusal(cli, *output, member("5b-I2V"), "--image", tmp_path / name)
        assert f"--image {tmp_path / name}: {complaint}" in message
    portrait = ("--image", picture, "--height", "96", "--width", "64")
    message = refusal(cli, *output, member("5b-I2V"), *portrait)
    assert "96×64" in message and "--ignore_learned_positional_embeddings" in message


def foreign_lora(folder: Path, kind: str, tiny_model: Path, own: Path) -> Path:
    """A LoRA file that is not one of the tiny model."""
    path = folder / "lora.safetensors"
    if kind in ("of-a-wider-model", "of-a-deeper-model"):
        pipeline = build_tiny_pipeline(attention_head_dim=64) if "wider" in kind else build_tiny_pipeline(num_layers=6)
        attach_lora(pipeline.transformer, LoraOptions(rank=2), 0)
        save_lora(pipeline.transformer, folder).rename(path)
    elif kind == "of-another-kind-of-model":
        save_file({f"unet.{name}": value for name, value in load_file(own).items()}, path)
    elif kind == "no-lora":
        path.write_bytes((tiny_model / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    else:
        path.write_bytes(b"" if kind == "empty" else own.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "of-a-wider-model",
        "of-a-deeper-model",  # whose further layers would be dropped in silence
        "of-another-kind-of-model",  # of which nothing would be loaded, in silence
        "no-lora",
        "cut-short",
        "empty",
    ],
)
def test_lora_that_does_not_fit_is_refused_in_one_line(
    cli: Cli, tiny_model: Path, trained: Path, tmp_path: Path, kind: str
) -> None:
    path = foreign_lora(tmp_path, kind, tiny_model, trained / LORA_FILE)
    flags = ("--pretrained_model_name_or_path", tiny_model, "--prompt", PROMPT, *SIZE, *QUICK, "--lora", path)
    code, _, messages = cli("sample", *flags, "--output", tmp_path / "video.mp4")
    assert code == 2, messages
    assert "Traceback" not in messages
    message = messages.partition("cogvideox-factory: error: ")[2]  # before it are bars of what was loaded
    assert f"--lora {path}" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "video.mp4").exists()


# --- the parts ---


@given(height=st.integers(1, 2000), width=st.integers(1, 2000), divisor=st.sampled_from([8, 16, 32]))
def test_sizes_are_accepted_exactly_where_they_divide_and_the_proposal_does(
    height: int, width: int, divisor: int
) -> None:
    options = SamplingOptions(height=height, width=width)
    wrong = [(name, v) for name, v in (("height", height), ("width", width)) if v % divisor]
    if not wrong:
        resolved = resolve_sampling(options, (49, 480, 720), divisor, 4)
        assert resolved == dataclasses.replace(options, num_frames=49)
        return
    with pytest.raises(UserError) as error:
        resolve_sampling(options, (49, 480, 720), divisor, 4)
    name, value = wrong[0]
    assert str(error.value).startswith(f"--{name} {value}: must be a multiple of {divisor}, such as ")
    proposal = int(str(error.value).rpartition(" ")[2])
    assert proposal >= divisor and proposal % divisor == 0
    assert abs(proposal - value) <= divisor / 2 or (proposal == divisor and value < divisor)


def test_missing_sizes_are_filled_in_each_for_itself() -> None:
    assert resolve_sampling(SamplingOptions(), (49, 480, 720), 16, 4) == SamplingOptions(480, 720, 49)
    assert resolve_sampling(SamplingOptions(height=64), (49, 480, 720), 16, 4) == SamplingOptions(64, 720, 49)
    assert resolve_sampling(SamplingOptions(width=64), (49, 480, 720), 16, 4) == SamplingOptions(480, 64, 49)
    assert resolve_sampling(SamplingOptions(num_frames=9), (49, 480, 720), 16, 4) == SamplingOptions(480, 720, 9)


def test_embeddings_give_the_same_video_as_their_prompt(tiny_model: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    options = SamplingOptions(height=32, width=48, num_frames=9, num_inference_steps=2)
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(PROMPT)
    ours = generate(
        pipeline, options, 5, prompt_embeds=embeds, negative_prompt_embeds=negative, max_sequence_length=226
    )
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, stock_frames(pipeline, seed=5))


def test_one_seed_gives_one_video_and_leaves_the_global_generator_alone(tiny_model: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    options = SamplingOptions(height=32, width=48, num_frames=9, num_inference_steps=1)
    videos = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        videos.append(generate(pipeline, options, 5, prompt=PROMPT, max_sequence_length=226))
        assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(videos[0], videos[1])
    other = generate(pipeline, options, 6, prompt=PROMPT, max_sequence_length=226)
    assert not np.array_equal(videos[0], other)


class Placed:
    """Stands for a pipeline, and records where it is put."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, torch.device]] = []

    def to(self, device: torch.device) -> None:
        self.calls.append(("to", device))

    def enable_model_cpu_offload(self, device: torch.device) -> None:
        self.calls.append(("offload", device))


@pytest.mark.parametrize(
    ("offload", "device", "expected"),
    [(True, CUDA, "offload"), (False, CUDA, "to"), (True, CPU, "to"), (False, CPU, "to")],
)
def test_pipeline_is_offloaded_or_moved_but_never_both(
    checkpoint: Checkpoint, offload: bool, device: torch.device, expected: str
) -> None:
    """Trap: moving a pipeline undoes its offloading, and testing then takes more memory than training."""
    pipeline: Any = Placed()
    pipeline.vae = None
    prompts = place(
        *(pipeline, checkpoint, SamplingOptions(enable_model_cpu_offload=offload), device),
        blocks=BlockOptions(),
        text_encoder=TextEncoderOptions(),
        prompts=[PROMPT],
        max_sequence_length=226,
    )
    assert pipeline.calls == [(expected, device)]
    assert prompts == {PROMPT: {"prompt": PROMPT}}


def test_video_list_is_written_as_json(tmp_path: Path) -> None:
    write_video_list(tmp_path / "step", [Video("a.mp4", "ein ‚Quadrat‘", 3), Video("b.mp4", "x", 4)])
    assert json.loads((tmp_path / "step" / "prompts.json").read_text(encoding="utf-8")) == [
        {"file": "a.mp4", "prompt": "ein ‚Quadrat‘", "seed": 3},
        {"file": "b.mp4", "prompt": "x", "seed": 4},
    ]


# --- validation ---

VALIDATE = ("--validation_prompt", f"{PROMPT} ::: a blue circle:::", "--seed", "20", *QUICK)


def make_validation(run: Path, checkpoint: Checkpoint, *flags: str) -> Validation:
    return Validation(run, train_options(checkpoint, *VALIDATE, *flags), checkpoint, Bucket(9, 32, 48), StopRequest())


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Frames of each video that a validation writes, before the codec."""
    frames: dict[str, np.ndarray] = {}
    write = validation.write_video

    def spy(path: Path, video: np.ndarray, fps: float) -> None:
        frames[str(path)] = video
        write(path, video, fps)

    monkeypatch.setattr(validation, "write_video", spy)
    return frames


def test_the_next_training_step_is_the_same_with_and_without_a_validation(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    gradients = []
    for validates in (False, True):
        transformer = with_lora(checkpoint, 1).train()
        if validates:
            validator = make_validation(tmp_path, checkpoint)
            validator.encode_prompts(CPU)
            validator.run_in_memory(1, transformer, load_scheduler(checkpoint), torch.float32, CPU)
        generator = torch.Generator().manual_seed(0)
        output = transformer(
            hidden_states=torch.randn(1, 3, 8, 4, 6, generator=generator),
            encoder_hidden_states=torch.randn(1, 7, 32, generator=generator),
            timestep=torch.tensor([500]),
            image_rotary_emb=(torch.ones(18, 32), torch.zeros(18, 32)),
        ).sample
        output.square().mean().backward()
        grads = [value.grad for value in trainable_parameters(transformer).values()]
        assert all(grad is not None for grad in grads)
        gradients.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    assert torch.equal(gradients[0], gradients[1])


def test_validation_of_memory_and_of_what_was_saved_are_the_same(
    checkpoint: Checkpoint, tmp_path: Path, shown: dict[str, np.ndarray]
) -> None:
    transformer = with_lora(checkpoint, 4)
    save_lora(transformer, tmp_path)
    validator = make_validation(tmp_path, checkpoint, "--max_sequence_length", "12", "--guidance_scale", "3")
    validator.encode_prompts(CPU)
    validator.run_in_memory(1, transformer, load_scheduler(checkpoint), torch.float32, CPU)
    validator.run_from_saved(2, CPU)
    first, second = (
        [frames for path, frames in sorted(shown.items()) if f"step-0000000{step}" in path] for step in (1, 2)
    )
    assert len(first) == len(second) == 2
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_list_of_videos_is_written_after_all_of_them(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its presence says that the validation is complete: one that was cut short is repeated."""
    validator = make_validation(tmp_path, checkpoint)
    validator.encode_prompts(CPU)
    transformer = with_lora(checkpoint, 1)
    made: list[int] = []

    def fail_at_the_second(*arguments: Any, **options: Any) -> np.ndarray:
        made.append(1)
        if len(made) == 2:
            raise OSError("no space")
        return np.zeros((9, 32, 48, 3), np.uint8)

    monkeypatch.setattr(validation, "generate", fail_at_the_second)
    with pytest.raises(OSError):
        validator.run_in_memory(0, transformer, load_scheduler(checkpoint), torch.float32, CPU)
    assert validator.is_due(0, None)
    made.append(2)
    validator.run_in_memory(0, transformer, load_scheduler(checkpoint), torch.float32, CPU)
    listed = json.loads((validator.folder(0) / "prompts.json").read_text())
    assert [video["file"] for video in listed] == ["prompt-00-video-0.mp4", "prompt-01-video-0.mp4"]
    assert {path.name for path in validator.folder(0).iterdir()} == {
        "prompts.json",
        *(video["file"] for video in listed),
    }
    assert not validator.is_due(0, None)


@pytest.mark.parametrize("frames", [9, 16, 17, 48, 49, 80, 81])
def test_numbers_of_frames_that_the_vae_decodes_to_are_accepted(frames: int) -> None:
    assert resolve_sampling(SamplingOptions(num_frames=frames), (17, 64, 96), 16, 4).num_frames == frames


def test_a_number_of_frames_that_would_give_another_is_refused_with_that_other() -> None:
    with pytest.raises(UserError, match=r"--num_frames 10: .* take 9"):
        resolve_sampling(SamplingOptions(num_frames=10), (17, 64, 96), 16, 4)

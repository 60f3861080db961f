"""Videos of a run, against those of the stock pipeline with the saved LoRA."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

from cogvideox_factory import messages, progress, sampling
from cogvideox_factory.config import (
    DataOptions,
    EncodingOptions,
    LoraOptions,
    MemoryOptions,
    ModelOptions,
    SamplingOptions,
    Train,
    UserError,
    ValidationOptions,
)
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.memory.block_swap import swap_blocks
from cogvideox_factory.model.adapters import attach_lora, save_lora, trainable_parameters
from cogvideox_factory.model.denoiser import load_scheduler, load_transformer
from cogvideox_factory.model.encoders import TextEncoder
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.stopping import StopRequest
from cogvideox_factory.training import validation as module
from cogvideox_factory.training.validation import Validation, waiting

CPU = torch.device("cpu")
PROMPTS = ("a red square moving left", "a blue circle")
BUCKET = Bucket(9, 32, 48)
Written = list[tuple[Path, np.ndarray, float]]


@pytest.fixture
def make(tmp_path: Path, checkpoint: Checkpoint) -> Callable[..., Validation]:
    def call(sampling: SamplingOptions | None = None, **options: Any) -> Validation:
        train = Train(
            model=ModelOptions(pretrained_model_name_or_path=str(checkpoint.folder)),
            data=DataOptions(fps=8.0),
            validation=ValidationOptions(**{"validation_prompt": ":::".join(PROMPTS), **options}),
            sampling=sampling or SamplingOptions(num_inference_steps=2),
            output_dir=tmp_path / "run",
            seed=5,
        )
        return Validation(tmp_path / "run", train, checkpoint, BUCKET, StopRequest())

    return call


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """What would be written, before it is compressed."""
    videos: Written = []

    def keep(path: Path, frames: np.ndarray, fps: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        videos.append((path, frames, fps))

    monkeypatch.setattr(module, "write_video", keep)
    return videos


@pytest.fixture
def transformer(checkpoint: Checkpoint):
    """A model whose adapter changes something."""
    transformer = load_transformer(checkpoint, torch.float32)
    attach_lora(transformer, LoraOptions(rank=4, lora_alpha=16), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return transformer


def stock(model: Path, lora: Path | None, prompt: str, seed: int, **options: Any) -> np.ndarray:
    pipeline = CogVideoXPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    settings = {"num_frames": 9, "height": 32, "width": 48, "guidance_scale": 6.0, **options}
    images = pipeline(
        prompt,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        output_type="pil",
        **settings,
    ).frames[0]
    return np.stack([np.asarray(image) for image in images])


def hooks_of(transformer: torch.nn.Module) -> int:
    return sum(
        len(getattr(part, name))
        for part in transformer.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


# --- the videos ---


def test_videos_in_memory_are_those_of_the_stock_pipeline_with_the_saved_lora(
    make, written: Written, transformer: Any, checkpoint: Checkpoint, tiny_model: Path, tmp_path: Path
) -> None:
    validation = make(num_validation_videos=2)
    validation.encode_prompts(CPU)
    validation.run_in_memory(3, transformer, load_scheduler(checkpoint), torch.float32, CPU)
    lora = save_lora(transformer, tmp_path / "saved").parent
    folder = tmp_path / "run" / "validation" / "step-00000003"
    assert [path for path, _, _ in written] == [
        folder / f"prompt-{number:02}-video-{index}.mp4" for number in range(2) for index in range(2)
    ]
    expected = [stock(tiny_model, lora, prompt, seed) for prompt in PROMPTS for seed in (5, 6)]
    for (_, frames, fps), reference in zip(written, expected, strict=True):
        assert fps == 8.0
        assert np.array_equal(frames, reference)
    assert not np.array_equal(expected[0], stock(tiny_model, None, PROMPTS[0], 5))
    assert json.loads((folder / "prompts.json").read_text()) == [
        {"file": f"prompt-{number:02}-video-{index}.mp4", "prompt": prompt, "seed": 5 + index}
        for number, prompt in enumerate(PROMPTS)
        for index in range(2)
    ]


def test_sampling_options_are_used(
    make, written: Written, transformer: Any, checkpoint: Checkpoint, tiny_model: Path, tmp_path: Path
) -> None:
    """Trap: a validation that ignores the size, the frames or the guidance."""
    sampling = SamplingOptions(num_inference_steps=2, height=48, width=32, guidance_scale=30.0, use_dynamic_cfg=True)
    validation = make(sampling, validation_prompt=PROMPTS[0])
    validation.encode_prompts(CPU)
    validation.run_in_memory(0, transformer, load_scheduler(checkpoint), torch.float32, CPU)
    lora = save_lora(transformer, tmp_path / "saved").parent
    options = {"height": 48, "width": 32, "guidance_scale": 30.0, "use_dynamic_cfg": True}
    assert np.array_equal(written[0][1], stock(tiny_model, lora, PROMPTS[0], 5, **options))


@pytest.mark.parametrize("was_training", [True, False])
def test_model_and_schedule_come_back_as_they_were(
    make, written: Written, transformer: Any, checkpoint: Checkpoint, was_training: bool
) -> None:
    """Trap: hooks left on the model that trains."""
    validation = make(validation_prompt=PROMPTS[0])
    validation.encode_prompts(CPU)
    transformer.train(was_training)
    modes: list[bool] = []
    hook = transformer.register_forward_pre_hook(lambda part, args: modes.append(part.training))
    scheduler = load_scheduler(checkpoint)
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in transformer.named_parameters()}
    hooks, steps = hooks_of(transformer), scheduler.num_inference_steps
    validation.run_in_memory(1, transformer, scheduler, torch.float32, CPU)
    assert modes == [False, False]  # two denoising steps, neither with dropout
    assert all(part.training == was_training for part in transformer.modules())
    assert hooks_of(transformer) == hooks
    hook.remove()
    after = dict(transformer.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value, requires_grad) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is None
    assert any(requires_grad for _, _, requires_grad in before.values())
    assert scheduler.num_inference_steps == steps


def test_videos_from_the_saved_lora_are_made_once(
    make, written: Written, transformer: Any, tiny_model: Path, tmp_path: Path
) -> None:
    validation = make()
    save_lora(transformer, tmp_path / "run")
    assert validation.run_from_saved(2, CPU) is True
    expected = [stock(tiny_model, tmp_path / "run", prompt, 5) for prompt in PROMPTS]
    assert len(written) == 2
    for (_, frames, _), reference in zip(written, expected, strict=True):
        assert np.array_equal(frames, reference)
    assert validation.run_from_saved(2, CPU) is False
    assert make(validation_prompt=None).run_from_saved(4, CPU) is False
    assert len(written) == 2


@pytest.mark.parametrize("of", ["memory", "memory of all processes", "what was saved"])
def test_progress_is_that_of_the_denoising_steps_of_all_videos(
    of: str,
    make,
    written: Written,
    transformer: Any,
    checkpoint: Checkpoint,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trap: with one prompt, a bar that counts videos stands still to the end."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    validation = make()
    save_lora(transformer, tmp_path / "run")
    validation.encode_prompts(CPU)
    messages.configure()
    capfd.readouterr()
    if of == "what was saved":
        validation.run_from_saved(3, CPU)
    else:
        shared = {"is_shared": of != "memory"}
        validation.run_in_memory(3, transformer, load_scheduler(checkpoint), torch.float32, CPU, **shared)
    lines = [line.split(" [")[0] for line in capfd.readouterr().err.splitlines() if line.lower().startswith("videos")]
    assert lines == [*(f"Videos of step 3  {done}/4" for done in (1, 2, 3, 4)), f"videos     {validation.folder(3)}"]


@pytest.fixture
def sparing(make: Callable[..., Validation]) -> Validation:
    """A validation of a training with swapped blocks."""
    validation = make()
    memory = MemoryOptions(gradient_checkpointing=True, resident_blocks=2)
    encoding = EncodingOptions(offload_text_encoder=True)
    validation.options = dataclasses.replace(validation.options, memory=memory, encoding=encoding)
    return validation


def test_videos_from_the_saved_lora_with_swapped_models(
    sparing: Validation, written: Written, transformer: Any, tiny_model: Path, tmp_path: Path
) -> None:
    save_lora(transformer, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        swaps: list[int] = []
        patch.setattr(sampling, "swap_blocks", lambda *arguments: swaps.append(swap_blocks(*arguments).num_resident))
        assert sparing.run_from_saved(2, CPU) is True
    assert swaps == [2]
    expected = [stock(tiny_model, tmp_path / "run", prompt, 5) for prompt in PROMPTS]
    assert all(np.array_equal(frames, reference) for (_, frames, _), reference in zip(written, expected, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_training_waits_on_the_host_while_a_video_is_decoded(
    fails: bool, sparing: Validation, written: Written, transformer: Any, checkpoint: Checkpoint, tiny_model: Path
) -> None:
    sparing.encode_prompts(CPU)
    swap = swap_blocks(transformer, 2, CPU)
    state = torch.arange(5.0)
    own = [*trainable_parameters(transformer).values(), state]
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    at_home, seen = [value.data_ptr() for value in own], []
    decode = AutoencoderKLCogVideoX.decode

    def look(vae: Any, latents: torch.Tensor) -> Any:
        assert vae.encoder is None  # half of it is enough
        seen.append((swap._slots, [value.data_ptr() for value in own]))
        if fails:
            raise OSError("no space")
        return decode(vae, latents)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) if fails else contextlib.nullcontext():
        patch.setattr(AutoencoderKLCogVideoX, "decode", look)
        sparing.run_in_memory(3, transformer, load_scheduler(checkpoint), torch.float32, CPU, [state])
    assert len(seen) == (1 if fails else 2)
    assert all(slots == [] for slots, _ in seen)
    assert all(home != away for home, away in zip(at_home, seen[0][1], strict=True))
    assert len(swap._slots) == 2 and torch.equal(state, torch.arange(5.0))
    after = transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    if not fails:
        save_lora(transformer, sparing.run)
        expected = [stock(tiny_model, sparing.run, prompt, 5) for prompt in PROMPTS]
        assert [np.array_equal(a[1], b) for a, b in zip(written, expected, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("memory", "offload", "is_lora", "waits"),
    [
        (MemoryOptions(), False, True, False),
        (MemoryOptions(), True, True, True),
        (MemoryOptions(resident_blocks=2), False, True, True),
        (MemoryOptions(), True, False, False),  # several times the model would have to go
    ],
)
def test_who_waits(
    memory: MemoryOptions, offload: bool, is_lora: bool, waits: bool, transformer: Any, checkpoint: Checkpoint
) -> None:
    options = Train(memory=memory, sampling=SamplingOptions(enable_model_cpu_offload=offload))
    model = transformer if is_lora else load_transformer(checkpoint, torch.float32)
    state, weight = torch.ones(2), model.proj_out.weight
    at_home = [state.data_ptr(), weight.data_ptr()]
    with waiting(options, model, [state], CPU) as while_decoding:
        assert [state.data_ptr() != at_home[0], weight.data_ptr() != at_home[1]] == [waits, False]
        with while_decoding():
            assert (weight.data_ptr() != at_home[1]) == waits


def test_text_encoder_is_not_needed_after_the_prompts_are_encoded(
    make, written: Written, transformer: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    load = TextEncoder.load.__func__  # type: ignore[attr-defined]

    def counted(cls: type, *arguments: Any) -> TextEncoder:
        loads.append(1)
        return load(cls, *arguments)

    def gone(*arguments: Any) -> None:
        raise AssertionError("the text encoder has left the memory")

    monkeypatch.setattr(TextEncoder, "load", classmethod(counted))
    validation = make()
    validation.encode_prompts(CPU)
    assert loads == [1]
    monkeypatch.setattr(TextEncoder, "load", gone)
    validation.run_in_memory(0, transformer, load_scheduler(checkpoint), torch.float32, CPU)
    assert len(written) == 2
    make().encode_prompts(CPU)  # a run that goes on finds them


def test_without_prompts_nothing_is_encoded(make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise AssertionError("there is nothing to encode")

    monkeypatch.setattr(TextEncoder, "load", refused)
    make(validation_prompt=None).encode_prompts(CPU)


# --- which, and when ---


@pytest.mark.parametrize(
    ("text", "separator", "prompts"),
    [
        (None, ":::", []),
        ("", ":::", []),
        ("a dog", ":::", ["a dog"]),
        (" a dog ::: a cat ::: ", ":::", ["a dog", "a cat"]),
        ("a dog | a cat: black", "|", ["a dog", "a cat: black"]),
    ],
)
def test_prompts_are_split_by_the_separator(make, text: str | None, separator: str, prompts: list[str]) -> None:
    videos = make(validation_prompt=text, validation_prompt_separator=separator).videos
    assert [video.prompt for video in videos] == prompts
    assert [video.file for video in videos] == [f"prompt-{index:02}-video-0.mp4" for index in range(len(prompts))]


@pytest.mark.parametrize(
    ("steps", "epochs", "step", "epoch", "is_due"),
    [
        (None, None, 0, None, True),  # always before the first step
        (None, None, 4, 1, False),
        (4, None, 4, None, True),
        (4, None, 8, 0, True),
        (4, None, 6, 0, False),
        (None, 2, 6, None, False),  # within an epoch
        (None, 2, 6, 0, False),  # one epoch is complete
        (None, 2, 6, 1, True),  # two are
        (None, 2, 6, 2, False),
        (None, 1, 6, 0, True),
        (4, 2, 6, 1, True),
        (4, 2, 8, 0, True),
        (4, 2, 6, 0, False),
    ],
)
def test_when_videos_are_due(
    make, steps: int | None, epochs: int | None, step: int, epoch: int | None, is_due: bool
) -> None:
    """Trap: a validation by epochs only."""
    validation = make(validation_steps=steps, validation_epochs=epochs)
    assert validation.is_due(step, epoch) is is_due
    validation.folder(step).mkdir(parents=True)
    assert validation.is_due(step, epoch) is is_due  # a validation that was broken off
    (validation.folder(step) / "prompts.json").write_text("[]")
    assert validation.is_due(step, epoch) is is_due  # videos of other prompts
    listed = [{"file": video.file, "prompt": video.prompt, "seed": video.seed} for video in validation.videos]
    (validation.folder(step) / "prompts.json").write_text(json.dumps(listed))
    assert validation.is_due(step, epoch) is False
    without_prompts = make(validation_prompt=None, validation_steps=steps, validation_epochs=epochs)
    assert without_prompts.is_due(step + 16, epoch) is False


def test_size_is_the_buckets_where_none_is_given(make) -> None:
    sampling = make().sampling
    assert (sampling.num_frames, sampling.height, sampling.width) == BUCKET
    sampling = make(SamplingOptions(height=64, num_frames=17)).sampling
    assert (sampling.num_frames, sampling.height, sampling.width) == (17, 64, 48)


def test_size_that_does_not_fit_is_refused_at_once(make) -> None:
    with pytest.raises(UserError, match="--width 50"):
        make(dataclasses.replace(SamplingOptions(), width=50))

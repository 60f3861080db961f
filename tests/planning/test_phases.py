"""Traced phases against real steps with the same tracker, and against what the traces must obey."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import Plan
from cogvideox_factory.memory import copies
from cogvideox_factory.memory.quantized_base import FORMATS
from cogvideox_factory.memory.text_encoder import place_text_encoder
from cogvideox_factory.memory.tracker import MemoryTracker
from cogvideox_factory.model.adapters import attach, is_lora, trainable_parameters
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler
from cogvideox_factory.model.encoders import TextEncoder
from cogvideox_factory.planning import open_configs, resolve
from cogvideox_factory.planning.fakes import GPU, FakeTracker, fake_world
from cogvideox_factory.planning.phases import (
    HELD,
    Phase,
    fake_step,
    load_transformer,
    make_video,
    trace_encoding,
    trace_first_frame,
    trace_steps,
    trace_testing,
    trace_text,
    trace_validation,
)
from cogvideox_factory.planning.traces import Traces
from cogvideox_factory.sampling import pipeline_from_disk, place
from cogvideox_factory.training.checkpoint import Snapshot, TrainState
from cogvideox_factory.training.ema import WeightAverage
from cogvideox_factory.training.loop import build_model, optimizer_step
from cogvideox_factory.training.optimizers import build_optimizer

CPU = torch.device("cpu")
Plans = Callable[..., Plan]
OFFLOADED = ("--training_type", "sft", "--optimizer_in_backward", "--gradient_checkpointing", "--offload_activations")


@pytest.fixture(scope="session")
def plan(shallow_model: Path) -> Plans:
    """Options of a plan for a model of two blocks; for another where flags name it."""

    def make(*flags: str) -> Plan:
        flags = ("--pretrained_model_name_or_path", str(shallow_model), "--rank", "16", *flags)
        return parse_command(Plan, "plan", flags)

    return make


@pytest.fixture(scope="session")
def usual_step(plan: Plans) -> Phase:
    """The training step without flags, traced."""
    return planned_step(plan(), torch.float32)


def planned_step(options: Plan, dtype: torch.dtype, tracker_class: type[FakeTracker] = FakeTracker) -> Phase:
    """The training step, traced."""
    with open_configs(options) as checkpoint:
        options = resolve(options, checkpoint)
        with fake_world(), tracker_class() as tracker:
            transformer = build_model(options, checkpoint, dtype, GPU, load=load_transformer)
            return trace_steps(options, checkpoint, transformer, dtype, tracker).phase


def measured_step(options: Plan, dtype: torch.dtype) -> int:
    """Peak of the second of two real steps, in bytes."""
    with open_configs(options) as checkpoint:
        options = resolve(options, checkpoint)
        scheduler = load_scheduler(checkpoint)
        transformer = build_model(options, checkpoint, dtype, CPU)
        accelerator = Accelerator(cpu=True)
        trained = list(trainable_parameters(transformer).values())
        tracker = MemoryTracker(CPU)
        with tracker:
            tracker.add([*transformer.parameters(), *transformer.buffers()], "weights")
            in_backward = options.memory.optimizer_in_backward
            optimizer = build_optimizer(trained, options.optimizer, 1, in_backward=in_backward)
            optimizer.param_groups[0]["foreach"] = True  # as on CUDA
            transformer.train()
            for _ in range(2):
                tracker.start_phase()
                optimizer_step(
                    fake_step(options, checkpoint),  # of zeros: real outside of the fake world
                    *(accelerator, transformer, optimizer, Denoiser(checkpoint, dtype), scheduler, trained, options),
                )
        return tracker.peak


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        ("no", ()),
        ("no", ("--gradient_checkpointing", "--train_batch_size", "2")),
        ("no", ("--gradient_accumulation_steps", "2", "--use_dora", "--ema_decay", "0.9")),
        *(("bf16", ("--quantize_base", name, "--gradient_checkpointing")) for name in FORMATS),
        ("no", ("--training_type", "sft", "--gradient_checkpointing")),
        ("bf16", ("--training_type", "sft", "--train_batch_size", "2", "--gradient_accumulation_steps", "2")),
        ("bf16", ("--training_type", "sft", "--trainable_dtype", "bf16", "--gradient_checkpointing")),
    ],
)
def test_a_planned_step_is_the_real_one(
    dtype: str, flags: tuple[str, ...], plan: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTracker, "workspace", lambda *arguments: 0)  # of a kernel that a CPU has not
    options = plan("--mixed_precision", dtype, *flags)
    torch_dtype = torch.float32 if dtype == "no" else torch.bfloat16
    planned, measured = planned_step(options, torch_dtype), measured_step(options, torch_dtype)
    average = options.method.ema_decay and 4 * sum(
        value.numel() for value in trainable_parameters_of(options, torch_dtype)
    )
    assert planned.peak == pytest.approx(measured + (average or 0), rel=0.02)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_base_takes_its_bytes(name: str, plan: Plans) -> None:
    options = plan("--quantize_base", name)
    with open_configs(options) as checkpoint:
        real = build_model(options, checkpoint, torch.bfloat16, CPU)
        with fake_world(), FakeTracker() as tracker:
            traced = build_model(options, checkpoint, torch.bfloat16, GPU, load=load_transformer)
            assert is_lora(traced)
            assert tracker.current == sum(value.nbytes for value in (*real.parameters(), *real.buffers()))


class OnePlace(FakeTracker):
    """Counts the host as the device, as a real step on a CPU does."""

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        return GPU


@pytest.mark.parametrize(
    "flags",
    [
        ("--max_grad_norm", "0"),
        (),  # clipped: forward and backward pass twice
        pytest.param(("--max_grad_norm", "0", "--gradient_accumulation_steps", "2"), marks=pytest.mark.slow),
        pytest.param(("--gradient_accumulation_steps", "2"), marks=pytest.mark.slow),
        pytest.param(("--max_grad_norm", "0", "--use_cpu_offload_optimizer"), marks=pytest.mark.slow),
        ("--gradient_accumulation_steps", "2", "--use_cpu_offload_optimizer", "--offload_activations"),
    ],
    ids=["alone", "clipped", "accumulated", "both", "host", "host-both"],
)
def test_a_planned_step_in_the_backward_pass_is_the_real_one(
    flags: tuple[str, ...], plan: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTracker, "workspace", lambda *arguments: 0)
    dtype, precision = torch.float32, ["--mixed_precision", "no", "--gradient_checkpointing"]
    if "--use_cpu_offload_optimizer" in flags:  # else weights on a CPU are their own masters; slow there
        dtype, precision = torch.bfloat16, ["--mixed_precision", "bf16", "--trainable_dtype", "bf16"]
        precision += ["--gradient_checkpointing", "--frame_buckets", "1"]
    options = plan("--training_type", "sft", "--optimizer_in_backward", *precision, *flags)
    planned = planned_step(options, dtype, OnePlace)
    assert planned.peak == pytest.approx(measured_step(options, dtype), rel=0.02)


def trainable_parameters_of(options: Plan, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    with open_configs(options) as checkpoint:
        return list(trainable_parameters(build_model(options, checkpoint, dtype, CPU)).values())


def test_flash_attention_sums_in_fp32(plan: Plans) -> None:
    """The backward pass of FlashAttention-2 has a fp32 copy of the queries' gradient beside its results."""
    tracker = FakeTracker()
    with fake_world(), tracker:
        query = torch.zeros(2, 4, 300, 32, dtype=torch.bfloat16, device=GPU, requires_grad=True)
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query).sum()
        tracker.start_phase()
        before = tracker.current
        out.backward()
        gradients = 3 * query.numel() * 2
        workspace = 2 * 4 * 384 * (32 + 1) * 4
        scattered = query.numel() * 2  # of the sum's gradient, made contiguous for the kernel, or not at all
        assert gradients + workspace <= tracker.peak - before <= gradients + workspace + scattered + 64


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ((), ("--train_batch_size", "2")),
        (("--frame_buckets", "9"), ()),
        ((), ("--height_buckets", "96", "64")),
        ((), ("--rank", "64")),
        (("--gradient_checkpointing",), ()),
        ((*OFFLOADED, "--split_checkpoints"), OFFLOADED),
        (("--optimizer", "came"), ("--optimizer", "prodigy")),
        ((), ("--training_type", "sft")),
    ],
)
def test_more_takes_more(smaller: tuple[str, ...], larger: tuple[str, ...], plan: Plans, usual_step: Phase) -> None:
    low, high = (planned_step(plan(*flags), torch.float32) if flags else usual_step for flags in (smaller, larger))
    assert low.peak < high.peak


def test_low_bit_states_take_their_bits(plan: Plans) -> None:
    full, eight, four = (
        planned_step(plan("--training_type", "sft", *flags), torch.float32).parts["optimizer"]
        for flags in ((), ("--use_8bit",), ("--use_4bit", "--use_torchao"))
    )
    assert eight / full == pytest.approx(1 / 4, rel=0.1)
    assert four / full == pytest.approx(1 / 8, rel=0.2)


def test_the_host_holds_copies_of_a_lora_that_is_saved_and_none_of_full_fine_tuning(
    plan: Plans, tiny_model: Path
) -> None:
    flags = ("--model_id", str(tiny_model), "--rank", "64")
    with open_configs(plan(*flags)) as checkpoint:
        transformer = build_model(plan(*flags), checkpoint, torch.float32, CPU)
        trained = trainable_parameters(transformer)
        optimizer = torch.optim.AdamW(trained.values())
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        snapshot = Snapshot.take(TrainState(), transformer, optimizer, WeightAverage(trained, 0.9))
    plain, saved = (
        max(stage.host for key, stage in planned_step(plan(*given), torch.float32).stages.items() if key != HELD)
        for given in ((*flags, "--training_type", "sft"), (*flags, "--ema_decay", "0.9"))
    )
    assert saved - plain == pytest.approx(snapshot.num_bytes, rel=0.02)


def test_states_on_the_host_leave_the_gpu(plan: Plans, tiny_model: Path) -> None:
    flags = ("--model_id", str(tiny_model), "--training_type", "sft", "--mixed_precision", "bf16")
    here = planned_step(plan(*flags), torch.bfloat16)
    there = planned_step(plan(*flags, "--use_cpu_offload_optimizer"), torch.bfloat16)
    weights = there.parts["weights"] // 2  # numbers of 2 bytes
    assert here.parts["optimizer"] - there.parts["optimizer"] >= 0.95 * 12 * weights
    # A master and two states of 4 bytes; at the update, as the host's highest moment may be that of loading.
    hosts = [
        max(stage.host for (name, _), stage in phase.stages.items() if name == "update") for phase in (here, there)
    ]
    assert hosts[1] - hosts[0] == pytest.approx(12 * weights, rel=0.05)


@pytest.mark.parametrize("name", ["2b", "5b-I2V", pytest.param("1.5-5B", marks=pytest.mark.slow), "1.5-5B-I2V"])
def test_all_phases_of_every_member(name: str, member: Callable[[str], Path]) -> None:
    size = ("--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "17")
    options = parse_command(Plan, "plan", ("--model_id", str(member(name)), *size))
    with open_configs(options) as checkpoint:
        phases = {phase.name: phase for phase in Traces(checkpoint).phases(resolve(options, checkpoint))}
    assert list(phases) == ["preparing", "training", "validation", "testing"]
    assert all(phase.peak == sum(phase.parts.values()) > 0 for phase in phases.values())
    assert phases["validation"].parts["optimizer"] > 0 and phases["testing"].parts["optimizer"] == 0


@pytest.mark.slow
def test_sparing_options_spare(plan: Plans) -> None:
    """Tiles, and the pipeline's parts in turn instead of all together."""
    with open_configs(plan()) as checkpoint:
        plain = resolve(plan("--height", "160", "--width", "240", "--height_buckets", "160"), checkpoint)
        sparing = ("--use_tiling", "--enable_tiling", "--enable_model_cpu_offload", "--height_buckets", "160")
        spare = resolve(plan("--height", "160", "--width", "240", *sparing), checkpoint)
        with fake_world():
            assert trace_encoding(spare, checkpoint).peak < trace_encoding(plain, checkpoint).peak
        before, after = Traces(checkpoint).phases(plain)[-1], Traces(checkpoint).phases(spare)[-1]
    assert after.peak < before.peak
    assert after.parts["weights"] < 0.9 * before.parts["weights"] < after.host


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_text_encoder_is_counted_whole(dtype: str, plan: Plans) -> None:
    """In fp16 some of its layers are kept in fp32."""
    from transformers import T5EncoderModel

    options = plan("--dtype", dtype)
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    with open_configs(options) as checkpoint:
        real = T5EncoderModel.from_pretrained(checkpoint.folder, subfolder="text_encoder", dtype=torch_dtype)
        with fake_world():
            phase = trace_text(resolve(options, checkpoint), checkpoint)
    assert phase.parts["weights"] == sum(value.nbytes for value in real.parameters())


def test_nothing_fake_is_left_behind(plan: Plans) -> None:
    planned_step(plan(), torch.float32)
    with open_configs(plan()) as checkpoint:
        cosines, _ = Denoiser(checkpoint, torch.float32).rotary_embedding(5, 8, 12, CPU) or (None, None)
    assert type(cosines) is torch.Tensor
    linear = torch.nn.Linear(2, 2)
    assert linear.weight.abs().sum() > 0
    linear.to(torch.float64)
    assert linear.weight.dtype == torch.float64


def test_a_lora_is_the_adapter_and_trained_weights_are_weights(plan: Plans, usual_step: Phase) -> None:
    with open_configs(plan()) as checkpoint:
        transformer = build_model(plan(), checkpoint, torch.float32, CPU)
    assert is_lora(transformer)
    assert usual_step.parts["adapter"] == sum(value.nbytes for value in trainable_parameters(transformer).values())
    assert planned_step(plan("--training_type", "sft"), torch.float32).parts["adapter"] == 0


def test_planned_phases_with_swapped_models_are_the_real_ones(
    plan: Plans, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU host and device are one, so that all that lives anywhere is compared."""
    monkeypatch.setattr(FakeTracker, "workspace", lambda *arguments: 0)
    monkeypatch.setattr(FakeTracker, "device_of", lambda *arguments: GPU)
    monkeypatch.setattr(copies, "page_locked_size", lambda num_bytes: num_bytes)  # a CPU locks no pages
    size = ("--height", "32", "--width", "48", "--num_frames", "9")
    swapping = ("--offload_text_encoder", "--gradient_checkpointing", "--resident_blocks", "2")
    options = plan("--model_id", str(tiny_model), *swapping, *size)
    with open_configs(options) as checkpoint:
        options = resolve(options, checkpoint)
        with fake_world():
            planned = [trace_text(options, checkpoint), trace_testing(options, checkpoint)]
        encoder = TextEncoder.load(checkpoint, None, torch.float32, CPU, lambda *given: None)
        with MemoryTracker(CPU) as text:
            text.add(encoder.pipeline.text_encoder.parameters(), "weights")
            place_text_encoder(encoder.pipeline.text_encoder, options.encoding, CPU)
            text.start_phase()
            encoder.encode("a red square")
        pipeline = pipeline_from_disk(checkpoint, None, torch.float32)
        attach(pipeline.transformer, options.method, options.lora, options.seed)
        parts = [pipeline.text_encoder, pipeline.transformer, pipeline.vae]
        with MemoryTracker(CPU) as testing:
            testing.add([value for part in parts for value in (*part.parameters(), *part.buffers())], "weights")
            del parts
            testing.start_phase()
            prompts = place(
                *(pipeline, checkpoint, options.sampling, CPU),
                blocks=options.memory,
                text_encoder=options.encoding,
                prompts=[""],
                max_sequence_length=checkpoint.max_text_tokens,
            )
            make_video(pipeline, options, checkpoint, testing, **prompts[""])
    for phase, tracker in zip(planned, (text, testing), strict=True):
        assert phase.peak == pytest.approx(tracker.peak, rel=0.02), phase.name


def test_in_testing_a_part_of_the_transformer_is_there(plan: Plans) -> None:
    size = ("--height", "32", "--width", "48", "--num_frames", "9", "--gradient_checkpointing")
    with open_configs(plan()) as checkpoint, fake_world():
        whole, swapped = (
            trace_testing(resolve(plan(*size, *flags), checkpoint), checkpoint)
            for flags in ((), ("--resident_blocks", "1"))
        )
    assert swapped.parts["weights"] < 0.7 * whole.parts["weights"] and swapped.host > whole.parts["weights"]


def test_a_validation_leaves_out_what_waits(plan: Plans) -> None:
    """At the highest moment, a decoding, neither the LoRA nor the optimizer's states are there."""
    size = ("--height", "320", "--width", "480", "--rank", "64", "--gradient_checkpointing")
    with open_configs(plan()) as checkpoint:
        phases = {}
        for name, flags in {"stays": (), "waits": ("--enable_model_cpu_offload",)}.items():
            options = resolve(plan(*size, *flags), checkpoint)
            with fake_world():
                phases[name] = trace_validation(options, checkpoint)
    stays, waits = phases["stays"], phases["waits"]
    assert stays.parts["adapter"] > 0 and stays.parts["optimizer"] > 0
    assert waits.parts["adapter"] == waits.parts["optimizer"] == 0 < waits.parts["weights"] < stays.parts["weights"]
    assert waits.parts["activations"] == stays.parts["activations"] and waits.host > stays.host


@pytest.mark.slow
def test_the_picture_that_a_video_starts_from_is_part_of_the_preparing(member: Callable[[str], Path]) -> None:
    """Decoded whole it takes more than in tiles."""
    size = ("--height_buckets", "320", "--width_buckets", "480", "--frame_buckets", "9")
    peaks = []
    for tiling in ((), ("--use_tiling",)):
        options = parse_command(Plan, "plan", ("--model_id", str(member("1.5-5B-I2V")), *size, *tiling))
        with open_configs(options) as checkpoint, fake_world():
            peaks.append(trace_first_frame(resolve(options, checkpoint), checkpoint).peak)
    assert peaks[1] < 0.8 * peaks[0]

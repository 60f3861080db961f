"""Every memory strategy against the plain step: what it computes, and what it no longer keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training_steps import OPTIMIZER, Course, train

from cogvideox_factory.config import (
    MemoryOptions,
    MethodOptions,
    OptimizerOptions,
    SamplingOptions,
    Train,
    TrainingOptions,
    UserError,
)
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.memory.activations import OffloadedCheckpoints
from cogvideox_factory.memory.block_swap import BlockSwap
from cogvideox_factory.memory.feed_forward import ChunkedFeedForward
from cogvideox_factory.memory.rotation import RotationInParts
from cogvideox_factory.memory.split_checkpoints import SplitBlock
from cogvideox_factory.memory.strategies import STRATEGIES, check_memory, chosen
from cogvideox_factory.model.denoiser import load_scheduler
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.sampling import generate, pipeline_in_memory
from cogvideox_factory.training import loop
from cogvideox_factory.training.metrics import read_metrics
from cogvideox_factory.training.optimizers import build_optimizer
from cogvideox_factory.training.validation import Validation

CHECKPOINTED = MemoryOptions(gradient_checkpointing=True)
MOVING: dict[str, MemoryOptions] = {
    "checkpointed": CHECKPOINTED,
    "offloaded": dataclasses.replace(CHECKPOINTED, offload_activations=True),
    **{f"swapped-{count}": dataclasses.replace(CHECKPOINTED, resident_blocks=count) for count in (1, 2, 4)},
    "offloaded-swapped": dataclasses.replace(CHECKPOINTED, offload_activations=True, resident_blocks=2),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="session")
def plain(checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]) -> Callable[..., Course]:
    """The course of a training without any strategy, made when first asked for."""
    made: dict[str, Course] = {}

    def get(dtype: str = "fp32", **settings: Any) -> Course:
        key = f"{dtype} {sorted(settings.items())}"
        if key not in made:
            made[key] = train(checkpoint, prepared, entries, MemoryOptions(), TYPES[dtype], **settings)
        return made[key]

    return get


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "fp32") for name in MOVING), pytest.param("offloaded-swapped", "bf16", marks=pytest.mark.slow)],
)
def test_what_moves_or_recomputes_changes_no_bit(
    name: str, dtype: str, plain, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    course = train(checkpoint, prepared, entries, MOVING[name], TYPES[dtype])
    assert course == plain(dtype)
    assert len(set(course.losses)) == 5 and all(value.dtype == torch.float32 for value in course.weights.values())


@pytest.mark.parametrize("name", ["offloaded", "offloaded-swapped"])
def test_nor_over_accumulated_batches(
    name: str, plain, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    course = train(checkpoint, prepared, entries, MOVING[name], num_steps=2, accumulate=2)
    assert course == plain(num_steps=2, accumulate=2)


def test_offloading_changes_no_bit_of_a_full_fine_tuning(
    plain, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    settings: dict[str, Any] = {"training_type": "sft", "num_steps": 2}
    assert train(checkpoint, prepared, entries, MOVING["offloaded"], **settings) == plain(**settings)


SPLIT = dataclasses.replace(MOVING["offloaded"], split_checkpoints=True)


@pytest.mark.parametrize("training_type", ["lora", "sft"])
def test_splitting_checkpoints_changes_no_bit(
    training_type: str, plain, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    settings: dict[str, Any] = {"training_type": training_type, "num_steps": 2}
    blocks: list[Any] = []
    course = train(
        *(checkpoint, prepared, entries, SPLIT),
        before_step=lambda number, transformer: blocks.extend(transformer.transformer_blocks),
        **settings,
    )
    assert course == plain(**settings)
    assert all(isinstance(block, SplitBlock) for block in blocks)


CHUNKS = MemoryOptions(feed_forward_chunks=3)


@pytest.fixture(scope="module")
def chunked(checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]) -> Course:
    return train(checkpoint, prepared, entries, CHUNKS)


def test_chunks_of_the_feed_forward_differ_by_rounding_only(
    plain, chunked: Course, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    torch.testing.assert_close(torch.tensor(chunked.losses), torch.tensor(plain().losses), rtol=1e-5, atol=0)
    # Gradients of the feed-forward's own weights are sums over the chunks.
    settings: dict[str, Any] = {"training_type": "sft", "num_steps": 2}
    ours, theirs = train(checkpoint, prepared, entries, CHUNKS, **settings), plain(**settings)
    assert ours != theirs  # else the chunks were not there
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(ours.norms), torch.tensor(theirs.norms), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "memory",
    [dataclasses.replace(MOVING[name], feed_forward_chunks=3) for name in ("checkpointed", "offloaded", "swapped-2")],
    ids=["checkpointed", "offloaded", "swapped"],
)
def test_chunks_go_with_every_other_strategy(
    memory: MemoryOptions, chunked: Course, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    assert train(checkpoint, prepared, entries, memory) == chunked


ALL = MemoryOptions(gradient_checkpointing=True, offload_activations=True, feed_forward_chunks=3, resident_blocks=2)


@pytest.mark.slow
def test_a_validation_between_steps_is_that_of_the_plain_model_and_leaves_the_training_as_it_was(
    chunked: Course, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    videos: dict[str, list[np.ndarray]] = {"plain": [], "all": []}

    def sample(name: str) -> Callable[[int, Any], None]:
        def before_step(number: int, transformer) -> None:
            if number in (0, 2, 3):
                options = SamplingOptions(num_frames=9, height=64, width=96, num_inference_steps=2)
                pipeline = pipeline_in_memory(
                    checkpoint, transformer, load_scheduler(checkpoint), options, torch.float32, torch.device("cpu")
                )
                pipeline.set_progress_bar_config(disable=True)
                embeds = prepared.read_tensors(entries[0].files["prompt"][0])["prompt_embeds"][None]
                prompt: dict[str, Any] = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}
                transformer.eval()
                videos[name].append(generate(pipeline, options, 1, max_sequence_length=226, **prompt))
                transformer.train()

        return before_step

    assert train(checkpoint, prepared, entries, ALL, before_step=sample("all")) == chunked
    train(checkpoint, prepared, entries, CHUNKS, num_steps=4, before_step=sample("plain"))
    assert len(videos["all"]) == 3
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(videos["all"], videos["plain"], strict=True))


def test_names_and_frozen_weights_stay(checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]) -> None:
    models: list[Any] = []

    def keep(number: int, transformer) -> None:
        models.append(transformer)

    train(checkpoint, prepared, entries, ALL, num_steps=2, before_step=keep)
    train(checkpoint, prepared, entries, MemoryOptions(), num_steps=1, before_step=keep)
    swapped, plain_model = models[0].state_dict(), models[2].state_dict()
    assert list(swapped) == list(plain_model)
    frozen = [name for name in swapped if "lora_" not in name]
    assert len(frozen) > 50 and all(torch.equal(swapped[name], plain_model[name]) for name in frozen)


IN_BACKWARD = MemoryOptions(optimizer_in_backward=True)
UNCLIPPED = dataclasses.replace(OPTIMIZER, max_grad_norm=0.0)


CLIPPED = dataclasses.replace(OPTIMIZER, max_grad_norm=1e-3)


@pytest.mark.parametrize(
    ("training_type", "dtype", "optimizer", "accumulate"),
    [
        ("lora", "fp32", UNCLIPPED, 1),
        ("sft", "bf16", UNCLIPPED, 1),  # with masters
        ("sft", "fp32", CLIPPED, 1),
        ("lora", "fp32", UNCLIPPED, 2),
        ("lora", "fp32", CLIPPED, 2),
    ],
)
def test_stepping_in_the_backward_pass_changes_no_bit(
    training_type: str,
    dtype: str,
    optimizer: OptimizerOptions,
    accumulate: int,
    plain,
    checkpoint: Checkpoint,
    prepared: PreparedSet,
    entries: list[Entry],
) -> None:
    settings: dict[str, Any] = {"training_type": training_type, "optimizer_options": optimizer, "num_steps": 2}
    settings["accumulate"] = accumulate
    memory = dataclasses.replace(IN_BACKWARD, gradient_checkpointing=True, offload_activations=True)
    if training_type == "lora":
        memory = dataclasses.replace(memory, resident_blocks=2)
    course = train(checkpoint, prepared, entries, memory, TYPES[dtype], **settings)
    assert course == plain(dtype, **settings)
    assert min(course.norms) > CLIPPED.max_grad_norm


def options_of(
    memory: MemoryOptions, training_type: Any = "lora", optimizer: OptimizerOptions = OPTIMIZER, accumulate: int = 1
) -> Train:
    return Train(
        memory=memory,
        method=MethodOptions(training_type=training_type),
        optimizer=optimizer,
        training=TrainingOptions(gradient_accumulation_steps=accumulate),
    )


PRODIGY = dataclasses.replace(UNCLIPPED, optimizer="prodigy")


@pytest.mark.parametrize(
    ("options", "num_processes", "told"),
    [
        (options_of(MemoryOptions(offload_activations=True)), 1, "--offload_activations: needs the blocks to be check"),
        (options_of(MemoryOptions(resident_blocks=2)), 1, "--resident_blocks: needs the blocks to be checkpointed; ad"),
        (options_of(MOVING["swapped-2"], "sft"), 1, "--resident_blocks: is for weights that are frozen, and --trainin"),
        (options_of(MemoryOptions(quantize_base="int8"), "sft"), 1, "--quantize_base: is for weights that are frozen"),
        (
            options_of(dataclasses.replace(CHECKPOINTED, split_checkpoints=True)),
            1,
            "--split_checkpoints: on the GPU it takes more than it saves; add --offload_activations",
        ),
        (options_of(dataclasses.replace(SPLIT, resident_blocks=1)), 1, "not together with --resident_blocks 1, which"),
        (options_of(MOVING["swapped-2"]), 2, "--resident_blocks: for one GPU only, and there are 2 processes"),
        (options_of(IN_BACKWARD, optimizer=PRODIGY), 1, "--optimizer_in_backward: prodigy finds one rate"),
        (options_of(IN_BACKWARD, optimizer=UNCLIPPED), 2, "--optimizer_in_backward: for one GPU only"),
    ],
)
def test_what_cannot_be_applied_is_refused(options: Train, num_processes: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_memory(options, num_processes, has_scaler=False)


def test_what_can_be_applied_is_not_refused() -> None:
    for memory in MOVING.values():
        check_memory(options_of(memory), 1, has_scaler=True)
    check_memory(options_of(dataclasses.replace(ALL, resident_blocks=None), "sft"), 2, has_scaler=False)
    check_memory(options_of(IN_BACKWARD, "sft", CLIPPED, accumulate=2), 1, has_scaler=False)
    with pytest.raises(UserError, match="not together with fp16"):
        check_memory(options_of(IN_BACKWARD, optimizer=UNCLIPPED), 1, has_scaler=True)


def test_the_table_names_options_that_exist_and_the_page_names_them_all() -> None:
    flags = {f"--{option.name}" for option in dataclasses.fields(MemoryOptions)}
    assert {strategy.flag for strategy in STRATEGIES} - {None} == flags
    page = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    for strategy in STRATEGIES:
        assert strategy.name in page and (strategy.flag or "") in page
    everything = dataclasses.replace(ALL, optimizer_in_backward=True, quantize_base="int8", split_checkpoints=True)
    assert chosen(everything) == list(STRATEGIES) and len(chosen(MemoryOptions())) == 2


def test_the_loop_builds_a_model_with_what_is_asked_for(
    checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their results are those of the plain model, so that only the model itself shows whether they are there."""
    swaps: list[BlockSwap] = []
    checkpoints: list[OffloadedCheckpoints] = []
    for kind, made in ((BlockSwap, swaps), (OffloadedCheckpoints, checkpoints)):
        make: Any = kind.__init__

        def remember(self, *arguments, make=make, made=made) -> None:
            make(self, *arguments)
            made.append(self)

        monkeypatch.setattr(kind, "__init__", remember)

    def look(number: int, transformer) -> None:
        assert all(isinstance(block.ff, ChunkedFeedForward) for block in transformer.transformer_blocks)
        assert all(type(attention) is RotationInParts for attention in transformer.attn_processors.values())

    train(checkpoint, prepared, entries, ALL, num_steps=1, before_step=look)
    (swap,), (offloaded,) = swaps, checkpoints
    assert swap.num_resident == 2 and swap.num_copies == 6 and len(swap.resident()) == 2
    assert (offloaded.num_parked, offloaded.num_fetched) == (8, 8)
    for memory in (MemoryOptions(), dataclasses.replace(CHECKPOINTED, resident_blocks=4)):  # four are all there are
        train(checkpoint, prepared, entries, memory, num_steps=1)
    assert len(swaps) == len(checkpoints) == 1


def test_the_engine_moves_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(model, "to", None)  # what is swapped would be on the GPU for good
    loop.wrap(Accelerator(cpu=True), model, torch.optim.AdamW(model.parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [*MOVING.values(), ALL], ids=[*MOVING, "all"])
def test_on_a_gpu_they_change_no_bit(
    memory: MemoryOptions, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    whole = MemoryOptions(feed_forward_chunks=memory.feed_forward_chunks)
    gpu = torch.device("cuda")
    for dtype in TYPES.values():
        courses = [train(checkpoint, prepared, entries, options, dtype, device=gpu) for options in (whole, memory)]
        assert courses[0] == courses[1]


@pytest.mark.slow
def test_a_run_with_all_of_them_that_was_resumed_is_that_without(
    cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    tiny_model: Path,
    prepared_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(name: str, num_steps: int, *flags: str) -> None:
        code, _, messages = cli(
            *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder),
            *("--load_tensors", "--output_dir", tmp_path / name, "--rank", "4", "--learning_rate", "1e-2"),
            *(
                "--checkpointing_steps",
                "1",
                "--validation_loss_steps",
                "2",
                "--validation_fraction",
                "0.2",
                "--max_train_steps",
                str(num_steps),
            ),
            *("--validation_prompt", "a red square", "--num_inference_steps", "2", "--num_frames", "9"),
            *("--validation_steps", "2", "--ema_decay", "0.5", "--max_grad_norm", "0", *flags),
        )
        assert code == 0, messages

    all_flags = ["--gradient_checkpointing", "--offload_activations", "--resident_blocks", "2"]
    all_flags += ["--feed_forward_chunks", "3"]
    built: list[bool] = []

    def build(*arguments: Any, in_backward: bool, **others: Any) -> torch.optim.Optimizer:
        built.append(in_backward)
        return build_optimizer(*arguments, in_backward=in_backward, **others)

    held: dict[int, int] = {}  # bytes that the training keeps besides the model, by step
    validate = Validation.run_in_memory

    def look(self: Validation, step: int, *arguments: Any, **others: Any) -> None:
        held[step] = sum(tensor.nbytes for tensor in arguments[-1])
        validate(self, step, *arguments, **others)

    monkeypatch.setattr(Validation, "run_in_memory", look)
    monkeypatch.setattr(loop, "build_optimizer", build)
    run("plain", 4)
    run("all", 3, *all_flags, "--optimizer_in_backward")  # which its checkpoint does not depend on
    run("all", 4, *all_flags, "--resume_from_checkpoint", "latest")
    assert built == [False, True, False]
    average = held[0]  # before the first step the optimizer has no states
    assert average > 0 and 3 * average < held[2] < 3.1 * average
    written = ["pytorch_lora_weights.safetensors"]
    written += [f"checkpoints/step-00000004/{name}.safetensors" for name in ("trainable", "ema", "optimizer")]
    for file in written:
        plain, ours = (load_file(tmp_path / name / file) for name in ("plain", "all"))
        names = plain.keys() - {"rng.torch"}  # moved on by what a second start draws anew
        assert plain.keys() == ours.keys() and all(torch.equal(plain[name], ours[name]) for name in names), file
    for step in (0, 2, 4):  # all but the last in the memory of the training
        video = f"validation/step-{step:08}/prompt-00-video-0.mp4"
        assert (tmp_path / "plain" / video).read_bytes() == (tmp_path / "all" / video).read_bytes(), video
    held_out = [
        {line["step"]: line["loss"] for line in read_metrics(tmp_path / name / "validation_loss.jsonl")}
        for name in ("plain", "all")
    ]
    assert held_out[0].keys() == {0, 2, 4}
    assert held_out[0] == {step: held_out[1][step] for step in (0, 2, 4)}

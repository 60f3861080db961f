"""The same training on one process and on several, under each engine that runs without a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from processes import run_on_ranks
from safetensors.torch import load_file

from cogvideox_factory.config import LoraOptions, MemoryOptions, MethodOptions, OptimizerOptions, Train, UserError
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.training import loop
from cogvideox_factory.training.engine import check_engine, make_accelerator
from cogvideox_factory.training.metrics import read_metrics

Cli = Callable[..., tuple[int, str, str]]
CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
METHODS = {
    "lora": ("--rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2"),
    "sft": ("--training_type", "sft", "--learning_rate", "1e-3"),
}


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, prepared_folder: Path) -> Callable[..., list[str | Path]]:
    """The command line of a training of four steps of four clips, over the end of an epoch of twelve."""

    def make(run: Path, method: str, *flags: str | Path) -> list[str | Path]:
        return [
            *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder),
            *("--load_tensors", "--report_to", "none", "--output_dir", run),
            *METHODS[method],
            *("--max_train_steps", "4", "--checkpointing_steps", "2", "--max_grad_norm", "0.01", *flags),
        ]

    return make


@pytest.fixture(scope="module")
def on_one_process(arguments, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a method on one process, with four clips in a batch; made when first asked for."""
    from cogvideox_factory.cli import main

    made: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in made:
            run = tmp_path_factory.mktemp(method) / "run"
            assert main([str(word) for word in arguments(run, method, "--train_batch_size", "4")]) == 0
            made[method] = run
        return made[method]

    return get


def assert_same_course(run: Path, reference: Path) -> None:
    """Equal losses, norms, rates and weights, up to the rounding of sums that are made in another order."""
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, reference))
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "lr", "samples_seen", "epoch"):
        expected = [line[name] for line in theirs]
        assert [line[name] for line in ours] == pytest.approx(expected, rel=2e-5), name
    before, mine, other = (saved(folder, step) for folder, step in ((reference, 2), (run, 4), (reference, 4)))
    assert mine.keys() == other.keys()
    distance = max((mine[name].float() - value.float()).abs().max().item() for name, value in other.items())
    moved = max((before[name].float() - value.float()).abs().max().item() for name, value in other.items())
    assert distance < moved / 50


def saved(run: Path, step: int, file: str = "trainable") -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08}/{file}.safetensors")


def test_two_processes_train_what_one_does(arguments, on_one_process, tmp_path: Path) -> None:
    """Also the noise of a clip, which belongs to it and not to the process."""
    assert run_on_ranks("ddp", *arguments(tmp_path / "run", "lora", "--train_batch_size", "2")) == [0, 0]
    assert_same_course(tmp_path / "run", on_one_process("lora"))


SHARED_OUT = (
    *(("ddp", "lora", 1, 2), ("ddp", "sft", 2, 1)),
    *(
        (engine, method, *split)
        for engine in ("zero2", "zero3", "fsdp2")
        for method, *split in (("lora", 1, 2), ("sft", 2, 1))
    ),
)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize(("method", "batch_size", "accumulate"), [("lora", 1, 2), ("sft", 2, 1)])
def test_every_engine_trains_what_one_process_does(
    arguments, on_one_process, tmp_path: Path, engine: str, method: str, batch_size: int, accumulate: int
) -> None:
    split = ("--train_batch_size", str(batch_size), "--gradient_accumulation_steps", str(accumulate))
    assert run_on_ranks(engine, *arguments(tmp_path / "run", method, *split)) == [0, 0]
    assert_same_course(tmp_path / "run", on_one_process(method))
    exported = "pytorch_lora_weights" if method == "lora" else "transformer/diffusion_pytorch_model"
    ours, theirs = (load_file(run / f"{exported}.safetensors") for run in (tmp_path / "run", on_one_process(method)))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=2e-3), name


def test_accumulated_batches_of_one_process_are_one_batch(arguments, on_one_process, tmp_path: Path, cli: Cli) -> None:
    split = ("--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    code, _, messages = cli(*arguments(tmp_path / "run", "lora", *split))
    assert code == 0, messages
    assert_same_course(tmp_path / "run", on_one_process("lora"))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("method", ["lora", "sft"])
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_going_on_under_the_same_engine_is_exact(arguments, tmp_path: Path, engine: str, method: str) -> None:
    """In bf16, whose fp32 masters go on too."""
    run = tmp_path / "run"
    flags = ("--train_batch_size", "2", "--mixed_precision", "bf16")
    assert run_on_ranks(engine, *arguments(run, method, *flags)) == [0, 0]
    shutil.copytree(run, tmp_path / "whole")
    shutil.rmtree(run / "checkpoints/step-00000004")
    assert run_on_ranks(engine, *arguments(run, method, *flags, "--resume_from_checkpoint", "latest")) == [0, 0]
    for file in ("trainable", "optimizer"):
        ours, theirs = (saved(folder, 4, file) for folder in (run, tmp_path / "whole"))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
    assert {value.dtype for value in saved(run, 4).values()} == {torch.float32}  # masters


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("first", "second"), [("zero2", "ddp"), ("ddp", "zero2"), ("zero3", "fsdp2"), ("fsdp2", "zero3")]
)
def test_a_run_goes_on_under_another_engine(arguments, on_one_process, tmp_path: Path, first: str, second: str) -> None:
    """With its optimizer's state: a new one would take other steps."""
    run, flags = tmp_path / "run", ("--train_batch_size", "2")
    assert run_on_ranks(first, *arguments(run, "lora", *flags)) == [0, 0]
    shutil.rmtree(run / "checkpoints/step-00000004")
    assert run_on_ranks(second, *arguments(run, "lora", *flags, "--resume_from_checkpoint", "latest")) == [0, 0]
    assert_same_course(run, on_one_process("lora"))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_step_with_a_loss_that_is_no_number_changes_nothing(
    arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Of one rank, in the third step; engines that step by themselves leave it out by themselves."""
    velocity_loss, calls = loop.velocity_loss, iter(range(100))

    def broken(*inputs: Any) -> torch.Tensor:
        is_broken = next(calls) == 2 and os.environ["RANK"] == "1"
        return velocity_loss(*inputs) * (float("nan") if is_broken else 1.0)

    monkeypatch.setattr(loop, "velocity_loss", broken)  # the processes are forked
    flags = ("--train_batch_size", "2", "--checkpointing_steps", "1", "--mixed_precision", "bf16")
    assert run_on_ranks(engine, *arguments(tmp_path / "run", "lora", *flags)) == [0, 0]
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line.get("skipped", False) for line in lines] == [False, False, True, False]
    steps_of_adam = {
        step: {
            value.item() for name, value in saved(tmp_path / "run", step, "optimizer").items() if name.endswith("step")
        }
        for step in (2, 4)
    }
    assert steps_of_adam == {2: {2.0}, 4: {3.0}}
    assert all(value.isfinite().all() for value in saved(tmp_path / "run", 4).values())


def under_deepspeed(stage: int = 2) -> Any:
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=stage)
    )


@pytest.mark.parametrize(
    ("group", "values", "flag"),
    [
        ("optimizer", OptimizerOptions(optimizer="prodigy"), "--optimizer prodigy"),
        ("optimizer", OptimizerOptions(optimizer="came"), "--optimizer came"),
        ("optimizer", OptimizerOptions(use_8bit=True), "--use_8bit"),
        ("optimizer", OptimizerOptions(use_4bit=True, use_torchao=True), "--use_4bit"),
        ("optimizer", OptimizerOptions(use_fp8=True, use_torchao=True), "--use_fp8"),
        ("optimizer", OptimizerOptions(trainable_dtype="bf16"), "--trainable_dtype bf16"),
        ("optimizer", OptimizerOptions(use_cpu_offload_optimizer=True), "--use_cpu_offload_optimizer"),
        ("memory", MemoryOptions(optimizer_in_backward=True), "--optimizer_in_backward"),
        ("memory", MemoryOptions(resident_blocks=2), "--resident_blocks"),
        ("memory", MemoryOptions(quantize_base="int8"), "--quantize_base"),
        ("lora", LoraOptions(use_dora=True), "--use_dora"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused(group: str, values: Any, flag: str) -> None:
    options = dataclasses.replace(Train(), **{group: values})
    with pytest.raises(UserError, match=f"{flag}: not together with DeepSpeed"):
        check_engine(options, under_deepspeed())


def test_a_moving_average_needs_whole_weights() -> None:
    options = Train(method=MethodOptions(ema_decay=0.9))
    check_engine(options, under_deepspeed(2))
    with pytest.raises(UserError, match=r"--ema_decay: .* ZeRO-2"):
        check_engine(options, under_deepspeed(3))


@pytest.mark.parametrize("stage", [0, 1])
def test_other_stages_of_zero_are_refused(stage: int) -> None:
    with pytest.raises(UserError, match=f"zero_stage {stage}"):
        check_engine(Train(), under_deepspeed(stage))


def test_fsdp_is_that_of_torch_version_2() -> None:
    under_fsdp: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    check_engine(Train(), under_fsdp)
    with pytest.raises(UserError, match="--use_8bit: not together with FSDP2"):
        check_engine(Train(optimizer=OptimizerOptions(use_8bit=True)), under_fsdp)
    under_fsdp.is_fsdp2 = False
    with pytest.raises(UserError, match=r"fsdp2\.yaml"):
        check_engine(Train(), under_fsdp)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "deepspeed_zero2", "deepspeed_zero3_offload", "fsdp2"])
def test_every_config_trains_on_gpus(arguments, on_one_process, tmp_path: Path, config: str) -> None:
    """As many processes as there are GPUs, by accelerate's own launcher; in fp32, as on one of them."""
    num_gpus = torch.cuda.device_count()
    if 4 % num_gpus:
        pytest.skip("four clips a step cannot be shared out evenly")
    launch = ["accelerate", "launch", "--config_file", CONFIGS / f"{config}.yaml", "--num_processes", str(num_gpus)]
    flags = ("--mixed_precision", "no", "--train_batch_size", str(4 // num_gpus))
    command = [*launch, "-m", "cogvideox_factory", *arguments(tmp_path / "run", "lora", *flags)]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_course(tmp_path / "run", on_one_process("lora"))


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_fp16_is_refused_where_the_engine_would_have_to_scale_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setattr(type(checkpoint), "dtype_for", lambda *asked: torch.float16)  # as on a GPU
    with pytest.raises(UserError, match="--mixed_precision fp16: not together with"):
        make_accelerator(Train(), checkpoint)


@needs_deepspeed
def test_deepspeed_that_the_launcher_rules_out_is_not_left_out_in_silence(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="--cpu rules it out"):
        make_accelerator(Train(), checkpoint)


def test_deepspeed_that_is_not_installed_is_asked_for(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        make_accelerator(Train(), checkpoint)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_one_of_accelerate_and_says_how_it_is_used(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # the program's own --mixed_precision decides
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in comment
    zero = yaml.safe_load(path.read_text()).get("deepspeed_config", {})
    assert zero.get("zero_stage") == 3 or "offload_param_device" not in zero  # trap: it is effective in ZeRO-3 only

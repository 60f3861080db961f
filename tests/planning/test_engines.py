"""What one of several processes holds. The reference is arithmetic written out for each engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import Plan, UserError, with_values
from cogvideox_factory.memory.tracker import PARTS, Moment
from cogvideox_factory.planning import open_configs, resolve
from cogvideox_factory.planning.engines import Weights, of_a_rank, stages_of_its_own
from cogvideox_factory.planning.phases import Phase
from cogvideox_factory.planning.search import Budget, search
from cogvideox_factory.planning.texts import GIB, budget_of
from cogvideox_factory.planning.traces import Traces

MODEL = ("--pretrained_model_name_or_path", "THUDM/CogVideoX-2b")
MILLION = 10**6


def moment(host: int = 0, **parts: int) -> Moment:
    return Moment({**dict.fromkeys(PARTS, 0), **parts}, host)


def one(stage: Moment, engine: str, num_ranks: int, weights: Weights) -> Moment:
    return of_a_rank({"it": stage}, engine, num_ranks, weights)["it"]


FULL = Weights(100 * MILLION, 100 * MILLION, trained_bytes=200 * MILLION, part="weights", gathered=10 * MILLION)
LORA = Weights(105 * MILLION, 5 * MILLION, trained_bytes=20 * MILLION, part="adapter", gathered=10 * MILLION)
LARGE = Weights(5000 * MILLION, 5000 * MILLION, trained_bytes=10_000 * MILLION, part="weights", gathered=0)
# Full fine-tuning in bf16 with fp32 masters and states, while it goes backward and between steps.
FULL_STEP = moment(weights=200 * MILLION, gradients=200 * MILLION, optimizer=1200 * MILLION, activations=7, host=3)
FULL_HELD = moment(weights=200 * MILLION, optimizer=1200 * MILLION)
LORA_STEP = moment(weights=200 * MILLION, adapter=20 * MILLION, gradients=4, optimizer=40 * MILLION, activations=7)


def test_one_process_holds_what_it_held() -> None:
    assert one(FULL_STEP, "zero3", 1, FULL) == FULL_STEP


def test_ddp_keeps_the_buckets_of_gradients() -> None:
    assert one(FULL_STEP, "ddp", 8, FULL) == FULL_STEP
    assert one(FULL_HELD, "ddp", 8, FULL).parts == {**FULL_HELD.parts, "gradients": 200 * MILLION}
    assert one(LORA_STEP, "ddp", 2, LORA).parts == {**LORA_STEP.parts, "gradients": 20 * MILLION}


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_zero2_divides_masters_states_and_gradients(num_ranks: int) -> None:
    rank = one(FULL_STEP, "zero2", num_ranks, FULL)
    assert rank.parts["weights"] == 200 * MILLION
    assert rank.parts["optimizer"] == 1200 * MILLION // num_ranks
    # Its part of the averaged gradients in fp32; a bucket of all in bf16, and in fp32 on its way.
    assert rank.parts["gradients"] == (400 // num_ranks + 200 + 400) * MILLION
    assert rank.parts["activations"] == 7 and rank.host == 3


def test_zero2_holds_a_lora_in_16_bits() -> None:
    rank = one(LORA_STEP, "zero2", 5, replace(LORA, average=11))
    assert rank.parts["weights"] == 200 * MILLION and rank.parts["adapter"] == 10 * MILLION
    assert rank.parts["optimizer"] == 12 * MILLION + 11


def test_a_bucket_of_deepspeed_has_a_limit() -> None:
    stage = moment(weights=10_000 * MILLION)
    assert one(stage, "zero2", 10, LARGE).parts["gradients"] == (5000 // 10 * 4 + 500 * 6) * MILLION


def test_zero3_divides_the_weights_too_and_keeps_its_parts_on_the_host() -> None:
    stage = moment(weights=10_000 * MILLION + 9, optimizer=60_000 * MILLION, host=5)
    rank = one(stage, "zero3", 10, LARGE)
    assert rank.parts["weights"] == 2 * 1000 * MILLION + 9  # what lives at a time, and the VAE
    assert rank.parts["optimizer"] == 0
    assert rank.host == 5 + (2 + 4 + 12) * 5000 * MILLION // 10
    rank = one(LORA_STEP, "zero3", 5, LORA)
    assert rank.parts["weights"] == 210 * MILLION and rank.parts["adapter"] == 0
    assert rank.host == (105 * 2 + 5 * 16) * MILLION // 5


def test_deepspeed_brings_the_whole_model_before_it_divides_it() -> None:
    start = stages_of_its_own("zero3", 8, 8, LORA)["before it is divided", 0]
    assert start.parts == moment(weights=2 * 105 * MILLION).parts
    assert stages_of_its_own("fsdp2", 8, 8, FULL)["before it is divided", 0] == moment(host=4 * 100 * MILLION)
    for engine, count in (("zero3", 1), ("ddp", 8)):
        assert not stages_of_its_own(engine, count, count, LORA)


def test_a_checkpoint_gathers_weights_and_states_on_one_machine() -> None:
    for engine in ("zero2", "fsdp2"):
        saved = stages_of_its_own(engine, 8, 4, FULL)["a checkpoint", 0]
        assert saved == moment(host=12 * 100 * MILLION // 4)
    saved = stages_of_its_own("zero3", 10, 5, FULL)["a checkpoint", 0]
    assert saved.host == (12 * 100 // 5 + (2 + 4 + 12) * 100 // 10) * MILLION


def test_fsdp2_keeps_a_rank_s_parts_and_the_blocks_at_work() -> None:
    rank = one(FULL_STEP, "fsdp2", 4, FULL)
    assert rank.parts["weights"] == (100 // 4 * 4 + 10 * 2) * MILLION
    assert rank.parts["optimizer"] == 100 // 4 * 8 * MILLION and rank.parts["gradients"] == 100 // 4 * 4 * MILLION
    rank = one(LORA_STEP, "fsdp2", 5, LORA)
    assert rank.parts["weights"] == (100 // 5 * 2 + 5 // 5 * 4 + 10 * 2) * MILLION and rank.parts["adapter"] == 0


def test_the_plan_is_of_one_rank(shallow_model: Path) -> None:
    """What is held between two steps of full fine-tuning."""
    flags = ("--pretrained_model_name_or_path", str(shallow_model), "--training_type", "sft")
    options = parse_command(Plan, "plan", (*flags, "--mixed_precision", "bf16"))
    held = {}
    with open_configs(options) as checkpoint:
        traces = Traces(checkpoint)
        resolved = resolve(options, checkpoint)
        for ranks in (("ddp", 1), ("ddp", 4), ("zero2", 4), ("zero2", 8)):
            values = dict(zip(("engine", "num_processes"), ranks, strict=True))
            held[ranks] = traces.phase("held", with_values(resolved, values)).parts
    alone = held["ddp", 1]
    assert held["ddp", 4].items() >= {**alone, "gradients": held["ddp", 4]["gradients"]}.items()
    assert held["ddp", 4]["gradients"] == pytest.approx(alone["optimizer"] / 6, rel=0.01)  # 2 bytes, against 12
    for count in (4, 8):
        assert held["zero2", count]["optimizer"] == pytest.approx(alone["optimizer"] / count, rel=0.01)
        assert held["zero2", count]["weights"] == alone["weights"]


def test_what_is_for_one_gpu_is_refused_and_not_chosen() -> None:
    several = (*MODEL, "--training_type", "sft", "--gradient_checkpointing", "--num_processes", "2")
    options = parse_command(Plan, "plan", (*several, "--optimizer_in_backward"))
    with open_configs(options) as checkpoint, pytest.raises(UserError, match="--optimizer_in_backward: for one GPU"):
        resolve(options, checkpoint)


def test_fp16_is_for_ddp() -> None:
    several = ("--pretrained_model_name_or_path", "THUDM/CogVideoX-2b", "--num_processes", "2", "--engine", "zero2")
    options = parse_command(Plan, "plan", several)
    with open_configs(options) as checkpoint, pytest.raises(UserError, match="--mixed_precision fp16: not together"):
        resolve(options, checkpoint)


def test_processes_of_a_machine_share_its_memory() -> None:
    options = Plan(num_processes=8, num_machines=2)
    shared = with_values(options, {"host_memory": 128.0, "gpu_memory": 24.0})
    assert budget_of(shared).host == (128 / 4 - 2) * GIB
    assert budget_of(shared).gpu == pytest.approx((24 - 1.2) * GIB)


class TooLarge:
    """Traces of a model that no settings make fit."""

    num_blocks = 4

    def has_scaler(self, options: Plan) -> bool:
        return False

    def phase(self, name: str, options: Plan) -> Phase:
        return Phase(name, {("all", 0): moment(weights=10**15)})


def test_what_does_not_go_with_an_engine_is_neither_taken_nor_chosen(shallow_model: Path) -> None:
    flags = (
        "--pretrained_model_name_or_path",
        str(shallow_model),
        "--training_type",
        "sft",
        "--mixed_precision",
        "bf16",
    )
    several = ("--num_processes", "2", "--engine", "zero2")
    options = parse_command(Plan, "plan", (*flags, *several, "--use_8bit"))
    with open_configs(options) as checkpoint, pytest.raises(UserError, match="--use_8bit: not together with DeepSpeed"):
        resolve(options, checkpoint)
    options = parse_command(Plan, "plan", (*flags, *several, "--gpu_memory", "1.25"))
    with open_configs(options) as checkpoint:
        found = search(resolve(options, checkpoint), cast(Traces, TooLarge()), Budget(gpu=0), ["training"])
    assert not found.fits and found.values["gradient_checkpointing"] and found.values["offload_activations"]
    refused = {"use_8bit", "use_4bit", "use_cpu_offload_optimizer", "optimizer_in_backward", "trainable_dtype"}
    assert not refused & set(found.values)


def test_what_an_engine_has_views_of_stays_while_a_video_is_decoded(shallow_model: Path) -> None:
    flags = ("--pretrained_model_name_or_path", str(shallow_model), "--rank", "4", "--enable_model_cpu_offload")
    options = parse_command(Plan, "plan", flags)
    waiting = {}
    with open_configs(options) as checkpoint:
        traces, resolved = Traces(checkpoint), resolve(options, checkpoint)
        for engine in ("ddp", "zero2"):
            ranks = with_values(resolved, {"engine": engine, "num_processes": 2})
            stages = traces.phase("validation", ranks).stages
            waiting[engine] = max(stage.host for (name, _), stage in stages.items() if name == "decoding")
        weights = traces.phase("held", resolved).parts["weights"]
    assert waiting["ddp"] - waiting["zero2"] > weights

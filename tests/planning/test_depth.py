"""Figures extended from shallow models against traces of the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import Plan
from cogvideox_factory.memory.tracker import Moment
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.planning import open_configs, resolve, traces
from cogvideox_factory.planning.depth import DEPTHS, Stages, along_line, at_full_depth, blocks_are_alike, with_depth
from cogvideox_factory.planning.fakes import GPU, FakeTracker, fake_world
from cogvideox_factory.planning.phases import Phase, load_transformer, trace_steps
from cogvideox_factory.planning.traces import Traces
from cogvideox_factory.training.loop import build_model

CHECKPOINTED = "--gradient_checkpointing"
SIZE = ("--height_buckets", "32", "--width_buckets", "48", "--frame_buckets", "9", "--rank", "4")


def plan(model: Path, *flags: str) -> Plan:
    return parse_command(Plan, "plan", ("--model_id", str(model), *SIZE, *flags))


STEPS = [
    (CHECKPOINTED, "--offload_activations", "--resident_blocks", "2", "--feed_forward_chunks", "2"),
    pytest.param(
        (CHECKPOINTED, "--training_type", "sft", "--optimizer_in_backward", "--max_grad_norm", "0", "--use_8bit"),
        marks=pytest.mark.slow,
    ),
    pytest.param((), marks=pytest.mark.slow),
    pytest.param(("--training_type", "sft", "--gradient_accumulation_steps", "2"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("flags", STEPS, ids=" ".join)
def test_a_step_of_seven_blocks_is_told_from_five(flags: tuple[str, ...], tiny_model: Path) -> None:
    options = plan(tiny_model, *flags)
    with open_configs(options) as checkpoint:
        checkpoint = with_depth(checkpoint, 7)
        options = resolve(options, checkpoint)

        def step(checkpoint: Checkpoint) -> Stages:
            dtype = checkpoint.weights_dtype
            with FakeTracker() as tracker:
                transformer = build_model(options, checkpoint, dtype, GPU, load=load_transformer)
                return trace_steps(options, checkpoint, transformer, dtype, tracker).phase.stages

        with fake_world():
            extended, whole = at_full_depth(checkpoint, options, step), step(checkpoint)
    assert figures(Phase("training", extended)) == figures(Phase("training", whole))


@pytest.mark.slow
@pytest.mark.parametrize("sparing", [(), ("--resident_blocks", "2", CHECKPOINTED, "--enable_model_cpu_offload")])
def test_all_phases_of_twelve_blocks_are_told_from_five(
    sparing: tuple[str, ...], tiny_model: Path, monkeypatch
) -> None:
    options = plan(tiny_model, *sparing)
    with open_configs(options) as checkpoint:
        checkpoint = with_depth(checkpoint, 12)
        options = resolve(options, checkpoint)
        extended = Traces(checkpoint).phases(options)
        monkeypatch.setattr(traces, "at_full_depth", lambda checkpoint, options, trace: trace(checkpoint))
        whole = Traces(checkpoint).phases(options)
    assert [figures(phase) for phase in extended] == [figures(phase) for phase in whole]


def figures(phase: Phase) -> tuple[object, ...]:
    return phase.name, phase.peak, dict(phase.parts), phase.host


def test_the_highest_stage_may_be_another_at_full_depth() -> None:
    """A stage that starts low and grows with each block overtakes one that does not."""
    low, high = DEPTHS

    def stages(depth: int) -> dict[str, Moment]:
        return {"grows": Moment({"weights": 10 * depth}, depth), "stays": Moment({"weights": 100}, 0)}

    few, more = stages(low), stages(high)
    assert max(more, key=lambda name: more[name].peak) == "stays"
    assert along_line(few, more, DEPTHS, 42) == stages(42)


def test_a_name_that_singles_blocks_out_is_traced_whole(tiny_model: Path) -> None:
    alike = ((), ("--target_modules", "to_q", "to_out.0", "ff.net.2"), ("--target_modules", "proj", "net.0.proj"))
    assert all(blocks_are_alike(plan(tiny_model, *flags)) for flags in alike)
    one = ("--training_type", "sft", "--trainable_modules")
    assert blocks_are_alike(plan(tiny_model, *one, "transformer_blocks.*.ff"))
    for name in ("transformer_blocks.0", "transformer_blocks.[0-9].ff", "1.attn1.to_q", "*.1?.ff"):
        assert not blocks_are_alike(plan(tiny_model, *one, name))
    options = plan(tiny_model, *one, "transformer_blocks.7")
    with open_configs(options) as checkpoint:
        whole = at_full_depth(with_depth(checkpoint, 12), options, lambda given: {"": moment_of(given)})
    assert whole == {"": Moment({"weights": 12}, 0)}


def moment_of(checkpoint: Checkpoint) -> Moment:
    return Moment({"weights": checkpoint.transformer["num_layers"]}, 0)

"""The `plan` command, from flags to what it prints."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvideox_factory import planning
from cogvideox_factory.config import Plan
from cogvideox_factory.memory.tracker import PARTS, Moment
from cogvideox_factory.planning.fakes import GPU, FakeTracker, fake_world
from cogvideox_factory.planning.phases import Phase, load_transformer, trace_steps
from cogvideox_factory.planning.traces import NAMES, Traces
from cogvideox_factory.training.loop import build_model

Cli = Callable[..., tuple[int, str, str]]


def test_the_plan_for_programs_and_for_people(
    cli: Cli, shallow_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", None)  # nothing may be looked up
    flags = ("plan", "--pretrained_model_name_or_path", shallow_model, "--rank", "4", "--gpu_memory", "24")
    code, out, messages = cli(*flags, "--json")
    assert code == 0, messages
    plan = json.loads(out)
    assert set(plan) == {"settings", "phases", "peak_gib", "budget_gib", "fits"}
    assert plan["settings"]["rank"] == 4 and plan["settings"]["frame_buckets"] == [17]
    assert [phase["name"] for phase in plan["phases"]] == ["preparing", "training", "validation", "testing"]
    for phase in plan["phases"]:
        assert set(phase) == {"name", "peak_gib", "host_gib", "parts"} and set(phase["parts"]) == set(PARTS)
        assert phase["peak_gib"] == pytest.approx(sum(phase["parts"].values()))
    assert plan["peak_gib"] == max(phase["peak_gib"] for phase in plan["phases"])
    assert plan["budget_gib"] == 24 and plan["fits"] is True
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(Traces, "phases", lambda *_: [Phase("testing", {"": Moment(dict.fromkeys(PARTS, 2**30), 0)})])
    code, out, _ = cli(*flags[:-1], "6.1")
    assert code == 0
    assert "not measured" in out and "planned peak 5.00 GiB, in testing" in out
    assert "--gpu_memory 6.1: does not fit, by 0.10 GiB" in out


def test_a_model_that_is_not_known(cli: Cli) -> None:
    code, out, messages = cli("plan", "--model_id", "THUDM/CogVideoX-5B-I2V-2")
    assert (code, out) == (2, "")
    assert "did you mean THUDM/CogVideoX-5b-I2V" in messages and "THUDM/CogVideoX1.5-5B-I2V" in messages


def test_what_training_refuses_is_refused(cli: Cli, tiny_model: Path) -> None:
    code, _, messages = cli("plan", "--model_id", tiny_model, "--frame_buckets", "19")
    assert code == 2 and "--frame_buckets 19" in messages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "traced_gib"),
    [
        ("zai-org/CogVideoX-5b", (), 17.66),
        ("THUDM/CogVideoX-2b", (), 6.88 - 0.19),  # positions that the trace has in float64
        ("THUDM/CogVideoX-5b", ("--offload_activations", "--feed_forward_chunks", "8"), 13.01),
    ],
)
def test_the_published_sizes_take_what_is_known(name: str, flags: tuple[str, ...], traced_gib: float) -> None:
    """Against traces made independently: a bf16 forward, LoRA of rank 64, every block checkpointed, batch 1."""
    from cogvideox_factory.command_line import parse_command

    options = parse_command(Plan, "plan", ("--model_id", name, "--gradient_checkpointing", *flags))
    with planning.open_configs(options) as checkpoint:
        options = planning.resolve(options, checkpoint)
        dtype = checkpoint.weights_dtype
        with fake_world(), FakeTracker() as tracker:
            transformer = build_model(options, checkpoint, dtype, GPU, load=load_transformer)
            peak = trace_steps(options, checkpoint, transformer, dtype, tracker).phase.peak / 2**30
    assert traced_gib * 0.99 <= peak <= traced_gib * 1.03


class Traced:
    """A training of 3 GiB, or of 1 with checkpointed blocks; all else takes half a GiB."""

    num_blocks = 4

    def __init__(self, checkpoint: object):
        pass

    def has_scaler(self, options: Plan) -> bool:
        return False

    def phases(self, options: Plan) -> list[Phase]:
        return [self.phase(name, options) for name in NAMES]

    def phase(self, name: str, options: Plan) -> Phase:
        halves = 1 if name != "training" else 2 if options.memory.gradient_checkpointing else 6
        return Phase(name, {"": Moment({**dict.fromkeys(PARTS, 0), "weights": halves * 2**29}, 2**30)})


def test_fit_says_what_it_chose_or_that_nothing_fits(
    cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "Traces", Traced)
    flags = ("plan", "--model_id", tiny_model, "--fit")
    code, out, _ = cli(*flags, "--gpu_memory", "4")
    assert code == 0 and "the fastest settings found are --gradient_checkpointing\n" in out
    assert "too much  as given" in out and "planned peak 1.00 GiB" in out
    code, out, _ = cli(*flags, "--gpu_memory", "4", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["chosen"] == {"gradient_checkpointing": True} and plan["fits"] is True
    assert plan["settings"]["gradient_checkpointing"] is True and plan["peak_gib"] == 1.0
    code, out, messages = cli(*flags, "--gpu_memory", "2", "--host_memory", "8")
    assert (code, out) == (2, "") and "need a GPU of 2.20 GiB and 3.00 GiB of host memory" in messages
    code, _, messages = cli(*flags)
    assert code == 2 and "--fit: into what?" in messages


def test_the_verdict_looks_at_the_machine_too(cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "Traces", Traced)
    flags = ("plan", "--model_id", tiny_model, "--gpu_memory", "24", "--host_memory", "2.5")
    _, out, _ = cli(*flags)
    assert "--gpu_memory 24: fits" in out and "--host_memory 2.5: does not fit, by 0.50 GiB" in out
    assert json.loads(cli(*flags, "--json")[1])["fits"] is False

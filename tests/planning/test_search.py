"""The search against all settings there are, on a made-up model whose bytes are a formula."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.config import MethodOptions, OptimizerOptions, Plan, with_values
from cogvideox_factory.memory.strategies import STRATEGIES, Lever
from cogvideox_factory.memory.tracker import PARTS, Moment
from cogvideox_factory.planning.phases import Phase
from cogvideox_factory.planning.search import STATES, STATES_OF_LORA, WEIGHTS_IN_BF16, Budget, search
from cogvideox_factory.planning.traces import NAMES

Cli = Callable[..., tuple[int, str, str]]


class Formula:
    """Stands in for traces: the bytes of each phase from the options."""

    num_blocks = 10
    is_fp16 = False

    def has_scaler(self, options: Plan) -> bool:
        return self.is_fp16

    def __init__(self, weights: int = 100, activations: int = 400, video: int = 150, text: int = 90):
        self.weights, self.activations, self.video, self.text = weights, activations, video, text
        self.num_traced = 0

    def phases(self, options: Plan) -> list[Phase]:
        return [self.phase(name, options) for name in NAMES]

    def phase(self, name: str, options: Plan) -> Phase:
        self.num_traced += name == "training"
        memory, optimizer = options.memory, options.optimizer
        resident = self.num_blocks if memory.resident_blocks is None else memory.resident_blocks
        weights = self.weights * resident // self.num_blocks
        host = self.weights - weights
        states = 0
        if options.method.training_type == "sft":
            bits = 4 if optimizer.use_4bit else 8 if optimizer.use_8bit else 32
            states = 8 * self.weights * bits // 32 + (0 if optimizer.trainable_dtype == "bf16" else 2 * self.weights)
        held = weights + (0 if optimizer.use_cpu_offload_optimizer else states)
        host += states if optimizer.use_cpu_offload_optimizer else 0
        if name == "preparing":
            text = self.text // 10 if options.encoding.offload_text_encoder else self.text
            return self.moment(name, max(text, self.video // (4 if options.encoding.use_tiling else 1)), 0)
        if name == "held":
            return self.moment(name, held, host)
        if name == "training":
            kept = self.activations // (4 if memory.gradient_checkpointing else 1)
            if memory.offload_activations:
                kept, host = kept // 2, host + kept // 2
            if memory.split_checkpoints:
                kept, host = kept * 4 // 5, host + kept
            gradients = 0
            if options.method.training_type == "sft":
                gradients = 0 if memory.optimizer_in_backward or optimizer.offload_gradients else self.weights
            return self.moment(name, held + gradients + kept * 8 // (7 + memory.feed_forward_chunks), host)
        video = self.video // (4 if options.sampling.enable_tiling else 1)
        waiting = options.sampling.enable_model_cpu_offload
        if name == "validation":
            return self.moment(name, video if waiting else held + video, held if waiting else host)
        text = 0 if options.encoding.offload_text_encoder or waiting else self.text
        return self.moment(name, max(self.weights, video) if waiting else weights + text + video, self.text)

    @staticmethod
    def moment(name: str, peak: int, host: int) -> Phase:
        return Phase(name, {"": Moment({**dict.fromkeys(PARTS, 0), "weights": peak}, host)})


@dataclass(frozen=True)
class Step:
    """A way to make a step."""

    values: Mapping[str, Any]
    options: Plan
    order: tuple[bool, float]  # what is searched comes first: exact before quick before slow


@functools.cache
def all_steps(training_type: Any) -> list[Step]:
    """Every way to make a step, for the formula with two resident blocks."""
    is_lora = training_type == "lora"
    options = Plan(method=MethodOptions(training_type=training_type))
    rows = {strategy.flag: strategy.levers for strategy in STRATEGIES}
    names = ("gradient_checkpointing", "offload_activations", "feed_forward_chunks", "split_checkpoints")
    groups: list[tuple[Lever, ...]] = [rows[f"--{name}"] for name in names]
    if is_lora:
        groups += [rows["--resident_blocks"], STATES_OF_LORA, rows.get("--quantize_base", ())]
    else:
        groups += [rows["--optimizer_in_backward"], STATES, WEIGHTS_IN_BF16]
    steps = []
    for chosen in itertools.product(*((None, *levers) for levers in groups)):
        levers = [lever for lever in chosen if lever]
        values = {name: value for lever in levers for name, value in lever.values.items()}
        if not values.get("gradient_checkpointing") and {"offload_activations", "resident_blocks"} & set(values):
            continue
        if values.get("split_checkpoints") and (not values.get("offload_activations") or "resident_blocks" in values):
            continue
        if values.get("optimizer_in_backward") and values.get("offload_gradients"):
            continue
        slowdown = math.prod(lever.slowdown for lever in levers)
        is_exact = all(lever.is_exact for lever in levers)
        steps.append(Step(values, with_values(options, values), (not is_exact, slowdown)))
    return steps


@settings(deadline=None, max_examples=60)
@given(
    training_type=st.sampled_from(["lora", "sft"]),
    budget=st.integers(10, 1500),
    host=st.sampled_from([math.inf, 50.0, 300.0]),
    activations=st.integers(10, 1000),
)
def test_no_step_that_fits_is_faster(training_type: Any, budget: int, host: float, activations: int) -> None:
    options = Plan(method=MethodOptions(training_type=training_type))
    traces: Any = Formula(activations=activations)
    found = search(options, traces, Budget(budget, host), ["training"])
    steps = all_steps(training_type)
    fitting = [step.order for step in steps if Budget(budget, host).holds(traces.phase("training", step.options))]
    assert found.fits == bool(fitting)
    if fitting:
        assert Budget(budget, host).holds(traces.phase("training", found.options))
        values = dict(found.values)
        if "resident_blocks" in values:  # as many as leave a little
            more = {**values, "resident_blocks": values["resident_blocks"] + 1}
            too_many = not Budget(budget * 0.97, host).holds(traces.phase("training", with_values(options, more)))
            assert too_many or values["resident_blocks"] == traces.num_blocks - 1
            values["resident_blocks"] = 2
        assert [step.order for step in steps if step.values == values] == [min(fitting)]


def test_only_what_is_needed_is_chosen() -> None:
    options, roomy = Plan(), Budget(10_000)
    traces: Any = Formula()
    assert search(options, traces, roomy).values == {}
    assert search(options, traces, Budget(320)).values == {"feed_forward_chunks": 8, "enable_model_cpu_offload": True}


def test_what_is_given_stays() -> None:
    options = with_values(Plan(), {"feed_forward_chunks": 3, "gradient_checkpointing": True})
    traces: Any = Formula()
    found = search(options, traces, Budget(250))
    assert found.fits and found.options.memory.feed_forward_chunks == 3
    assert not {"feed_forward_chunks", "gradient_checkpointing"} & set(found.values)


def test_exact_settings_come_before_faster_approximations() -> None:
    """States in 8 bits would do, and quicker than those on the host."""
    options = Plan(method=MethodOptions(training_type="sft"))
    traces: Any = Formula(activations=40)
    found = search(options, traces, Budget(600), ["training"])
    assert "use_8bit" not in found.values and found.values["use_cpu_offload_optimizer"]
    on_small_host = search(options, traces, Budget(600, 100), ["training"])
    assert on_small_host.fits and "use_cpu_offload_optimizer" not in on_small_host.values


def test_states_in_low_bits_are_for_the_optimizers_that_have_them() -> None:
    options = Plan(method=MethodOptions(training_type="sft"), optimizer=OptimizerOptions(optimizer="came"))
    traces: Any = Formula(activations=40)
    for budget in range(100, 1300, 50):
        assert not {"use_8bit", "use_4bit"} & set(search(options, traces, Budget(budget, 100)).values)


def test_few_steps_are_traced() -> None:
    traces: Any = Formula(activations=3000)
    assert search(Plan(method=MethodOptions(training_type="sft")), traces, Budget(420)).fits
    assert traces.num_traced < 30 < len(all_steps("sft"))


def test_nothing_fits_into_too_little() -> None:
    traces: Any = Formula()
    found = search(Plan(), traces, Budget(5))
    assert not found.fits and found.options.memory.resident_blocks == 2
    assert [phase.name for phase in found.phases] == list(NAMES)


def test_what_is_given_of_a_group_is_built_upon() -> None:
    """States in 8 bits are asked for, and can be on the host as well."""
    options = with_values(Plan(method=MethodOptions(training_type="sft")), {"use_8bit": True})
    traces: Any = Formula(activations=40)
    found = search(options, traces, Budget(350), ["training"])
    assert found.fits and found.values["use_cpu_offload_optimizer"] and found.options.optimizer.use_8bit
    assert not {"use_4bit", "use_8bit"} & set(found.values)


def test_gradients_that_are_scaled_stay_on_the_gpu() -> None:
    traces: Any = Formula(activations=40)
    traces.is_fp16 = True
    assert "use_cpu_offload_optimizer" not in search(Plan(), traces, Budget(5)).values


def test_what_a_machine_has_not_is_not_chosen() -> None:
    traces: Any = Formula(activations=40)
    options = Plan(method=MethodOptions(training_type="sft"))
    for budget in range(100, 1300, 100):
        found = search(options, traces, Budget(budget, 100), may_choose=lambda values: "use_8bit" not in values)
        assert "use_8bit" not in found.values


def test_what_the_strongest_settings_cannot_is_known_at_once() -> None:
    """Of a video that never fits, whatever the steps are."""
    traces: Any = Formula(video=100_000)
    assert not search(Plan(), traces, Budget(420)).fits
    assert traces.num_traced <= 4

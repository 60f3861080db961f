"""Finds the fastest settings with which all phases of a run fit into a budget.

Combinations of levers are tried for one phase after the other, exact ones before approximations, and in each of these
groups from the fastest to the slowest as far as that is known; the first that fits is taken. Where some have failed,
the strongest of a group is looked at before the next: what that cannot do, none can. Steps are not traced whose bytes
can be told from others well enough to know that they are too many. Only options that have their defaults are changed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cogvideox_factory.config import Plan, UserError, option_values, with_values
from cogvideox_factory.memory.strategies import STRATEGIES, Lever, chosen
from cogvideox_factory.planning.phases import Phase
from cogvideox_factory.planning.traces import NAMES, OF_HELD, Traces
from cogvideox_factory.training.engine import check_options_of_engine

Values = Mapping[str, Any]
Groups = Sequence[Sequence[Lever]]  # of each, one lever or none is chosen

# Beside the strategies. A step waits for an optimizer whose states are on the host.
_HOST = {"use_cpu_offload_optimizer": True}
_HOST_WITH_GRADIENTS = {**_HOST, "offload_gradients": True}
STATES = (
    Lever({"use_8bit": True}, 1.02, is_exact=False),
    Lever({"use_4bit": True, "use_torchao": True}, 1.05, is_exact=False),
    Lever({"use_8bit": True, **_HOST}, 1.2, is_exact=False),
    Lever(_HOST, 1.2),
    Lever({"use_8bit": True, **_HOST_WITH_GRADIENTS}, 1.25, is_exact=False),
    Lever(_HOST_WITH_GRADIENTS, 1.25),
)
STATES_OF_LORA = (Lever(_HOST, 1.05),)
WEIGHTS_IN_BF16 = (Lever({"trainable_dtype": "bf16"}, 1.02, is_exact=False),)
OFFLOADED_TEXT_ENCODER = (Lever({"offload_text_encoder": True}, 1.1),)
ENCODING: Groups = (OFFLOADED_TEXT_ENCODER, (Lever({"use_tiling": True}, 1.1, is_exact=False),))
VIDEOS: Groups = (
    (Lever({"enable_model_cpu_offload": True}, 1.05),),
    OFFLOADED_TEXT_ENCODER,
    (Lever({"enable_tiling": True}, 1.1, is_exact=False),),
)


# Options that a search may set.
OPTIONS = {
    name
    for levers in (*(strategy.levers for strategy in STRATEGIES), STATES, WEIGHTS_IN_BF16, *ENCODING, *VIDEOS)
    for lever in levers
    for name in lever.values
}
PATIENCE = 4  # combinations that fail before the strongest, whose trace takes as long as those of several, is looked at
MARGIN = 0.03  # by which a step may take less than is expected of it from others; and what an allocator may lose more


@dataclass(frozen=True)
class Budget:
    """Bytes that tensors may take on the GPU and on the host; infinite where nothing limits them."""

    gpu: float = math.inf
    host: float = math.inf

    def holds(self, phase: Phase) -> bool:
        return phase.peak <= self.gpu and phase.host <= self.host


@dataclass(frozen=True)
class Look:
    """A phase that was looked at with some values of options."""

    values: Values
    phase: Phase
    fits: bool


@dataclass(frozen=True)
class Found:
    """The settings that fit; or else, where none do, the most sparing ones."""

    options: Plan
    values: Values  # that differ from what was asked for
    phases: Sequence[Phase]
    fits: bool
    looks: Sequence[Look]


@dataclass(frozen=True)
class _Combination:
    """Levers of different groups."""

    values: Values
    slowdown: float
    is_exact: bool
    strength: int


def search(
    options: Plan,
    traces: Traces,
    budget: Budget,
    names: Sequence[str] = NAMES,
    *,
    may_choose: Callable[[Values], bool] = lambda values: True,
) -> Found:
    """The fastest settings with which the phases of these names fit. `options` are resolved.

    `may_choose` says of values of options whether this machine, or this run, can have them.
    """
    return _Search(options, traces, budget, names, may_choose).run()


class _Search:
    def __init__(
        self,
        options: Plan,
        traces: Traces,
        budget: Budget,
        names: Sequence[str],
        may_choose: Callable[[Values], bool],
    ):
        self.may_choose = may_choose
        self.options = options
        self.traces = traces
        self.budget = budget
        self.names = names
        self.looks: list[Look] = []
        self._least_above_held: dict[Any, int] = {}  # bytes of a step's peak, by how it computes

    def run(self) -> Found:
        encodings = self._combinations(ENCODING)
        groups = _groups(self.options, has_scaler=self.traces.has_scaler(self.options))
        steps = [one for one in self._combinations(groups) if self._is_legal(one.values)]
        videos = self._combinations(VIDEOS)
        sparing: dict[str, Any] = {}
        for combinations in (encodings, steps, videos):
            sparing.update(_strongest(combinations).values)
        for encoding in self._fitting(["preparing"], encodings, {}):
            for number, step in enumerate(self._fitting(["training"], steps, encoding)):
                for video in self._fitting(["validation", "testing"], videos, step):
                    values = self._with_most_residents(video)
                    return self._found(values, fits=True)
                if number == 0 and self._is_too_much(self.names, sparing):  # no other step helps
                    break
            break  # more sparing encoders would not help the other phases
        return self._found(sparing, fits=False)

    def _fitting(self, names: Sequence[str], combinations: Sequence[_Combination], base: Values) -> Iterator[Values]:
        """Values with which the phases fit, those of `base` included, as long as the caller asks for more."""
        too_much: list[Values] = []
        for is_exact in (True, False):
            group = [one for one in combinations if one.is_exact == is_exact]
            failures = 0
            for one in sorted(group, key=lambda one: one.slowdown):
                values = {**base, **one.values}
                if any(values.items() <= failed.items() for failed in too_much):
                    continue
                if names == ["training"] and self._least(values) > self.budget.gpu * (1 + MARGIN):
                    continue
                looks = self._look(names, values)
                if all(look.fits for look in looks):
                    yield values
                    continue
                failures += 1
                if any(look.phase.peak > self.budget.gpu for look in looks):
                    too_much.append(values)
                if failures == PATIENCE and self._is_too_much(names, {**base, **_strongest(group).values}):
                    break

    def _is_too_much(self, names: Sequence[str], values: Values) -> bool:
        """For the GPU: what is spared there may be on the host."""
        return any(look.phase.peak > self.budget.gpu for look in self._look(names, values))

    def _look(self, names: Sequence[str], values: Values) -> list[Look]:
        """At the phases among these that there will be, up to the first that does not fit."""
        looks = []
        for name in names:
            if name in self.names:
                phase = self.traces.phase(name, with_values(self.options, values))
                looks.append(Look(values, phase, self.budget.holds(phase)))
                if name == "training":
                    above = phase.peak - self._held(values)
                    key = _passes(values)
                    self._least_above_held[key] = min(above, self._least_above_held.get(key, above))
                if not looks[-1].fits:
                    break
        self.looks.extend(looks)
        return looks

    def _least(self, values: Values) -> float:
        """Of a step that has not been traced: what is held, and what steps with the same passes took above that."""
        return self._held(values) + self._least_above_held.get(_passes(values), 0)

    def _held(self, values: Values) -> int:
        return self.traces.phase("held", with_values(self.options, values)).peak

    def _combinations(self, groups: Groups) -> list[_Combination]:
        """All choices of a lever or none from each group that agree with what is given."""
        given, defaults = option_values(self.options), option_values(Plan())
        open_groups = []
        for levers in groups:
            fixed = {name: given[name] for lever in levers for name in lever.values if given[name] != defaults[name]}
            open_groups.append(
                [
                    replace(lever, values={name: value for name, value in lever.values.items() if name not in fixed})
                    for lever in levers
                    if fixed.items() <= lever.values.items() and fixed != lever.values and self.may_choose(lever.values)
                ]
            )
        made = []
        for numbered in itertools.product(*([(0, None), *enumerate(levers, 1)] for levers in open_groups)):
            levers = [lever for _, lever in numbered if lever is not None]
            made.append(
                _Combination(
                    {name: value for lever in levers for name, value in lever.values.items()},
                    math.prod(lever.slowdown for lever in levers),
                    all(lever.is_exact for lever in levers),
                    sum(number for number, _ in numbered),
                )
            )
        return made

    def _is_legal(self, values: Values) -> bool:
        changed = with_values(self.options, values)
        memory = changed.memory
        if memory.optimizer_in_backward and changed.optimizer.offload_gradients:  # which drops them instead
            return False
        if changed.num_processes > 1 and not _goes_with_engine(changed):
            return False
        return not any(
            (strategy.needs_checkpointing and not memory.gradient_checkpointing)
            or (strategy.needs_offloading and not memory.offload_activations)
            or (strategy.needs_all_weights and memory.resident_blocks is not None)
            for strategy in chosen(memory)
        )

    def _with_most_residents(self, values: Values) -> Values:
        """With as many resident blocks as fit, where the search chose a few; a little is left, as an allocator loses
        more of a memory that is full."""
        if "resident_blocks" not in values:
            return values
        tight = replace(self.budget, gpu=self.budget.gpu * (1 - MARGIN))
        low, high = values["resident_blocks"], self.traces.num_blocks - 1
        while low < high:
            middle = (low + high + 1) // 2
            options = with_values(self.options, {**values, "resident_blocks": middle})
            if all(tight.holds(self.traces.phase(name, options)) for name in self.names):
                low = middle
            else:
                high = middle - 1
        return {**values, "resident_blocks": low}

    def _found(self, values: Values, *, fits: bool) -> Found:
        options = with_values(self.options, values)
        return Found(options, values, [self.traces.phase(name, options) for name in self.names], fits, self.looks)


def _groups(options: Plan, *, has_scaler: bool) -> Groups:
    """Levers of the training step that the options leave open."""
    is_lora, optimizer = options.method.training_type == "lora", options.optimizer
    groups = [
        strategy.levers
        for strategy in STRATEGIES
        if strategy.levers
        and not strategy.is_on(options.memory)
        and (is_lora or not strategy.needs_lora)
        and not (strategy.steps_in_backward and (is_lora or optimizer.optimizer == "prodigy"))
    ]
    if is_lora:
        return [*groups, *([] if has_scaler else [STATES_OF_LORA])]  # a scaler looks at gradients that would be gone
    has_low_bits = optimizer.optimizer in ("adam", "adamw")
    states = [lever for lever in STATES if has_low_bits or lever.is_exact]
    return [*groups, states, WEIGHTS_IN_BF16]


def _goes_with_engine(options: Plan) -> bool:
    if options.optimizer.offload_gradients or any(strategy.needs_one_process for strategy in chosen(options.memory)):
        return False
    try:
        check_options_of_engine(options, options.engine)
    except UserError:
        return False
    return True


def _passes(values: Values) -> Any:
    """Those of the values that say how a step computes, and not what is held between two."""
    of_held = OF_HELD - {"use_cpu_offload_optimizer"} | {"resident_blocks"}  # temporaries of the update are there too
    return tuple(sorted((name, value) for name, value in values.items() if name not in of_held))


def _strongest(combinations: Sequence[_Combination]) -> _Combination:
    return max(combinations, key=lambda one: (one.strength, one.slowdown))

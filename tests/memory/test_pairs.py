"""Every two strategies that may go together, together: the bits of the same step without those that only move."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from training_steps import OPTIMIZER, Course, train

from cogvideox_factory.config import MemoryOptions, MethodOptions, Train, UserError
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.memory.strategies import STRATEGIES, check_memory
from cogvideox_factory.model.family import Checkpoint

VALUES: dict[str, Any] = {"feed_forward_chunks": 3, "resident_blocks": 2, "quantize_base": "int8"}
NAMES = [strategy.flag.removeprefix("--") for strategy in STRATEGIES if strategy.flag]
CHANGING = ("feed_forward_chunks", "quantize_base")  # what is summed, or what is summed of


def memory_of(names: set[str]) -> MemoryOptions:
    return dataclasses.replace(MemoryOptions(), **{name: VALUES.get(name, True) for name in names})


def legal_pairs() -> Iterator[tuple[str, set[str]]]:
    """With the strategies that these two need: checkpointed blocks, and what they keep on the host."""
    for training_type, (first, second) in itertools.product(("lora", "sft"), itertools.combinations(NAMES, 2)):
        for more in (set(), {"gradient_checkpointing"}, {"gradient_checkpointing", "offload_activations"}):
            names = {first, second} | more
            options = Train(memory=memory_of(names), method=MethodOptions(training_type=training_type))  # type: ignore[arg-type]
            try:
                check_memory(options, 1, has_scaler=False)
            except UserError:
                continue
            yield training_type, names
            break


PAIRS = list(legal_pairs())


@pytest.fixture(scope="session")
def without(checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]) -> Callable[..., Course]:
    """The course with those alone that change results."""
    made: dict[Any, Course] = {}

    def get(training_type: str, names: frozenset[str]) -> Course:
        if (training_type, names) not in made:
            made[training_type, names] = steps(checkpoint, prepared, entries, training_type, set(names))
        return made[training_type, names]

    return get


def steps(
    checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry], training_type: str, names: set[str]
) -> Course:
    settings: dict[str, Any] = {"training_type": training_type, "num_steps": 2, "optimizer_options": OPTIMIZER}
    return train(checkpoint, prepared, entries, memory_of(names), torch.float32, **settings)


@pytest.mark.parametrize(
    ("training_type", "names"), PAIRS, ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value))
)
def test_two_together_change_what_each_changes(
    training_type: str, names: set[str], without, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    changing = frozenset(names & set(CHANGING))
    assert steps(checkpoint, prepared, entries, training_type, names) == without(training_type, changing)


def test_the_pairs_that_cannot_be_are_few() -> None:
    """Split checkpoints with swapped weights; and what needs frozen weights, where none are."""
    together = {
        (training_type, pair) for training_type, names in PAIRS for pair in itertools.combinations(sorted(names), 2)
    }
    refused = {
        (training_type, pair)
        for training_type, pair in itertools.product(("lora", "sft"), itertools.combinations(sorted(NAMES), 2))
        if (training_type, pair) not in together
    }
    assert ("lora", ("resident_blocks", "split_checkpoints")) in refused
    assert {pair for training_type, pair in refused if training_type == "lora"} == {
        ("resident_blocks", "split_checkpoints")
    }
    assert all(
        {"resident_blocks", "quantize_base"} & set(pair) for training_type, pair in refused if training_type == "sft"
    )

"""Every memory strategy against the plain step: what it computes, and what it no longer keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory.steps import Course, train

from cogvideox_factory.config import MemoryOptions
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.family import Checkpoint

CHECKPOINTED = MemoryOptions(gradient_checkpointing=True)
MOVING: dict[str, MemoryOptions] = {
    "checkpointed": CHECKPOINTED,
    "offloaded": dataclasses.replace(CHECKPOINTED, offload_activations=True),
    **{f"swapped-{count}": dataclasses.replace(CHECKPOINTED, resident_blocks=count) for count in (1, 2, 3, 4)},
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
    ("name", "dtype"), [*((name, "fp32") for name in MOVING), ("checkpointed", "bf16"), ("offloaded-swapped", "bf16")]
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
    settings = {"training_type": "sft", "num_steps": 2}
    assert train(checkpoint, prepared, entries, MOVING["offloaded"], **settings) == plain(**settings)

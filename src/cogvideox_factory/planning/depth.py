"""Extends figures traced on two shallow copies of a transformer to its real depth.

The blocks of a transformer are all alike, so that at any given place of a step (as the last block is recomputed, as
the second is left) memory grows by the same number of bytes with every block that the model has. Each stage between
two such places is extended by itself and the highest is taken: which stage that is may change with the depth, a
straight line through two peaks would not know it. Rejected: tracing all blocks, which takes ten times as long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from cogvideox_factory.config import Train
from cogvideox_factory.memory.tracker import MemoryTracker, Moment
from cogvideox_factory.model.family import Checkpoint

# From here on each of the first two and of the last two blocks is one that a deeper model has too: what is copied ahead
# or on its way to the host spans two blocks at the most.
DEPTHS = 4, 5

Stages = Mapping[Any, Moment]


def at_full_depth(checkpoint: Checkpoint, options: Train, trace: Callable[[Checkpoint], Stages]) -> Stages:
    """What `trace` gives for this checkpoint, from what it gives for shallow ones where these tell."""
    depth = checkpoint.transformer["num_layers"]
    if depth <= max(DEPTHS) or not blocks_are_alike(options):
        return trace(checkpoint)
    few, more = (trace(with_depth(checkpoint, count)) for count in DEPTHS)
    return along_line(few, more, DEPTHS, depth)


def with_depth(checkpoint: Checkpoint, num_layers: int) -> Checkpoint:
    """The checkpoint with so many blocks."""
    changed = replace(checkpoint, transformer={**checkpoint.transformer, "num_layers": num_layers})
    vars(changed)["weights_dtype"] = checkpoint.weights_dtype  # kept once read: no file can be read in the fake world
    return changed


def along_line(few: Stages, more: Stages, counts: tuple[int, int], wanted: int) -> Stages:
    """The stages that both have, on the straight lines through the two counts; `counts` follow each other."""
    low, high = counts
    assert high == low + 1
    steps = wanted - high

    def along(first: int, second: int) -> int:
        return second + steps * (second - first)

    return {
        key: Moment(
            {part: along(few[key].parts[part], value) for part, value in stage.parts.items()},
            along(few[key].host, stage.host),
        )
        for key, stage in more.items()
        if key in few
    }


def blocks_are_alike(options: Train) -> bool:
    """Whether no name among the options singles out blocks by their numbers."""
    names = (*options.lora.target_modules, *options.method.trainable_modules)
    return not any(re.search(r"(^|\*\.|blocks\.)[\d\[?]", name) for name in names)


def mark_stages(transformer, tracker: MemoryTracker) -> None:
    """Let a stage begin where a block is entered, in the forward pass and in its recompute, where its backward pass
    begins, and where the blocks are left."""
    blocks = transformer.transformer_blocks
    for index, block in enumerate(blocks):
        place = ("from the start", index) if 2 * index <= len(blocks) - 1 else ("from the end", len(blocks) - 1 - index)
        # Before what other hooks do for the block, such as bringing its weights.
        block.register_forward_pre_hook(lambda module, args, place=place: tracker.start_stage(place), prepend=True)
        block.register_forward_hook(lambda module, args, output, place=place: _mark_backward(output, place, tracker))
    transformer.norm_final.register_forward_pre_hook(lambda module, args: tracker.start_stage("after the blocks"))


def _mark_backward(output: Any, place: Any, tracker: MemoryTracker) -> None:
    hidden_states = output[0] if isinstance(output, tuple) else output
    if isinstance(hidden_states, torch.Tensor) and hidden_states.requires_grad:
        hidden_states.register_hook(lambda gradient: tracker.start_stage(("backward", *place)))

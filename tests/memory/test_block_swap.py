"""Which blocks' weights are in the working memory, and when they travel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogvideox_factory.config import LoraOptions
from cogvideox_factory.memory.block_swap import BlockSwap, swap_blocks
from cogvideox_factory.model.adapters import attach_lora
from cogvideox_factory.model.denoiser import load_transformer
from cogvideox_factory.model.family import Checkpoint

CPU = torch.device("cpu")
NUM_BLOCKS = 4


class Watched:
    """A small transformer with a LoRA whose blocks are swapped, and what is there whenever a block is called."""

    def __init__(self, checkpoint: Checkpoint, num_resident: int):
        self.transformer: Any = load_transformer(checkpoint, torch.float32).train()
        attach_lora(self.transformer, LoraOptions(rank=2), seed=0)
        self.transformer.enable_gradient_checkpointing()
        blocks = self.transformer.transformer_blocks
        self.calls: list[int] = []
        self.was_there: list[bool] = []
        self.in_slots: list[set[int]] = []
        self.swap: BlockSwap
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda module, arguments, index=index: self._before(index))
        self.swap = swap_blocks(self.transformer, num_resident, CPU)
        for block in blocks:
            block.register_forward_pre_hook(lambda module, arguments: self._after())

    def _before(self, index: int) -> None:
        self.calls.append(index)
        self.was_there.append(index in self.swap.resident())

    def _after(self) -> None:
        """Found from the weights themselves: those that lie in the slots."""
        slots = {slot.untyped_storage().data_ptr() for slot in self.swap._slots}
        assert len(slots) == self.swap.num_resident
        shown: set[int] = set()
        for index, block in enumerate(self.transformer.transformer_blocks):
            frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
            memories = {parameter.untyped_storage().data_ptr() for parameter in frozen}
            assert len(frozen) > 10 and len(memories) == 1
            if memories <= slots:
                shown.add(index)
        assert self.calls[-1] in shown and shown <= set(self.swap.resident())
        self.in_slots.append(shown)

    def forward(self) -> torch.Tensor:
        (output,) = self.transformer(
            hidden_states=torch.ones(1, 3, 8, 8, 12),
            encoder_hidden_states=torch.ones(1, 10, 32),
            timestep=torch.tensor([3]),
            image_rotary_emb=(torch.ones(3 * 4 * 6, 32), torch.zeros(3 * 4 * 6, 32)),
            return_dict=False,
        )
        return output.square().mean()


@pytest.mark.parametrize("num_resident", [1, 2, 3])
def test_so_many_blocks_are_there_at_a_time_and_no_more(checkpoint: Checkpoint, num_resident: int) -> None:
    watched = Watched(checkpoint, num_resident)
    for _ in range(2):
        watched.forward().backward()
    assert watched.calls == [0, 1, 2, 3, 3, 2, 1, 0] * 2
    assert max(len(shown) for shown in watched.in_slots) == num_resident == len(watched.swap.resident())
    # Blocks that are there already when the direction turns are not copied again.
    assert watched.swap.num_copies == num_resident + 4 * (NUM_BLOCKS - num_resident)
    if num_resident > 1:  # all but the first came while another block was computed
        assert watched.was_there == [False] + [True] * 15


def test_blocks_come_ahead_without_gradients_too(checkpoint: Checkpoint) -> None:
    watched = Watched(checkpoint, 2)
    with torch.no_grad():
        for _ in range(3):
            watched.forward()
    assert watched.calls == [0, 1, 2, 3] * 3
    assert watched.was_there == [False] + [True] * 11
    watched.forward().backward()
    assert watched.was_there == [False] + [True] * 19


def test_what_is_trained_and_what_is_outside_the_blocks_stays_on_the_device(checkpoint: Checkpoint) -> None:
    watched = Watched(checkpoint, 2)
    moved = watched.swap.parameters()
    for name, parameter in watched.transformer.named_parameters():
        in_block = name.startswith("transformer_blocks.") and not parameter.requires_grad
        assert (parameter in moved) == in_block, name

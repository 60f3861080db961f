"""What is left on the device of the inputs of checkpointed blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from cogvideox_factory.memory.activations import OffloadedCheckpoints
from cogvideox_factory.model.denoiser import load_transformer
from cogvideox_factory.model.family import Checkpoint

CPU = torch.device("cpu")


class Inputs:
    """The memory of the first two inputs of each block, as the blocks were called."""

    def __init__(self, transformer):
        self._seen: list[StorageWeakRef] = []
        for block in transformer.transformer_blocks:
            block.register_forward_pre_hook(self._see)

    def _see(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._seen += [StorageWeakRef(tensor.untyped_storage()) for tensor in arguments[:2]]

    def num_alive(self) -> int:
        return sum(not storage.expired() for storage in self._seen)


@pytest.fixture
def forward(checkpoint: Checkpoint) -> Callable[..., tuple[torch.Tensor, Any]]:
    """A forward pass of four blocks that train, and the watched inputs of the blocks."""

    def call(checkpoints: OffloadedCheckpoints | None) -> tuple[torch.Tensor, Inputs]:
        transformer = load_transformer(checkpoint, torch.float32).train()
        transformer.transformer_blocks.requires_grad_(True)
        transformer.enable_gradient_checkpointing(checkpoints)
        inputs = Inputs(transformer)
        torch.manual_seed(0)
        rotary = (torch.ones(3 * 4 * 6, 32), torch.zeros(3 * 4 * 6, 32))
        (output,) = transformer(
            hidden_states=torch.randn(2, 3, 8, 8, 12),
            encoder_hidden_states=torch.randn(2, 10, 32),
            timestep=torch.tensor([3, 500]),
            image_rotary_emb=rotary,
            return_dict=False,
        )
        return output.square().mean(), inputs

    return call


def test_the_inputs_of_blocks_leave_the_device_and_come_back(forward) -> None:
    plain_loss, plain_inputs = forward(None)
    checkpoints = OffloadedCheckpoints(CPU)
    loss, inputs = forward(checkpoints)
    assert torch.equal(loss, plain_loss)
    assert plain_inputs.num_alive() == 8 and inputs.num_alive() <= OffloadedCheckpoints.MOST_UNDER_WAY
    assert (checkpoints.num_parked, checkpoints.num_fetched) == (8, 0)
    loss.backward()
    assert (checkpoints.num_parked, checkpoints.num_fetched) == (8, 8)
    assert inputs.num_alive() == 0


def test_the_inputs_of_the_next_block_are_on_their_way_before_they_are_wanted(forward, monkeypatch) -> None:
    checkpoints = OffloadedCheckpoints(CPU)
    was_there = []
    fetch = OffloadedCheckpoints._fetch

    def watched(self, packed):
        if not isinstance(packed, torch.Tensor):
            was_there.append(packed[1].on_device is not None)
        return fetch(self, packed)

    monkeypatch.setattr(OffloadedCheckpoints, "_fetch", watched)
    loss, _ = forward(checkpoints)
    loss.backward()
    assert was_there == [False] + [True] * 7


def test_passes_whose_loss_is_never_used_leave_nothing_behind(forward) -> None:
    checkpoints = OffloadedCheckpoints(CPU)
    for _ in range(2):
        loss, inputs = forward(checkpoints)
    loss.backward()
    assert (checkpoints.num_parked, checkpoints.num_fetched) == (16, 8)
    assert inputs.num_alive() == 0

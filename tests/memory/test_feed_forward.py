"""The hidden activations of a feed-forward: how many of them live at a time."""

from __future__ import annotations

import copy

import torch
from diffusers.models.attention import FeedForward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from cogvideox_factory.memory.feed_forward import chunk_feed_forward


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ff = FeedForward(8, activation_fn="gelu-approximate", final_dropout=True)
        self.gate = torch.nn.Parameter(torch.ones(8))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.gate * self.ff(hidden_states)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.transformer_blocks = torch.nn.ModuleList([self.block])


def test_one_chunk_lives_at_a_time_and_gradients_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    model = Model()
    whole = copy.deepcopy(model).block
    chunk_feed_forward(model, 4)
    block = model.block
    assert list(block.state_dict()) == list(whole.state_dict())
    hidden: list[StorageWeakRef] = []
    alive: list[int] = []
    lengths: list[int] = []

    def watch(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> None:
        alive.append(sum(not storage.expired() for storage in hidden))
        hidden.append(StorageWeakRef(output.untyped_storage()))
        lengths.append(output.shape[1])

    block.ff.net[0].register_forward_hook(watch)
    inputs = torch.randn(2, 30, 8, requires_grad=True)
    ours = checkpoint(block, inputs, use_reentrant=False)
    ours.square().mean().backward()
    assert lengths == [8, 8, 8, 6] * 2 + [6, 8, 8, 8]  # forward, the block's recompute, each chunk's own
    assert max(alive) == 0
    gradient = inputs.grad
    inputs.grad = None
    theirs = whole(inputs)
    theirs.square().mean().backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, inputs.grad)
    for parameter, reference in zip(block.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


def test_without_gradients_too_the_sequence_is_cut() -> None:
    model = Model()
    chunk_feed_forward(model, 4)
    ff = model.block.ff
    lengths: list[int] = []
    ff.net[0].register_forward_hook(lambda module, arguments, output: lengths.append(output.shape[1]))
    with torch.no_grad():
        ff(torch.randn(1, 5, 8))  # fewer tokens than chunks would fill evenly
    assert lengths == [2, 2, 1]

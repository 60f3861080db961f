"""Block swap: frozen weights of the blocks live on the host, and a few blocks at a time on the device.

The device has a fixed number of *slots*, each of the size of one block, made once: what it needs is known, and no
memory is allotted or freed from call to call. Before a block is called, in the forward pass, in its recompute or in
sampling, its weights are in a slot and its parameters show them; meanwhile the block that comes next is copied into
another. Frozen weights do not change, so that they only ever travel to the device.

A block is done when another one is called: its backward pass needs its weights until then, and for that alone nothing
has to be known of its gradients, which the first block's input does not have. Without block checkpointing the saved
tensors of all blocks would live at once, weights included; it is a condition.

Rejected: allotting and freeing a block's memory as it comes and goes. The host queues work ahead of the device, and
memory that is still read cannot be given out again: many more blocks than wanted would be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import Module, Parameter

from cogvideox_factory.memory.copies import SideStream, empty_on_host

ALIGNMENT = 256  # bytes; that of torch's own allocations, which kernels may count on


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its block's memory."""

    parameter: Parameter
    start: int  # bytes
    shape: torch.Size
    dtype: torch.dtype

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return memory[self.start : self.start + size].view(self.dtype).view(self.shape)


@dataclass
class SwappedBlock:
    """A block's frozen weights in the host's memory, and the slot that they are in, if any."""

    places: list[Place]
    host: torch.Tensor  # bytes
    slot: int | None = None
    arrived: torch.cuda.Event | None = None

    def show(self, memory: torch.Tensor) -> None:
        """Let the parameters be those that lie in this memory."""
        for place in self.places:
            place.parameter.data = place.within(memory)


class BlockSwap:
    """Moves the frozen weights of blocks that are called one after the other."""

    def __init__(self, blocks: Sequence[Module], num_resident: int, device: torch.device):
        """At most `num_resident` blocks are on `device` at a time; with one alone, its copy is waited for."""
        self.num_resident = min(num_resident, len(blocks))
        self.num_copies = 0  # of blocks to the device, since the start
        self._stream = SideStream(device)
        self._blocks = [_move_to_host(block, device) for block in blocks]
        self._device = device
        self._slots: list[torch.Tensor] = []
        self.enter_device()
        self._last = -1
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda module, arguments, index=index: self._enter(index))

    def parameters(self) -> set[Parameter]:
        """The parameters that are moved."""
        return {place.parameter for block in self._blocks for place in block.places}

    def resident(self) -> list[int]:
        """Indices of the blocks that have a slot."""
        return [index for index, block in enumerate(self._blocks) if block.slot is not None]

    def enter_device(self) -> None:
        """Make the slots, where there are none; blocks come into them when they are called."""
        if self._slots:
            return
        size = max(len(block.host) for block in self._blocks)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(self.num_resident)]
        for slot in self._slots:
            self._stream.uses(slot)

    def leave_device(self) -> None:
        """Drop the slots, until `enter_device`."""
        for index in self.resident():
            block = self._blocks[index]
            block.show(block.host)
            block.slot = None
        self._slots = []

    def _enter(self, index: int) -> None:
        """Before a block is called: its weights are there, and those of the next one are on their way."""
        waits = self._waits(index)
        self._last = index
        block = self._blocks[index]
        self._load(index, waits)
        assert block.slot is not None
        self._stream.hold_compute_until(block.arrived)
        block.show(self._slots[block.slot])
        if self.num_resident > 1:
            self._load(waits.index(1) if 1 in waits else index, waits)

    def _waits(self, index: int) -> list[int]:
        """For each block, after how many calls it comes again, now that the block `index` is called.

        Forward and backward pass take turns, the latter calling blocks from the last to the first to recompute them;
        without gradients only forward passes follow.
        """
        last = len(self._blocks) - 1
        others = range(len(self._blocks))
        if not torch.is_grad_enabled():
            return [(other - index) % len(self._blocks) for other in others]
        if 0 < index < self._last or index == self._last == last:  # backward, and then forward from the first block
            return [index - other if other <= index else index + other + 1 for other in others]
        return [other - index if other >= index else 2 * last + 1 - index - other for other in others]

    def _load(self, index: int, waits: list[int]) -> None:
        """Start a block's way to the device, into the slot of the block that is needed last."""
        block = self._blocks[index]
        if block.slot is not None:
            return
        taken = {self._blocks[other].slot: other for other in self.resident()}
        free = [slot for slot in range(self.num_resident) if slot not in taken]
        if free:
            block.slot = free[0]
        else:
            leaving = self._blocks[max(taken.values(), key=lambda other: waits[other])]
            leaving.show(leaving.host)
            block.slot, leaving.slot = leaving.slot, None
        assert block.slot is not None
        with self._stream.after_compute():  # all that reads what was in the slot is queued by now
            self._slots[block.slot][: len(block.host)].copy_(block.host, non_blocking=True)
        block.arrived = self._stream.mark()
        self.num_copies += 1


def swap_blocks(model, num_resident: int, device: torch.device, *, blocks: Sequence[Module] | None = None) -> BlockSwap:
    """Put a model on a device, but of the frozen weights of its blocks only `num_resident` blocks at a time.

    `blocks` are called in this order; the default is a transformer's.
    """
    swap = BlockSwap(model.transformer_blocks if blocks is None else blocks, num_resident, device)
    moved = swap.parameters()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor not in moved:
            tensor.data = tensor.data.to(device)
    model.block_swap = swap
    return swap


def swap_of(model: Module) -> BlockSwap | None:
    """How the blocks of a model are swapped; None where they are not."""
    return getattr(model, "block_swap", None)


def _move_to_host(block: Module, device: torch.device) -> SwappedBlock:
    places, size = [], 0
    for parameter in block.parameters():
        if not parameter.requires_grad:
            places.append(Place(parameter, size, parameter.shape, parameter.dtype))
            size += -(-parameter.numel() * parameter.dtype.itemsize // ALIGNMENT) * ALIGNMENT
    swapped = SwappedBlock(places, empty_on_host((size,), torch.uint8, device))
    for place in places:
        place.within(swapped.host).copy_(place.parameter.data)
    swapped.show(swapped.host)
    return swapped

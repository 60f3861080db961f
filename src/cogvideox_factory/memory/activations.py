"""Block checkpointing whose kept activations, the inputs of the blocks, wait in the host's memory.

The hooks of `saved_tensors_hooks` around a non-reentrant checkpoint see just the inputs that it keeps; what is saved
within is the checkpoint's own affair. Rejected: hooks around the whole forward pass, which would move every saved
tensor of the parts that are not checkpointed too.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cogvideox_factory.memory.copies import SideStream, empty_on_host, wait_for


@dataclass(eq=False)
class Parked:
    """A tensor in the host's memory, and on the device for as long as it is wanted there."""

    host: torch.Tensor
    on_device: torch.Tensor | None = None


@dataclass(eq=False)
class BlockInputs:
    """What one checkpointed call of a block keeps, and the call before it, whose turn comes next in the backward."""

    previous: weakref.ref[BlockInputs] | None
    parked: list[Parked] = field(default_factory=list)
    arrived: torch.cuda.Event | None = None


class OffloadedCheckpoints:
    """To be given to `enable_gradient_checkpointing`: calls a block under a checkpoint and parks what that keeps."""

    # Inputs that may be on their way to the host at a time. The host queues work faster than the device does it, and
    # without a limit it would allot the inputs of many blocks before the first of them has left.
    MOST_UNDER_WAY = 2

    def __init__(self, device: torch.device):
        self.device = device
        self.num_parked = 0  # tensors that were moved to the host since the start
        self.num_fetched = 0  # and back
        self._stream = SideStream(device)
        self._last: weakref.ref[BlockInputs] | None = None
        self._under_way: deque[tuple[torch.cuda.Event | None, torch.Tensor]] = deque()

    def __call__(self, block: torch.nn.Module, *arguments: object, **options: Any) -> object:
        inputs = BlockInputs(self._last)
        self._last = weakref.ref(inputs)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._park(inputs, tensor), self._fetch)
        with hooks:
            return checkpoint(block.__call__, *arguments, use_reentrant=False, **options)

    @torch.no_grad()
    def _park(self, inputs: BlockInputs, tensor: torch.Tensor) -> torch.Tensor | tuple[BlockInputs, Parked]:
        if tensor.dim() < 3:  # the time embedding, (B, D): small, and one for all blocks
            return tensor
        while len(self._under_way) >= self.MOST_UNDER_WAY:
            wait_for(self._under_way.popleft()[0])
        parked = Parked(empty_on_host(tensor.shape, tensor.dtype, self.device))
        with self._stream.after_compute():
            parked.host.copy_(tensor, non_blocking=True)
        self._under_way.append((self._stream.mark(), tensor))  # the tensor lives until it has been read
        inputs.parked.append(parked)
        self.num_parked += 1
        return inputs, parked

    @torch.no_grad()
    def _fetch(self, packed: torch.Tensor | tuple[BlockInputs, Parked]) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        inputs, parked = packed
        self._bring(inputs)
        self._stream.hold_compute_until(inputs.arrived)
        self._under_way.clear()  # the copies back are queued behind those of the forward pass, and are now waited for
        tensor, parked.on_device = parked.on_device, None
        assert tensor is not None
        self.num_fetched += 1
        previous = inputs.previous() if inputs.previous else None
        if previous is not None and all(other.on_device is None for other in inputs.parked):
            self._bring(previous)  # while this block is computed
        return tensor

    def _bring(self, inputs: BlockInputs) -> None:
        """Start the way back of a call's inputs that are not on the device."""
        missing = [parked for parked in inputs.parked if parked.on_device is None]
        if len(missing) < len(inputs.parked):
            return  # they were brought together, and some are handed out already
        for parked in missing:
            # Allotted where the computation is queued: its memory then comes back in the same order.
            parked.on_device = torch.empty_like(parked.host, device=self.device)
        with self._stream.after_compute():
            for parked in missing:
                assert parked.on_device is not None
                parked.on_device.copy_(parked.host, non_blocking=True)
        inputs.arrived = self._stream.mark()

"""Traces a module once for inputs of one kind, and answers the next calls with outputs of the same sizes.

A VAE that works tile by tile calls its decoder hundreds of times, with a handful of different sizes, and the blocks of
a transformer are called one after the other with the same. What a call takes at its highest moment depends on these
sizes alone, so that a remembered call counts as a traced one does.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from cogvideox_factory.memory.tracker import MemoryTracker


@dataclass(frozen=True)
class _Output:
    """A tensor that a call returned, in a storage of its own or shared with an input or with another output."""

    storage: int  # its number among those of the inputs and then of the outputs
    num_bytes: int  # of the storage
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Call:
    outputs: list[Any]  # _Output, or a value that is no tensor
    spec: TreeSpec
    highest: int  # bytes more than at the start, at the call's highest moment


Calls = dict[Any, _Call]


def remember_calls(module: torch.nn.Module, tracker: MemoryTracker, calls: Calls | None = None) -> None:
    """Trace only the first of the module's calls of each kind; without gradients, and where no call changes it.

    `calls` are those known already, of another module that is made alike; new ones are added.
    """
    calls = {} if calls is None else calls
    trace = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs, spec = tree_flatten((args, kwargs))
        key = (str(spec), tuple(_kind(value) for value in inputs))
        if key not in calls:
            result, calls[key] = _record(lambda: trace(*args, **kwargs), inputs, tracker)
            return result
        return _replay(calls[key], inputs, tracker)

    module.forward = forward


def remember_blocks(blocks: Iterable[torch.nn.Module], tracker: MemoryTracker) -> None:
    """Trace one of the blocks that are alike, for all; without gradients. What hooks do around each is still traced."""
    calls: Calls = {}
    for block in blocks:
        remember_calls(block, tracker, calls)


def _kind(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else value


def _record(call: Callable[[], Any], inputs: list[Any], tracker: MemoryTracker) -> tuple[Any, _Call]:
    with tracker.watch() as watched:
        result = call()
    places = {value.untyped_storage()._cdata: number for number, value in enumerate(inputs) if _is_tensor(value)}
    outputs, spec = tree_flatten(result)
    described = []
    for value in outputs:
        if _is_tensor(value):
            storage = value.untyped_storage()
            number = places.setdefault(storage._cdata, len(inputs) + len(places))
            layout = tuple(value.shape), value.stride(), value.storage_offset()
            value = _Output(number, storage.nbytes(), *layout, value.dtype, value.device)
        described.append(value)
    return result, _Call(described, spec, watched.highest)


def _replay(call: _Call, inputs: list[Any], tracker: MemoryTracker) -> Any:
    """Outputs as those of the call.

    A cache that the caller hands from call to call has outputs in place of inputs of the same layout, which the caller
    then drops: the inputs themselves stand for them, which is as many bytes.
    """
    before = tracker.current
    bases = {number: value for number, value in enumerate(inputs) if _is_tensor(value)}
    handed_on = collections.defaultdict(list)
    for value in reversed(bases.values()):
        handed_on[_layout(value)].append(value)
    outputs = []
    for value in call.outputs:
        if isinstance(value, _Output):
            alike = handed_on.get((value.num_bytes, value.size, value.stride, value.dtype, value.device))
            value = alike.pop() if alike else _allocate(value, bases)
        outputs.append(value)
    tracker.note_peak(before + call.highest - tracker.current)
    return tree_unflatten(outputs, call.spec)


def _layout(value: torch.Tensor) -> tuple[Any, ...]:
    return value.untyped_storage().nbytes(), tuple(value.shape), value.stride(), value.dtype, value.device


def _allocate(output: _Output, bases: dict[int, torch.Tensor]) -> torch.Tensor:
    if output.storage not in bases:
        count = output.num_bytes // output.dtype.itemsize
        bases[output.storage] = torch.empty(count, dtype=output.dtype, device=output.device)
    return bases[output.storage].as_strided(output.size, output.stride, output.offset)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)

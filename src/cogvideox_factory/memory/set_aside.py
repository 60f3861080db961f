"""Tensors that wait in the host's memory while something else works on the device.

What a training holds between two steps (a LoRA, the optimizer's states, blocks in their slots) is not read while the
VAE decodes a video, which is the highest moment on a small card. Copied there and back it is the same to the bit, and
a copy is short beside the making of a video. Rejected: the hooks of accelerate, which stay on the model that trains;
and smaller tiles, which change the picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from cogvideox_factory.memory.block_swap import swap_of


@contextlib.contextmanager
def set_aside(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Keep those of the tensors that are on a device on the host meanwhile.

    In the end all is as it was, also after an error; tensors stay the same objects.
    """
    left: list[tuple[torch.Tensor, torch.device]] = []
    try:
        for tensor in dict.fromkeys(part for whole in tensors for part in _plain(whole)):
            if _is_on(tensor, device):
                left.append((tensor, tensor.device))
                tensor.data = tensor.data.to("cpu", copy=True)
        yield
    finally:
        for tensor, home in left:
            tensor.data = tensor.data.to(home, copy=True)


@contextlib.contextmanager
def set_model_aside(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """As `set_aside`, for a model, whose blocks may be swapped: they leave their slots, which are dropped."""
    swap = swap_of(model)
    swapped = swap.parameters() if swap else set()
    try:
        if swap:
            swap.leave_device()
        with set_aside((value for value in (*model.parameters(), *model.buffers()) if value not in swapped), device):
            yield
    finally:
        if swap:
            swap.enter_device()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested mappings and sequences, such as the state of an optimizer."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """A device without a number is the one that there is: what is on cuda:0 is on cuda."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the content: those inside of a subclass that is made of others, else itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor

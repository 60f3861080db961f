"""Copies between the host and the device beside the computation: a stream of their own, and page-locked memory.

Everything that this package keeps on the host comes from `empty_on_host`, so that it can be counted in one place. On a
CPU a copy is done at once, and the streams are nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory for what is copied to and from `device`; for a GPU page-locked, so that copies need not wait.

    torch hands out page-locked memory in powers of two. Asking for that many bytes takes no more, and shows in a plan,
    whose made-up GPU is a CPU with a number.
    """
    if device == torch.device("cpu"):
        return torch.empty(shape, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = torch.empty(page_locked_size(num_bytes), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    return memory[:num_bytes].view(dtype).view(shape)


def page_locked_size(num_bytes: int) -> int:
    """Bytes that torch's allocator of page-locked memory takes for so many."""
    return 1 << max(num_bytes - 1, 0).bit_length()


class SideStream:
    """Where copies are queued, so that they run while the device computes."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def after_compute(self) -> Iterator[None]:
        """What is queued within starts when all that was queued to compute before is done."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """The moment at which all copies queued so far are done."""
        return None if self._stream is None else self._stream.record_event()

    def hold_compute_until(self, moment: torch.cuda.Event | None) -> None:
        """What is queued to compute from now on starts after a moment; the host does not wait."""
        if moment is not None:
            torch.cuda.current_stream(self._device).wait_event(moment)

    def uses(self, tensor: torch.Tensor) -> None:
        """The memory of a tensor that is dropped while a copy is under way is not given out before its end."""
        if self._stream is not None:
            tensor.record_stream(self._stream)


def wait_for(moment: torch.cuda.Event | None) -> None:
    """Let the host wait for a moment."""
    if moment is not None:
        moment.synchronize()

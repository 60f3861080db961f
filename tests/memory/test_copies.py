"""What is kept on the host, by its bytes."""

from __future__ import annotations

import pytest
import torch

from cogvideox_factory.memory.copies import empty_on_host


@pytest.mark.parametrize(("count", "whole"), [(1, 4), (3, 16), (64, 256), (65, 512), (0, 1)])
def test_page_locked_memory_comes_in_powers_of_two(count: int, whole: int) -> None:
    """As torch's allocator gives it out; `cpu:0` is a plan's made-up GPU."""
    made = empty_on_host((count,), torch.float32, torch.device("cpu", 0))
    assert made.shape == (count,) and made.dtype == torch.float32
    assert made.untyped_storage().nbytes() == whole
    assert empty_on_host((count,), torch.float32, torch.device("cpu")).untyped_storage().nbytes() == 4 * count


def test_what_is_written_is_read() -> None:
    made = empty_on_host((3, 5), torch.bfloat16, torch.device("cpu", 0))
    made.copy_(torch.arange(15).view(3, 5))
    assert made.tolist() == torch.arange(15).view(3, 5).tolist()

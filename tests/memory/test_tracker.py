"""The tracker against sizes that one can count by hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from cogvideox_factory.memory.tracker import MemoryTracker

CPU = torch.device("cpu")
KIB = 256  # numbers of fp32


@pytest.fixture(params=["real", "fake"])
def tracker(request: pytest.FixtureRequest):
    """Entered, over tensors of either kind."""
    if request.param == "fake":
        with FakeTensorMode(), MemoryTracker(CPU) as tracker:
            yield tracker
    else:
        with MemoryTracker(CPU) as tracker:
            yield tracker


def test_bytes_come_and_go_with_the_tensors(tracker: MemoryTracker) -> None:
    first = torch.zeros(KIB)
    second = torch.zeros(3 * KIB)
    assert tracker.current == 4096
    del first
    assert (tracker.current, tracker.peak) == (3072, 4096)
    del second
    assert (tracker.current, tracker.peak) == (0, 4096)
    tracker.start_phase()
    assert tracker.peak == 0


def test_a_storage_counts_once_and_until_its_last_view_is_gone(tracker: MemoryTracker) -> None:
    tensor = torch.zeros(4, KIB)
    view = tensor[1].t()
    tensor.add_(1)
    del tensor
    assert (tracker.current, tracker.peak) == (4096, 4096)
    del view
    assert tracker.current == 0


def test_what_autograd_keeps_counts_until_the_backward_pass_frees_it(tracker: MemoryTracker) -> None:
    weight = torch.zeros(KIB, requires_grad=True)
    loss = (weight.exp().exp()).sum()  # keeps both results; the loss is one number
    assert tracker.current == 1024 + 2048 + 4
    loss.backward()
    assert tracker.current == 1024 + 1024 + 4  # the weight and its gradient
    weight.grad = None
    assert tracker.current == 1024 + 4


def test_parts_add_up_to_the_peak(tracker: MemoryTracker) -> None:
    with tracker.part("optimizer"):
        state = torch.zeros(KIB)
    gradient = torch.zeros(2 * KIB)
    tracker.add([gradient], "gradients")
    temporary = torch.zeros(4 * KIB)
    del temporary
    assert tracker.parts["activations"] == 0
    assert tracker.peak_parts["activations"] == 4096
    assert (tracker.peak_parts["optimizer"], tracker.peak_parts["gradients"]) == (1024, 2048)
    assert sum(tracker.peak_parts.values()) == tracker.peak == 7168
    del gradient, state
    assert tracker.current == 0


def test_what_was_there_before_counts_once_it_is_told_of() -> None:
    weight = torch.zeros(KIB)
    tracker = MemoryTracker(CPU)
    with tracker:
        weight.mul_(1)
    assert tracker.current == 1024  # seen as the result of an operation
    tracker.add([weight, weight], "weights")
    assert tracker.parts["weights"] == tracker.current == tracker.peak == 1024


def test_other_places_are_the_host() -> None:
    with FakeTensorMode(), MemoryTracker(torch.device("cpu", 0)) as tracker:
        here = torch.zeros(KIB, device=torch.device("cpu", 0))
        there = here.to("cpu")
        assert (tracker.current, tracker.host) == (1024, 1024)
        del here
        assert (tracker.current, tracker.host, tracker.host_peak) == (0, 1024, 1024)
        del there
        assert tracker.host == 0

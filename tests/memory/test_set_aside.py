"""What a training holds leaves the device for a while, and comes back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogvideox_factory.config import LoraOptions
from cogvideox_factory.memory.block_swap import swap_blocks, swap_of
from cogvideox_factory.memory.set_aside import set_aside, set_model_aside, tensors_in
from cogvideox_factory.model.adapters import attach_lora
from cogvideox_factory.model.denoiser import load_transformer
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.planning.fakes import GPU, HOST, FakeTracker, fake_world

CPU = torch.device("cpu")


def stepped(weight_size: int = 8) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(weight_size, weight_size), torch.nn.BatchNorm1d(weight_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    model(torch.arange(32.0).reshape(4, 8).sin()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [value.detach().clone() for value in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_goes_on_as_if_nothing_had_been(fails: bool) -> None:
    torch.manual_seed(0)
    plain, plain_optimizer = stepped()
    expected = step(plain, plain_optimizer)
    torch.manual_seed(0)
    model, optimizer = stepped()
    held = [*tensors_in(optimizer.state), torch.ones(3)]
    assert len(held) == 1 + 3 * 4  # step, mean and square of each parameter
    everything = [*model.parameters(), *model.buffers(), *held]
    addresses = [value.data_ptr() for value in everything]
    try:
        with set_aside([*model.parameters(), *model.buffers(), *held], CPU):
            within = [value.data_ptr() for value in everything]
            if fails:
                raise OSError("no space")
    except OSError:
        assert fails
    assert all(home != away for home, away in zip(addresses, within, strict=True))
    assert all(value.data_ptr() != away for value, away in zip(everything, within, strict=True))
    assert all(torch.equal(*pair) for pair in zip(step(model, optimizer), expected, strict=True))


def test_the_device_holds_none_of_it_and_what_was_on_the_host_stays_there() -> None:
    with fake_world(), FakeTracker() as tracker:
        model = torch.nn.Linear(256, 256).to(GPU)
        states, elsewhere = torch.zeros(1000, device=GPU), torch.zeros(500, device=HOST)
        tracker.add([*model.parameters(), states], "weights")
        on_gpu, on_host = tracker.current, tracker.host
        assert on_gpu == 4 * (256 * 257 + 1000)
        with set_model_aside(model, GPU), set_aside([states, elsewhere], GPU):
            assert tracker.current == 0 and tracker.host == on_host + on_gpu
        assert tracker.current == on_gpu and tracker.host == on_host
        assert [value.device for value in (model.weight, model.bias, states, elsewhere)] == [GPU, GPU, GPU, HOST]


def test_a_device_without_a_number_is_the_one_that_there_is() -> None:
    """As of a training on one GPU, whose tensors are on cuda:0 and whose device is cuda."""
    with fake_world(), FakeTracker() as tracker:
        tensor = torch.zeros(100, device=GPU)
        assert GPU.index == 0 and CPU.index is None
        with set_aside([tensor], CPU):
            assert tracker.current == 0
        assert tensor.device == GPU and tracker.current == 400


def test_tensors_that_are_made_of_others_are_moved_by_their_parts() -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    state = OptimState8bit.zeros((16, 256), signed=True, block_size=256)
    state.copy_(torch.linspace(-1, 1, 16 * 256).reshape(16, 256))
    before, codes = state.dequantize().clone(), state.codes.data_ptr()
    with set_aside([state], CPU):
        assert state.codes.data_ptr() != codes
    assert torch.equal(state.dequantize(), before) and before.unique().numel() > 100


def test_swapped_blocks_leave_their_slots(checkpoint: Checkpoint) -> None:
    outputs: list[torch.Tensor] = []
    for num_resident in (None, 2):
        transformer: Any = load_transformer(checkpoint, torch.float32)
        attach_lora(transformer, LoraOptions(rank=2), seed=0)
        if num_resident:
            swap_blocks(transformer, num_resident, CPU)

        def predict(transformer: Any = transformer) -> torch.Tensor:
            with torch.no_grad():
                return transformer(
                    hidden_states=torch.ones(1, 3, 8, 8, 12),
                    encoder_hidden_states=torch.ones(1, 10, 32),
                    timestep=torch.tensor([3]),
                    image_rotary_emb=(torch.ones(3 * 4 * 6, 32), torch.zeros(3 * 4 * 6, 32)),
                ).sample

        predict()
        swap = swap_of(transformer)
        assert (swap is None) == (num_resident is None)
        with set_model_aside(transformer, CPU):
            if swap:
                assert swap._slots == [] and swap.resident() == []
        if swap:
            assert len(swap._slots) == 2
        outputs.append(predict())
    assert torch.equal(*outputs)

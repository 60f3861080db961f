"""The moving average against the formula, and the weights against what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox_factory.training.ema import WeightAverage, averaged, build_average


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in (("weight", (4, 3)), ("bias", (4,)))
    }


def move(trained: dict[str, torch.nn.Parameter], step: int) -> None:
    """What an optimizer does, in place."""
    generator = torch.Generator().manual_seed(step)
    for parameter in trained.values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def shown(average: WeightAverage, trained: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    with average.swapped_in():
        return {name: parameter.detach().clone() for name, parameter in trained.items()}


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_the_formula_from_the_first_step_on(decay: float) -> None:
    trained = parameters()
    average = WeightAverage(trained, decay)
    expected = {name: value.detach().double() for name, value in trained.items()}
    for step in range(20):
        move(trained, step)
        average.update(trained)
        expected = {name: decay * expected[name] + (1 - decay) * value.double() for name, value in trained.items()}
    for name, value in shown(average, trained).items():
        assert torch.allclose(value.double(), expected[name].detach(), rtol=0, atol=1e-6)
        assert not torch.allclose(value, trained[name], atol=1e-2)


def test_steps_that_bf16_cannot_tell_apart_add_up() -> None:
    weight = torch.nn.Parameter(torch.full((1,), 1.0, dtype=torch.bfloat16))
    average = WeightAverage({"weight": weight}, 0.999)
    weight.data.fill_(2.0)
    for _ in range(1000):
        average.update(
            {"weight": weight}
        )  # each moves the average by a thousandth at the most; bf16 has steps of 1/128 here
    with average.swapped_in():
        assert weight.dtype == torch.bfloat16
        assert weight.item() == pytest.approx(2 - 0.999**1000, abs=0.01)


def test_masters_are_averaged_where_there_are_any() -> None:
    """What bf16 weights round away is in their fp32 masters, and in the average of those."""
    weight = torch.nn.Parameter(torch.full((1,), 1.0, dtype=torch.bfloat16))
    average = WeightAverage({"weight": weight}, 0.0)
    average.update({"weight": torch.full((1,), 1.001)})
    assert average.by_name()["weight"].item() == pytest.approx(1.001)


def test_the_weights_come_back_untouched_even_after_a_failure() -> None:
    trained = parameters(torch.bfloat16)
    average = WeightAverage(trained, 0.5)
    move(trained, 1)
    before = {name: (value.data_ptr(), value.detach().clone()) for name, value in trained.items()}
    with pytest.raises(RuntimeError, match="out of memory"), average.swapped_in():
        assert not torch.equal(trained["weight"], before["weight"][1])
        trained["weight"].data.zero_()  # whatever is done to them meanwhile
        raise RuntimeError("out of memory")
    for name, (place, value) in before.items():
        assert trained[name].data_ptr() == place and torch.equal(trained[name], value)
    assert shown(average, trained)["weight"].abs().sum() > 0  # nor is the average touched


def test_a_saved_average_goes_on_exactly(tmp_path: Path) -> None:
    trained = parameters()
    average = WeightAverage(trained, 0.9)
    for step in range(3):
        move(trained, step)
        average.update(trained)
    save_file(dict(average.by_name()), tmp_path / "ema.safetensors")
    again = WeightAverage(trained, 0.9)
    again.start_from(WeightAverage.read(tmp_path))
    for step in range(3, 6):
        move(trained, step)
        average.update(trained)
        again.update(trained)
    for name, value in shown(average, trained).items():
        assert torch.equal(value, shown(again, trained)[name])
    assert {value.dtype for value in load_file(tmp_path / "ema.safetensors").values()} == {torch.float32}


def test_where_none_was_saved_it_begins_with_the_weights_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = parameters()
    average = WeightAverage(trained, 0.9)
    move(trained, 1)
    average.start_from(WeightAverage.read(tmp_path))
    assert "no average" in caplog.text and str(tmp_path) in caplog.text
    assert all(torch.equal(value, trained[name]) for name, value in shown(average, trained).items())


def test_without_the_option_there_is_none() -> None:
    assert build_average(parameters(), None) is None
    with averaged(None):
        pass

"""Optimizers against torch's own, schedules against diffusers' and plain formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch
from diffusers.optimization import get_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import OptimizerOptions, Train, UserError
from cogvideox_factory.training.optimizers import OPTIMIZERS, build_optimizer, build_schedule

# Every setting differs from torch's default and from ours.
SETTINGS = OptimizerOptions(learning_rate=3e-2, beta1=0.8, beta2=0.93, weight_decay=0.05, epsilon=1e-3)
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((4, 3), (5,))]


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], count: int) -> None:
    """Steps on fixed gradients, some of them tiny, so that epsilon counts."""
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (1e-3 if step % 2 else 1)
        optimizer.step()
        optimizer.zero_grad()


def trace(schedule: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    """Learning rate of each optimizer step, as the loop takes them."""
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def rates_of(options: OptimizerOptions, num_steps: int, count: int | None = None) -> list[float]:
    optimizer = build_optimizer(make_parameters(), options, 1)
    return trace(build_schedule(optimizer, options, num_steps), optimizer, count or num_steps)


# --- the optimizer ---


@pytest.mark.parametrize(("name", "reference"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_steps_equal_torchs_own(name: Any, reference: Callable[..., torch.optim.Optimizer]) -> None:
    ours, theirs = make_parameters(), make_parameters()
    options = dataclasses.replace(SETTINGS, optimizer=name)
    optimizer = build_optimizer(ours, options, clips_per_step=4)
    expected = reference(theirs, lr=3e-2, betas=(0.8, 0.93), eps=1e-3, weight_decay=0.05)
    assert type(optimizer) is type(expected)
    take_steps(optimizer, ours, 6)
    take_steps(expected, theirs, 6)
    for our_part, expected_part, start in zip(ours, theirs, make_parameters(), strict=True):
        assert torch.equal(our_part, expected_part)
        assert not torch.allclose(our_part, start)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 1e-2), ("beta1", 0.5), ("beta2", 0.5), ("weight_decay", 0.5), ("epsilon", 1e-1)],
)
def test_every_setting_counts(name: str, value: float) -> None:
    results = []
    for options in (SETTINGS, dataclasses.replace(SETTINGS, **{name: value})):  # type: ignore[arg-type]
        parameters = make_parameters()
        take_steps(build_optimizer(parameters, options, 1), parameters, 4)
        results.append(parameters[0])
    assert not torch.allclose(results[0], results[1], rtol=1e-4)


def test_adam_and_adamw_decay_differently() -> None:
    results = []
    names: tuple[Any, ...] = ("adam", "adamw")
    for name in names:
        parameters = make_parameters()
        options = dataclasses.replace(SETTINGS, optimizer=name)
        take_steps(build_optimizer(parameters, options, 1), parameters, 4)
        results.append(parameters[0])
    assert not torch.allclose(results[0], results[1], rtol=1e-4)


def test_every_name_that_the_option_knows_has_an_optimizer() -> None:
    assert set(get_args(get_type_hints(OptimizerOptions)["optimizer"])) == {name for name, _ in OPTIMIZERS}


@pytest.mark.parametrize(("scale_lr", "expected"), [(False, 3e-2), (True, 3e-2 * 24)])
def test_scale_lr_multiplies_by_the_clips_of_a_step(scale_lr: bool, expected: float) -> None:
    options = dataclasses.replace(SETTINGS, scale_lr=scale_lr)
    optimizer = build_optimizer(make_parameters(), options, clips_per_step=24)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_decay_of_one_is_refused_with_a_message(name: str) -> None:
    """torch refuses it with a traceback, once the model is loaded."""
    paths = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", "o"]
    with pytest.raises(UserError, match=f"--{name} 1"):
        parse_command(Train, "train", [*paths, f"--{name}", "1"])
    accepted = parse_command(Train, "train", [*paths, f"--{name}", "0"])
    assert isinstance(accepted, Train)
    build_optimizer(make_parameters(), accepted.optimizer, 1)


# --- the learning rate ---


def test_every_schedule_of_the_option_is_tested_here() -> None:
    assert get_args(get_type_hints(OptimizerOptions)["lr_scheduler"]) == SCHEDULES


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_that_of_diffusers(name: Any, warmup: int) -> None:
    options = dataclasses.replace(SETTINGS, lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=3, lr_power=2.0)
    their_name = "constant_with_warmup" if (name, warmup) == ("constant", 4) else name
    optimizer = torch.optim.AdamW(make_parameters(), lr=3e-2)
    theirs = get_scheduler(
        their_name, optimizer, num_warmup_steps=warmup, num_training_steps=20, num_cycles=3, power=2.0
    )
    assert rates_of(options, 20) == trace(theirs, optimizer, 20)


def restarts(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * (3 * progress % 1)))


@pytest.mark.parametrize(
    ("name", "course"),
    [
        ("constant", lambda progress: 1.0),
        ("constant_with_warmup", lambda progress: 1.0),
        ("linear", lambda progress: 1 - progress),
        ("cosine", lambda progress: 0.5 * (1 + math.cos(math.pi * progress))),
        ("cosine_with_restarts", restarts),
        ("polynomial", lambda progress: (1 - 1e-7 / 3e-2) * (1 - progress) ** 2 + 1e-7 / 3e-2),
    ],
)
def test_schedule_warms_up_from_zero_and_then_takes_its_course(name: str, course: Callable[[float], float]) -> None:
    options = dataclasses.replace(SETTINGS, lr_scheduler=name, lr_warmup_steps=5, lr_num_cycles=3, lr_power=2.0)  # type: ignore[arg-type]
    expected = [3e-2 * step / 5 if step < 5 else 3e-2 * course((step - 5) / 25) for step in range(30)]
    assert rates_of(options, 30) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_constant_with_warm_up_steps_warms_up_and_without_them_does_not() -> None:
    warming = rates_of(dataclasses.replace(SETTINGS, lr_warmup_steps=3), 6)
    assert warming == pytest.approx([0, 1e-2, 2e-2, 3e-2, 3e-2, 3e-2])
    assert rates_of(SETTINGS, 6) == pytest.approx([3e-2] * 6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_starts_from_the_scaled_rate(name: str) -> None:
    options = dataclasses.replace(SETTINGS, lr_scheduler=name, scale_lr=True)  # type: ignore[arg-type]
    optimizer = build_optimizer(make_parameters(), options, clips_per_step=8)
    assert trace(build_schedule(optimizer, options, 10), optimizer, 1) == pytest.approx([3e-2 * 8])


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(SCHEDULES),
    warmup=st.integers(0, 12),
    num_steps=st.integers(1, 12),
    cycles=st.integers(1, 4),
    power=st.floats(0.1, 4),
    rate=st.floats(1e-6, 1),
)
def test_rate_stays_between_zero_and_the_one_asked_for(
    name: str, warmup: int, num_steps: int, cycles: int, power: float, rate: float
) -> None:
    """Whatever the options accept, also a warm-up as long as the training or longer."""
    options = OptimizerOptions(
        learning_rate=rate,
        lr_scheduler=name,  # type: ignore[arg-type]
        lr_warmup_steps=warmup,
        lr_num_cycles=cycles,
        lr_power=power,
    )
    for value in rates_of(options, num_steps, num_steps + 3):
        assert -1e-12 <= value <= rate * (1 + 1e-9)


def test_rate_that_polynomial_cannot_end_below_is_refused_with_a_message() -> None:
    """diffusers' polynomial ends at 1e-7, and has a ValueError for a rate that starts there."""
    options = OptimizerOptions(learning_rate=1e-8, lr_scheduler="polynomial")
    with pytest.raises(UserError, match="--learning_rate 1e-08"):
        build_schedule(build_optimizer(make_parameters(), options, 1), options, 10)

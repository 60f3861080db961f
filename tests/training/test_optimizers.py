"""Optimizers against torch's own, schedules against diffusers' and plain formulas."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from diffusers.optimization import get_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import OptimizerOptions, Train, UserError
from cogvideox_factory.training.fp32_steps import Fp32Steps
from cogvideox_factory.training.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    build_schedule,
    check_optimizer,
    effective_rate,
    keep_settings,
    optimizer_name,
    resolve_optimizer_options,
    set_rate,
)

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


# --- the table ---


def machine(device: str = "cpu", num_processes: int = 1, scaler: Any = None) -> Any:
    """What is asked of accelerate's object."""
    return SimpleNamespace(device=torch.device(device), num_processes=num_processes, scaler=scaler)


LOW_BIT: list[tuple[dict[str, Any], str]] = [
    ({}, "torch.optim"),
    ({"use_8bit": True}, "bitsandbytes.optim"),
    ({"use_8bit": True, "use_torchao": True}, "torchao.optim"),
    ({"use_4bit": True, "use_torchao": True}, "torchao.optim"),
    ({"use_fp8": True, "use_torchao": True}, "torchao.optim"),
]
SUFFIXES = ("", "8bit", "8bit", "4bit", "Fp8")


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize(("case", "suffix"), zip(LOW_BIT, SUFFIXES, strict=True))
def test_flags_choose_the_class_and_its_settings(name: Any, case: tuple[dict[str, Any], str], suffix: str) -> None:
    flags, module = case
    options = dataclasses.replace(SETTINGS, optimizer=name, **flags)
    check_optimizer(options, machine())
    optimizer = build_optimizer(make_parameters(), options, 1)
    assert type(optimizer) is getattr(
        importlib.import_module(module), {"adam": "Adam", "adamw": "AdamW"}[name] + suffix
    )
    (group,) = optimizer.param_groups
    assert float(group["lr"]) == pytest.approx(3e-2) and group["betas"] == (0.8, 0.93)
    assert group["eps"] == 1e-3 and group["weight_decay"] == 0.05


def test_every_row_is_reached_by_flags_and_has_a_name_of_its_own() -> None:
    asked = [({"optimizer": name, **flags}) for name in ("adam", "adamw") for flags, _ in LOW_BIT]
    asked += [{"optimizer": "prodigy"}, {"optimizer": "came"}]
    names = {optimizer_name(OptimizerOptions(**flags)) for flags in asked}
    assert names == {", ".join(part for part in key if part) for key in OPTIMIZERS}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"betas": (0.9, 0.95), "beta3": None, "decouple": False, "use_bias_correction": False}),
        ({"beta3": 0.7, "beta1": 0.5, "beta2": 0.6}, {"beta3": 0.7, "betas": (0.5, 0.6)}),
        ({"prodigy_decouple": True}, {"decouple": True, "safeguard_warmup": False}),
        ({"prodigy_use_bias_correction": True}, {"use_bias_correction": True, "decouple": False}),
        ({"prodigy_safeguard_warmup": True, "weight_decay": 0.3}, {"safeguard_warmup": True, "weight_decay": 0.3}),
    ],
)
def test_prodigy_steps_as_its_library_does(flags: dict[str, Any], expected: dict[str, Any], capsys) -> None:
    from prodigyopt import Prodigy

    ours, theirs = make_parameters(), make_parameters()
    options = OptimizerOptions(optimizer="prodigy", learning_rate=1, **flags)
    optimizer = build_optimizer(ours, options, 1)
    assert capsys.readouterr().out == ""  # standard output is for results
    reference = Prodigy(theirs, **{"lr": 1, "weight_decay": 1e-4, "eps": 1e-8, "betas": (0.9, 0.95), "decouple": False})
    for group, expected_group in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert {name: group[name] for name in expected} == expected
        expected_group.update(expected)
    take_steps(optimizer, ours, 5)
    take_steps(reference, theirs, 5)
    for our_part, their_part, start in zip(ours, theirs, make_parameters(), strict=True):
        assert torch.equal(our_part, their_part) and not torch.equal(our_part, start)


@pytest.mark.parametrize(
    ("flags", "betas"),
    [({}, (0.9, 0.999, 0.9999)), ({"beta1": 0.5, "beta2": 0.6, "beta3": 0.7}, (0.5, 0.6, 0.7))],
)
def test_came_steps_as_its_library_does(flags: dict[str, Any], betas: tuple[float, ...]) -> None:
    from came_pytorch.CAME import CAME

    ours, theirs = make_parameters(), make_parameters()
    options = OptimizerOptions(optimizer="came", learning_rate=1e-2, weight_decay=0.1, **flags)
    optimizer, reference = build_optimizer(ours, options, 1), CAME(theirs, lr=1e-2, betas=betas, weight_decay=0.1)
    take_steps(optimizer, ours, 5)
    take_steps(reference, theirs, 5)
    for our_part, their_part, start in zip(ours, theirs, make_parameters(), strict=True):
        assert torch.equal(our_part, their_part) and not torch.equal(our_part, start)


def test_decays_that_are_not_given_are_each_optimizers_own_and_are_written_down() -> None:
    resolved = {name: resolve_optimizer_options(OptimizerOptions(optimizer=name)) for name in ("adamw", "came")}
    assert {name: (each.beta2, each.beta3) for name, each in resolved.items()} == {
        "adamw": (0.95, None),
        "came": (0.999, 0.9999),
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"use_8bit": True, "use_4bit": True}, "--use_8bit --use_4bit: .*leave all but one out"),
        ({"use_8bit": True, "use_fp8": True, "use_torchao": True}, "--use_8bit --use_fp8"),
        ({"use_4bit": True}, "--use_4bit: only torchao.*add --use_torchao"),
        ({"use_fp8": True}, "--use_fp8: only torchao.*add --use_torchao"),
        ({"use_torchao": True}, "--use_torchao: .*add --use_8bit"),
        ({"optimizer": "came", "use_8bit": True}, "--optimizer came --use_8bit: only adam and adamw"),
        ({"optimizer": "prodigy", "use_4bit": True, "use_torchao": True}, "--optimizer prodigy --use_4bit"),
        ({"offload_gradients": True}, "--offload_gradients: only together with --use_cpu_offload_optimizer"),
        ({"use_cpu_offload_optimizer": True}, "--use_cpu_offload_optimizer: needs a GPU"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_optimizer(OptimizerOptions(**flags), machine())


OFFLOADING = OptimizerOptions(use_cpu_offload_optimizer=True, offload_gradients=True)


def test_the_optimizer_goes_to_the_host_only_where_gradients_are_whole() -> None:
    """A GPU that is only claimed: what the optimizer then does is tested with weights that stand on the host."""
    check_optimizer(OFFLOADING, machine("cuda"))
    check_optimizer(dataclasses.replace(OFFLOADING, offload_gradients=False), machine("cuda", num_processes=2))
    with pytest.raises(UserError, match=r"--offload_gradients: for one GPU only.* 2 processes"):
        check_optimizer(OFFLOADING, machine("cuda", num_processes=2))
    for options in (OFFLOADING, OptimizerOptions(trainable_dtype="bf16")):
        with pytest.raises(UserError, match="not together with fp16"):
            check_optimizer(options, machine("cuda", scaler=object()))


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_fp8_is_refused_on_gpus_that_do_not_know_it(capability: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    options = OptimizerOptions(use_fp8=True, use_torchao=True)
    with pytest.raises(UserError, match="--use_fp8: needs") if capability < (8, 9) else contextlib.nullcontext():
        check_optimizer(options, machine("cuda"))


@pytest.mark.parametrize("flags", [{}, {"optimizer": "prodigy"}, {"use_8bit": True}])
def test_an_optimizer_on_the_host_steps_as_one_beside_the_weights(flags: dict[str, Any]) -> None:
    """Trap: the optimizer on the host drops the schedule."""
    results = []
    for offload in (False, True):
        parameters = make_parameters()
        options = dataclasses.replace(SETTINGS, use_cpu_offload_optimizer=offload, **flags)
        optimizer = build_optimizer(parameters, options, 1)
        assert isinstance(optimizer, Fp32Steps) == offload
        schedule = build_schedule(optimizer, dataclasses.replace(options, lr_scheduler="cosine"), 6)
        for _ in range(6):
            take_steps(optimizer, parameters, 1)
            schedule.step()
        results.append(parameters)
    for ours, theirs, start in zip(*results, make_parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7) and not torch.equal(ours, start)


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ({"use_8bit": True}, "bitsandbytes"),
        ({"use_8bit": True, "use_torchao": True}, "torchao"),
        ({"optimizer": "prodigy"}, "prodigyopt"),
        ({"optimizer": "came"}, "came-pytorch"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_installation(flags, package: str, monkeypatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == package.replace("-", "_")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(UserError, match=f"pip install {package}$"):
        check_optimizer(OptimizerOptions(**flags), machine())


def test_low_bit_optimizers_of_torchao_need_no_bitsandbytes(monkeypatch) -> None:
    """Trap: torchao's 8-bit optimizers ask for bitsandbytes."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    options = OptimizerOptions(use_8bit=True, use_torchao=True)
    check_optimizer(options, machine())
    build_optimizer(make_parameters(), options, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prodigy_decouple": True, "beta3": 0.5}, "--prodigy_decouple --beta3: without effect with --optimizer adamw"),
        ({"optimizer": "came", "epsilon": 1e-6}, "--epsilon: without effect with --optimizer came"),
        ({"optimizer": "prodigy"}, "--learning_rate 0.0001: prodigy finds the rate"),
        ({"optimizer": "adam", "use_8bit": True}, "bitsandbytes decays the weights directly"),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "beta3": 0.9, "prodigy_safeguard_warmup": True}, None),
        ({"use_8bit": True}, None),
    ],
)
def test_options_without_effect_are_told(flags: dict[str, Any], message: str | None, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="cogvideox_factory"):
        check_optimizer(OptimizerOptions(**flags), machine())
    told = [record.getMessage() for record in caplog.records if record.name.startswith("cogvideox_factory")]
    assert len(told) == (message is not None) and all(message in each for each in told if message)


def test_bitsandbytes_adam_decays_as_its_adamw() -> None:
    """Why the program says so: it is not what --optimizer adam means elsewhere."""
    results = []
    names: tuple[Any, ...] = ("adam", "adamw")
    for name in names:
        parameters = make_parameters()
        options = dataclasses.replace(SETTINGS, optimizer=name, use_8bit=True)
        take_steps(build_optimizer(parameters, options, 1), parameters, 3)
        results.append(parameters[0])
    assert torch.equal(*results)


def test_effective_rate_is_what_prodigy_multiplies_its_step_by() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(4))]
    options = OptimizerOptions(optimizer="prodigy", learning_rate=0.5, weight_decay=0)
    optimizer = build_optimizer(parameters, options, 1)
    assert effective_rate(optimizer) == 0.5 * 1e-6
    for _ in range(8):
        before, rate = parameters[0].detach().clone(), effective_rate(optimizer)
        parameters[0].grad = torch.full((4,), 0.3)
        optimizer.step()
    # Its update is d·lr·m/√v, with both means scaled by d.
    state = optimizer.state[parameters[0]]
    update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + optimizer.param_groups[0]["d"] * 1e-8)
    assert torch.allclose(before - parameters[0], rate * update, rtol=1e-3) and rate > 0.5e-6
    assert effective_rate(build_optimizer(make_parameters(), SETTINGS, 1)) == 3e-2


def test_after_a_load_settings_are_the_options_and_what_was_learned_is_the_checkpoints() -> None:
    parameters = make_parameters()
    options = OptimizerOptions(optimizer="prodigy", learning_rate=1, weight_decay=0.2)
    optimizer = build_optimizer(parameters, options, 1)
    build_schedule(optimizer, options, 5)
    for _ in range(8):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    fresh = build_optimizer(parameters, dataclasses.replace(options, learning_rate=0.5, weight_decay=0.1), 1)
    settings = [dict(group) for group in fresh.param_groups]
    fresh.load_state_dict(optimizer.state_dict())
    keep_settings(fresh, settings)
    (group,), (old,) = fresh.param_groups, optimizer.param_groups
    assert group["lr"] == 0.5 and group["weight_decay"] == 0.1 and "initial_lr" not in group
    assert all(group[name] == old[name] for name in ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k"))
    assert group["k"] == 8 and group["d"] > 1e-6 and group["params"][0] is parameters[0]


def test_the_rate_of_torchao_is_set_in_its_place() -> None:
    options = dataclasses.replace(SETTINGS, use_8bit=True, use_torchao=True)
    (group,) = build_optimizer(make_parameters(), options, 1).param_groups
    rate = group["lr"]
    set_rate(group, 0.125)
    assert group["lr"] is rate and float(rate) == 0.125
    plain = {"lr": 1.0}
    set_rate(plain, 0.5)
    assert plain == {"lr": 0.5}


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

"""Steps in fp32 against a plain loop with fp32 weights, and rounding by chance against its mean."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn import Linear, Parameter

from cogvideox_factory.config import OptimizerOptions
from cogvideox_factory.training.fp32_steps import Fp32Steps, held_weights, round_stochastically, set_weights
from cogvideox_factory.training.optimizers import (
    backward_passes,
    build_optimizer,
    build_schedule,
    clip_gradients,
)

SETTINGS = OptimizerOptions(learning_rate=1e-3, beta2=0.9, weight_decay=0.1, lr_scheduler="cosine", lr_warmup_steps=2)


def make_model(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Sequential:
    """Two layers; their weights are representable in bf16."""
    torch.manual_seed(0)
    return torch.nn.Sequential(Linear(6, 8), torch.nn.Tanh(), Linear(8, 3)).to(torch.bfloat16).to(dtype)


def make_batch(number: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(number))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range, schedule: Any = None) -> None:
    dtype = next(model.parameters()).dtype
    for number in numbers:
        model(make_batch(number).to(dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def plain_loop(num_steps: int, limit: float | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """fp32 weights, a forward pass on their bf16 copy, torch's AdamW on gradients in fp32: the masters and the copy."""
    model = make_model()
    masters = [Parameter(parameter.detach().float()) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1)
    schedule = build_schedule(optimizer, SETTINGS, num_steps)
    for number in range(num_steps):
        model.zero_grad()
        model(make_batch(number).bfloat16()).float().square().mean().backward()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
    return [master.detach() for master in masters], [parameter.detach() for parameter in model.parameters()]


def on_host(parameters: list[Parameter], **arguments: Any) -> Fp32Steps:
    """What --use_cpu_offload_optimizer builds on a GPU, without torch's fused AdamW, which rounds in another order."""

    def build(held: list[Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(held, lr=1e-3, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1)

    return Fp32Steps(parameters, build, on_host=True, **arguments)


def in_backward(parameters: list[Parameter]) -> torch.optim.Optimizer:
    return build_optimizer(parameters, SETTINGS, 1, in_backward=True)


BUILDERS: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
    "masters": lambda parameters: build_optimizer(parameters, SETTINGS, 1),
    "on the host": on_host,
    "on the host, gradients too": lambda parameters: on_host(parameters, offload_gradients=True),
    "in the backward pass": in_backward,
    "all weights at once": lambda parameters: on_host(parameters, one_by_one=False),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_masters_equal_a_plain_loop_with_fp32_weights(name: str) -> None:
    model = make_model()
    optimizer = BUILDERS[name](list(model.parameters()))
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, range(12), build_schedule(optimizer, SETTINGS, 12))
    masters, copies = plain_loop(12)
    held = held_weights(optimizer, dict(model.named_parameters()))
    for ours, our_copy, theirs, their_copy in zip(held.values(), model.parameters(), masters, copies, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
        assert our_copy.dtype == torch.bfloat16 and torch.equal(our_copy, their_copy)
    assert not torch.equal(masters[0], masters[0].bfloat16().float())  # they hold what bf16 cannot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_backward_pass_one_gradient_is_there_at_a_time_and_their_norm_is_known(dtype: torch.dtype) -> None:
    model, reference, accelerator = make_model(dtype), make_model(dtype), Accelerator(cpu=True)
    parameters = list(model.parameters())
    counts: list[int] = []

    def count(parameter: Parameter) -> None:
        counts.append(sum(other.grad is not None for other in parameters))

    for parameter in parameters:  # before the optimizer's own hook
        parameter.register_post_accumulate_grad_hook(count)
    optimizer = in_backward(parameters)
    for number in range(2):
        before = [parameter.detach().clone() for parameter in parameters]
        for ours, theirs in zip(before, reference.parameters(), strict=True):
            theirs.data.copy_(ours)
            theirs.grad = None
        for trained in (model, reference):
            trained(make_batch(number).to(dtype)).float().square().mean().backward()
        assert all(parameter.grad is None for parameter in parameters)
        norm = clip_gradients(accelerator, optimizer, parameters, float("inf"))
        assert torch.equal(
            norm, torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
        )
        optimizer.step()
        optimizer.zero_grad()
    assert counts == [1] * 8


BF16, ON_HOST = {"trainable_dtype": "bf16"}, {"use_cpu_offload_optimizer": True}
LEGAL: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "adamw": (torch.float32, {}),
    "masters": (torch.bfloat16, {}),
    "rounding by chance": (torch.bfloat16, BF16),
    "states on the host": (torch.float32, ON_HOST),
    "masters on the host": (torch.bfloat16, ON_HOST),
    "8 bit, rounding by chance, on the host": (torch.bfloat16, {"use_8bit": True, **BF16, **ON_HOST}),
    "gradients on the host too": (torch.bfloat16, {"offload_gradients": True, **BF16, **ON_HOST}),
    "came": (torch.bfloat16, {"optimizer": "came"}),
}


def accumulated_steps(
    dtype: torch.dtype, options: OptimizerOptions, num_batches: int, limit: float, *, in_backward: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Five steps of a model with dropout: the weights, and what else there is to compare."""
    torch.manual_seed(0)
    layers = [Linear(6, 900), torch.nn.Dropout(0.5), torch.nn.Tanh(), Linear(900, 3)]  # enough for 8-bit states
    model = torch.nn.Sequential(*layers).to(torch.bfloat16).to(dtype)
    parameters, accelerator = list(model.parameters()), Accelerator(cpu=True)
    optimizer = build_optimizer(parameters, options, 1, in_backward=in_backward)
    schedule, num_passes, norms = build_schedule(optimizer, options, 5), 0, []
    for step in range(5):
        for batch in range(num_batches):
            for _ in backward_passes(optimizer, batch, num_batches, limit):
                num_passes += 1
                loss = model(make_batch(step * num_batches + batch).to(dtype)).float().square().mean() / num_batches
                loss.backward()
        norms.append(clip_gradients(accelerator, optimizer, parameters, limit))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert num_passes == (10 if in_backward and num_batches == 1 and limit < float("inf") else 5 * num_batches)
    held = held_weights(optimizer, dict(model.named_parameters()))
    return [*parameters, *held.values()], [*norms, torch.get_rng_state()]


@pytest.mark.parametrize("limit", [float("inf"), 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("name", LEGAL)
def test_in_the_backward_pass_no_bit_is_another(name: str, num_batches: int, limit: float) -> None:
    """Whatever the optimizer, and however gradients are accumulated and clipped; dropout draws what it would have."""
    dtype, flags = LEGAL[name]
    arguments = dtype, dataclasses.replace(SETTINGS, learning_rate=1e-2, **flags), num_batches, limit
    weights, rest = accumulated_steps(*arguments, in_backward=False)
    assert all(norm > 0.05 for norm in rest[:5])
    ours, our_rest = accumulated_steps(*arguments, in_backward=True)
    assert all(torch.equal(own, theirs) for own, theirs in zip(ours, weights, strict=True))
    assert all(torch.equal(own, theirs) for own, theirs in zip(our_rest, rest, strict=True))


@pytest.mark.parametrize(
    ("on_host", "num_batches", "limit", "most_on_device", "most_on_host"),
    [
        (False, 1, 0.05, 1, 0),
        (True, 1, 0.05, 1, 0),
        (False, 3, float("inf"), 4, 0),
        (True, 3, float("inf"), 1, 4),
        (True, 3, 0.05, 1, 4),
    ],
)
def test_in_the_backward_pass_gradients_are_kept_only_where_they_must_be(
    on_host: bool, num_batches: int, limit: float, most_on_device: int, most_on_host: int
) -> None:
    model = make_model()
    parameters = list(model.parameters())
    on_device, there = [], []

    def count(parameter: Parameter) -> None:
        on_device.append(sum(other.grad is not None for other in parameters))
        there.append(len(optimizer._host_gradients))

    for parameter in parameters:  # before the optimizer's own hook
        parameter.register_post_accumulate_grad_hook(count)
    optimizer = Fp32Steps(parameters, lambda held: torch.optim.AdamW(held), in_backward=True, on_host=on_host)
    for batch in range(num_batches):
        for _ in backward_passes(optimizer, batch, num_batches, limit):
            model(make_batch(batch).bfloat16()).float().square().mean().backward()
    assert max(on_device) == most_on_device and max([*there, len(optimizer._host_gradients)]) == most_on_host
    if limit == float("inf"):  # each was dropped as its weight was stepped
        assert not optimizer._host_gradients and all(parameter.grad is None for parameter in parameters)
    clip_gradients(Accelerator(cpu=True), optimizer, parameters, limit)
    optimizer.step()
    assert not optimizer._host_gradients and all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("name", ["masters", "on the host, gradients too"])
def test_gradients_are_clipped_wherever_they_are(name: str) -> None:
    """Trap: with the optimizer on the host, clipping is dropped."""
    model, accelerator = make_model(), Accelerator(cpu=True)
    raw = BUILDERS[name](list(model.parameters()))
    optimizer = accelerator.prepare_optimizer(raw, device_placement=False)
    schedule = build_schedule(raw, SETTINGS, 6)
    for number in range(6):
        model(make_batch(number).bfloat16()).float().square().mean().backward()
        norm = clip_gradients(accelerator, optimizer, list(model.parameters()), 1e-2)
        assert norm > 1e-2
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    masters, _ = plain_loop(6, limit=1e-2)
    held = held_weights(raw, dict(model.named_parameters()))
    for ours, theirs in zip(held.values(), masters, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_gradients_on_the_host_add_up_over_batches() -> None:
    """Trap: with the optimizer on the host, accumulation is dropped."""
    results = []
    for offload in (False, True):
        model = make_model(torch.float32)
        optimizer = on_host(list(model.parameters()), offload_gradients=offload)
        for number in range(3):
            model(make_batch(number)).square().mean().backward()
            assert all((parameter.grad is None) == offload for parameter in model.parameters())
        optimizer.step()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("trainable_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "prodigy", "came"])
def test_a_step_leaves_no_gradient_and_takes_no_second_set_of_them(name: Any, trainable_dtype: Any) -> None:
    model = make_model()
    options = dataclasses.replace(SETTINGS, optimizer=name, trainable_dtype=trainable_dtype)
    optimizer = build_optimizer(model.parameters(), options, 1)
    model(make_batch(0).bfloat16()).float().square().mean().backward()
    seen = []
    inner_step = optimizer._inner.step  # type: ignore[attr-defined]

    def look(*arguments: Any) -> Any:
        seen.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return inner_step(*arguments)

    optimizer._inner.step = look  # type: ignore[attr-defined]
    gradients = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    optimizer.step()
    assert seen == ([0] if name == "prodigy" else [3, 2, 1, 0])
    assert all(gradient() is None for gradient in gradients)
    assert all(stand_in.grad is None for group in optimizer.param_groups for stand_in in group["params"])
    if trainable_dtype == "bf16":  # nothing of fp32 weights is left either
        assert all(stand_in.numel() == 0 for group in optimizer.param_groups for stand_in in group["params"])


def test_zero_grad_clears_the_gradients_of_the_model() -> None:
    for name in ("masters", "on the host, gradients too"):
        model = make_model()
        optimizer = BUILDERS[name](list(model.parameters()))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        model(make_batch(0).bfloat16()).float().square().mean().backward()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


# --- tiny updates: LoRA or SFT weights trained in bf16 with neither master copy nor stochastic rounding ---

STEP = 1e-5  # of weights of 1, whose neighbours in bf16 are 2**-7 above and 2**-8 below
NUM_STEPS = 400


def drift(optimizer: torch.optim.Optimizer, parameter: Parameter) -> float:
    """Mean move of weights of 1 whose gradient always has the same sign."""
    for _ in range(NUM_STEPS):
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    return 1 - parameter.detach().float().mean().item()


@pytest.mark.parametrize("trainable_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", [{}, {"use_8bit": True}])
def test_many_updates_too_small_for_bf16_move_the_weights(flags: dict[str, Any], trainable_dtype: Any) -> None:
    """Trap: weights trained in bf16 with neither a master copy nor stochastic rounding."""
    parameter = Parameter(torch.ones(100, 200, dtype=torch.bfloat16))
    options = OptimizerOptions(learning_rate=STEP, weight_decay=0, trainable_dtype=trainable_dtype, **flags)
    optimizer = build_optimizer([parameter], options, 1)
    moved = drift(optimizer, parameter)
    wanted = Parameter(torch.ones(100, 200))
    expected = drift(build_optimizer([wanted], options, 1), wanted)
    assert expected == pytest.approx(NUM_STEPS * STEP, rel=0.05)
    if trainable_dtype == "bf16":  # 20,000 weights, each up to 2**-8 off: 5 standard errors
        assert moved == pytest.approx(expected, abs=5 * 2**-9 / 20_000**0.5)
    else:  # the bf16 copy of the masters, all equal
        held = held_weights(optimizer, {"weight": parameter})["weight"]
        assert torch.allclose(held, wanted.detach(), rtol=1e-6)
        assert moved == pytest.approx(expected, abs=2**-9)
        assert moved > 0


def test_plain_bf16_would_not_have_moved() -> None:
    """What the test above is for."""
    parameter = Parameter(torch.ones(10, dtype=torch.bfloat16))
    assert drift(torch.optim.AdamW([parameter], lr=STEP, weight_decay=0), parameter) == 0


def test_rounding_by_chance_is_right_on_average_and_goes_to_a_neighbour() -> None:
    values = torch.cat([torch.randn(20), torch.tensor([1.0, -0.0, 1e-3, -3.7e5, 1e-39, 0.99999])])
    generator = torch.Generator().manual_seed(0)
    num_rounds = 20_000
    rounded = round_stochastically(values.expand(num_rounds, -1).contiguous(), generator).double()
    down = (values.view(torch.int32) & -65536).view(torch.float32)
    up = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((rounded == down) | (rounded == up)).all()
    exact = values.double()
    spacing = (up.double() - down.double()).abs()
    assert ((rounded.mean(0) - exact).abs() <= 5 * spacing / 2 / num_rounds**0.5).all()
    is_exact = values == values.bfloat16()
    assert is_exact.any() and (rounded[:, is_exact] == exact[is_exact]).all()


def test_rounding_keeps_what_is_no_number() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)  # NaN, NaN, inf, −inf
    for _ in range(20):
        rounded = round_stochastically(bits.view(torch.float32))
        assert rounded[:2].isnan().all() and rounded[2:].tolist() == [float("inf"), -float("inf")]


def test_rounding_is_the_same_whatever_the_global_generator_did_and_differs_from_step_to_step() -> None:
    """Ranks must round alike."""
    results = []
    for seed in (1, 2):
        parameter = Parameter(torch.ones(50, 50, dtype=torch.bfloat16))
        options = OptimizerOptions(learning_rate=1e-3, weight_decay=0, trainable_dtype="bf16")
        optimizer = build_optimizer([parameter], options, 1)
        torch.manual_seed(seed)
        for _ in range(2):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            results.append(parameter.detach().clone())
            if len(results) == 1:
                state_after_first = copy.deepcopy(optimizer.state_dict())
    first, second, first_again, second_again = results
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    moved, moved_next = first != 1, second != first
    assert not torch.equal(moved, moved_next)
    # Who goes on after the first step rounds the second alike.
    parameter = Parameter(first.clone())
    resumed = build_optimizer([parameter], options, 1)
    resumed.load_state_dict(state_after_first)
    parameter.grad = torch.ones_like(parameter)
    resumed.step()
    assert torch.equal(parameter, second)


def test_saved_weights_go_back_into_masters_and_model() -> None:
    model, other = make_model(), make_model()
    optimizers = [build_optimizer(each.parameters(), SETTINGS, 1) for each in (model, other)]
    train(model, optimizers[0], range(4))
    values = {
        name: value.clone() for name, value in held_weights(optimizers[0], dict(model.named_parameters())).items()
    }
    set_weights(optimizers[1], dict(other.named_parameters()), values)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
        assert torch.equal(held_weights(optimizers[1], {name: parameter})[name], values[name])


def test_a_state_may_go_on_with_weights_of_another_type() -> None:
    """As when --mixed_precision or --trainable_dtype is another after a resume."""
    saved = make_model()
    first = build_optimizer(saved.parameters(), SETTINGS, 1)
    train(saved, first, range(3))
    values = {name: value.clone() for name, value in held_weights(first, dict(saved.named_parameters())).items()}
    model = make_model(torch.float32)
    plain = build_optimizer(model.parameters(), SETTINGS, 1)
    assert not isinstance(plain, Fp32Steps)
    set_weights(plain, dict(model.named_parameters()), values)
    plain.load_state_dict(copy.deepcopy(first.state_dict()))
    back = make_model()
    second = build_optimizer(back.parameters(), SETTINGS, 1)
    set_weights(second, dict(back.named_parameters()), held_weights(plain, dict(model.named_parameters())))
    second.load_state_dict(copy.deepcopy(plain.state_dict()))
    for each, optimizer in ((saved, first), (back, second)):
        train(each, optimizer, range(3, 6))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(saved.parameters(), back.parameters(), strict=True))


def test_weights_already_in_fp32_get_no_second_copy() -> None:
    parameters = [Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = build_optimizer(parameters, SETTINGS, 1)
    (group,) = optimizer.param_groups
    assert group["params"][0] is parameters[0] and group["params"][1].dtype == torch.float32
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(group["params"][0], group["params"][1]) and (parameters[0] < 1).all()


def test_weights_in_fp16_are_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        build_optimizer([Parameter(torch.ones(3, dtype=torch.float16))], SETTINGS, 1)


@pytest.mark.parametrize("flags", [{"in_backward": True}, {"on_host": True, "offload_gradients": True}])
def test_an_optimizer_that_is_dropped_goes_with_its_model(flags: dict[str, Any]) -> None:
    """Its hooks live in the parameters; a test of what was saved needs the memory of both."""
    model = make_model(torch.float32)
    optimizer = Fp32Steps(list(model.parameters()), lambda stand_ins: torch.optim.AdamW(stand_ins), **flags)
    train(model, optimizer, range(2))
    gone = weakref.ref(optimizer), weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]

"""The optimizer, and the schedule of its learning rate.

A row of `OPTIMIZERS` is one optimizer with one way to keep its state; a library is imported when its row is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from cogvideox_factory.config import OptimizerOptions, UserError
from cogvideox_factory.training.fp32_steps import Fp32Steps
from cogvideox_factory.training.fsdp import DividedSteps
from cogvideox_factory.training.zero import ZeroSteps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """Where an optimizer's class is, and what it is given besides the parameters and the rate."""

    package: str  # as pip knows it
    module: str
    class_name: str
    arguments: Callable[[OptimizerOptions], dict[str, Any]]
    one_by_one: bool = True  # each weight is stepped by itself; Prodigy's rate is one figure, learned from all weights


def _adam(options: OptimizerOptions) -> dict[str, Any]:
    return {
        "betas": (options.beta1, options.beta2),
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }


def _prodigy(options: OptimizerOptions) -> dict[str, Any]:
    return {
        **_adam(options),
        "beta3": options.beta3,  # None: the root of beta2
        "decouple": options.prodigy_decouple,
        "use_bias_correction": options.prodigy_use_bias_correction,
        "safeguard_warmup": options.prodigy_safeguard_warmup,
    }


def _came(options: OptimizerOptions) -> dict[str, Any]:
    """Its two epsilons stay its own: they are added to squares, and no 1e-8 would do."""
    return {"betas": (options.beta1, options.beta2, options.beta3), "weight_decay": options.weight_decay}


OPTIMIZERS: dict[tuple[str, str], Kind] = {
    ("adam", ""): Kind("torch", "torch.optim", "Adam", _adam),
    ("adamw", ""): Kind("torch", "torch.optim", "AdamW", _adam),
    ("adam", "8-bit bitsandbytes"): Kind("bitsandbytes", "bitsandbytes.optim", "Adam8bit", _adam),
    ("adamw", "8-bit bitsandbytes"): Kind("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", _adam),
    ("adam", "8-bit torchao"): Kind("torchao", "torchao.optim", "Adam8bit", _adam),
    ("adamw", "8-bit torchao"): Kind("torchao", "torchao.optim", "AdamW8bit", _adam),
    ("adam", "4-bit torchao"): Kind("torchao", "torchao.optim", "Adam4bit", _adam),
    ("adamw", "4-bit torchao"): Kind("torchao", "torchao.optim", "AdamW4bit", _adam),
    ("adam", "fp8 torchao"): Kind("torchao", "torchao.optim", "AdamFp8", _adam),
    ("adamw", "fp8 torchao"): Kind("torchao", "torchao.optim", "AdamWFp8", _adam),
    ("prodigy", ""): Kind("prodigyopt", "prodigyopt", "Prodigy", _prodigy, one_by_one=False),
    ("came", ""): Kind("came-pytorch", "came_pytorch.CAME", "CAME", _came),
}
# What Prodigy learns and keeps among its settings.
LEARNED = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")


def resolve_optimizer_options(options: OptimizerOptions) -> OptimizerOptions:
    """With each optimizer's own decays where none are given."""
    is_came = options.optimizer == "came"
    beta2 = (0.999 if is_came else 0.95) if options.beta2 is None else options.beta2
    beta3 = 0.9999 if is_came and options.beta3 is None else options.beta3
    return dataclasses.replace(options, beta2=beta2, beta3=beta3)


def check_optimizer(options: OptimizerOptions, accelerator: Accelerator) -> None:
    """Raises UserError for options that contradict each other or this machine, and where a library is missing.

    Called before anything is loaded. Options without effect are told.
    """
    check_optimizer_options(options, accelerator.num_processes, has_scaler=accelerator.scaler is not None)
    if options.use_cpu_offload_optimizer and accelerator.device.type == "cpu":
        raise UserError(
            "--use_cpu_offload_optimizer: needs a GPU; on a CPU the optimizer is there already, leave it out"
        )
    kind = _find_kind(options)
    if options.use_fp8 and accelerator.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise UserError("--use_fp8: needs a GPU of compute capability 8.9 or newer (Ada, Hopper); take --use_8bit")
    optimizer_class_of(kind)
    _tell_without_effect(options)


def check_optimizer_options(options: OptimizerOptions, num_processes: int, *, has_scaler: bool) -> None:
    """Raises UserError for options that contradict each other on every machine. `has_scaler`: gradients are fp16."""
    if options.offload_gradients and num_processes > 1:
        raise UserError(
            "--offload_gradients: for one GPU only, as gradients leave before they are averaged over the "
            f"{num_processes} processes; leave it out"
        )
    if not options.use_cpu_offload_optimizer:
        if options.use_torchao and not _precisions(options):
            raise UserError(
                "--use_torchao: says whose low-bit optimizer to take; add --use_8bit, --use_4bit or --use_fp8, or "
                "leave it out"
            )
        if options.offload_gradients:
            raise UserError("--offload_gradients: only together with --use_cpu_offload_optimizer; add that")
    if has_scaler:  # it looks for gradients that are gone by then
        for flag, is_given in (
            ("--use_cpu_offload_optimizer", options.use_cpu_offload_optimizer),
            ("--trainable_dtype bf16", options.trainable_dtype == "bf16"),
        ):
            if is_given:
                raise UserError(f"{flag}: not together with fp16; take --mixed_precision bf16")
    _find_kind(options)


def optimizer_name(options: OptimizerOptions) -> str:
    """The optimizer with what decides how its state is saved, for people: `adamw, 8-bit torchao`."""
    return ", ".join(part for part in (options.optimizer, _state_format(options)) if part)


def optimizer_class_of(kind: Kind) -> Callable[..., torch.optim.Optimizer]:
    """Raises UserError where the library is not installed."""
    try:
        return getattr(importlib.import_module(kind.module), kind.class_name)
    except ImportError as error:
        raise UserError(
            f"--optimizer: {kind.class_name} needs {kind.package}, which cannot be imported ({error}); "
            f"pip install {kind.package}"
        ) from error


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    options: OptimizerOptions,
    clips_per_step: int,
    *,
    in_backward: bool = False,
    has_masters: bool = False,
    class_of: Callable[[Kind], Callable[..., torch.optim.Optimizer]] = optimizer_class_of,
) -> torch.optim.Optimizer:
    """The optimizer that the options name; `clips_per_step` counts all ranks and accumulated batches.

    Parameters are fp32 or bf16; those in bf16 get fp32 masters or are rounded stochastically, as the options say.
    `has_masters`: the engine puts fp32 weights of its own in the place of these parameters.
    `in_backward`: each is stepped within the backward pass, as `backward_passes` says.
    `class_of` gives the class; planning has stand-ins for those that need a GPU's kernels.
    """
    options = resolve_optimizer_options(options)
    parameters = list(parameters)
    kind = _find_kind(options)
    optimizer_class = class_of(kind)
    arguments = kind.arguments(options)
    if options.use_cpu_offload_optimizer and kind.package == "torch":
        arguments["fused"] = True  # on a CPU many times faster than torch's default
    rate = options.learning_rate * (clips_per_step if options.scale_lr else 1)

    def build(held: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        assert has_masters or all(parameter.dtype == torch.float32 for parameter in held), (
            "a weight would be trained in plain bf16"
        )
        with contextlib.redirect_stdout(sys.stderr):  # Prodigy prints
            return optimizer_class(held, lr=rate, **arguments)

    if not has_masters and (
        in_backward
        or options.use_cpu_offload_optimizer
        or any(parameter.dtype != torch.float32 for parameter in parameters)
    ):
        return Fp32Steps(
            parameters,
            build,
            stochastic_rounding=options.trainable_dtype == "bf16",
            on_host=options.use_cpu_offload_optimizer,
            offload_gradients=options.offload_gradients,
            one_by_one=kind.one_by_one,
            in_backward=in_backward,
        )
    return build(parameters)


def effective_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the next step: the schedule's, times Prodigy's own estimate where there is one."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * group.get("d", 1.0)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's learning rate; torchao keeps it in a tensor that must stay the same."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = float(rate)


def keep_settings(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """After loading a state: take the settings of these groups again, with what was learned by the loaded ones."""
    learned = [{name: group[name] for name in LEARNED if name in group} for group in optimizer.param_groups]
    optimizer.param_groups[:] = [{**own, **loaded} for own, loaded in zip(settings, learned, strict=True)]


def backward_passes(optimizer: torch.optim.Optimizer, batch: int, num_batches: int, limit: float) -> Iterable[None]:
    """One item for each forward and backward pass that a batch (0, 1, …) of a step takes; see
    `Fp32Steps.backward_passes`. `limit` is the norm to clip to, or infinity."""
    raw = getattr(optimizer, "optimizer", optimizer)  # within accelerate's
    return raw.backward_passes(batch, num_batches, limit) if isinstance(raw, Fp32Steps) else (None,)


def updates_in_backward(optimizer: torch.optim.Optimizer) -> bool:
    """Whether weights are stepped within the backward pass, after which an update cannot be taken back."""
    raw = getattr(optimizer, "optimizer", optimizer)
    return isinstance(raw, Fp32Steps) and raw.in_backward


def clip_gradients(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    limit: float,
) -> torch.Tensor:
    """Scale gradients down to a common norm of `limit`, wherever they are; the norm before.

    Those that were used up in the backward pass were scaled there, as `backward_passes` was told."""
    raw = getattr(optimizer, "optimizer", optimizer)
    norm = None
    if isinstance(optimizer, ZeroSteps):
        norm = optimizer.gradient_norm()
    elif isinstance(optimizer, DividedSteps):
        norm = optimizer.clip_gradients(limit)
    elif isinstance(raw, Fp32Steps):
        norm = raw.norm_of_dropped_gradients()
        norm = raw.clip_host_gradients(limit) if norm is None else norm
    return accelerator.clip_grad_norm_(parameters, limit) if norm is None else norm


def _precisions(options: OptimizerOptions) -> list[str]:
    """Low-bit formats that are asked for."""
    asked = {"8-bit": options.use_8bit, "4-bit": options.use_4bit, "fp8": options.use_fp8}
    return [name for name, is_asked in asked.items() if is_asked]


def _state_format(options: OptimizerOptions) -> str:
    library = "torchao" if options.use_torchao else "bitsandbytes"
    return " ".join((*_precisions(options), library)) if _precisions(options) else ""


def _find_kind(options: OptimizerOptions) -> Kind:
    """Raises UserError for options that no row of the table answers to."""
    flags = [f"--use_{name.replace('-', '')}" for name in _precisions(options)]
    if len(flags) > 1:
        raise UserError(f"{' '.join(flags)}: the state has one format; leave all but one out")
    if flags and options.optimizer not in ("adam", "adamw"):
        raise UserError(f"--optimizer {options.optimizer} {flags[0]}: only adam and adamw have a low-bit form")
    if flags and flags[0] != "--use_8bit" and not options.use_torchao:
        raise UserError(f"{flags[0]}: only torchao has it; add --use_torchao")
    return OPTIMIZERS[options.optimizer, _state_format(options)]


def _tell_without_effect(options: OptimizerOptions) -> None:
    """Warn of options that this optimizer does not look at, and of what surprises people."""
    defaults = OptimizerOptions()
    ignored = ["epsilon"] if options.optimizer == "came" else []
    if options.optimizer != "prodigy":
        ignored += ["prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"]
    if options.optimizer in ("adam", "adamw"):
        ignored.append("beta3")
    given = [f"--{name}" for name in ignored if getattr(options, name) != getattr(defaults, name)]
    if given:
        logger.warning("%s: without effect with --optimizer %s", " ".join(given), options.optimizer)
    if options.optimizer == "prodigy" and options.learning_rate < 0.1:
        logger.warning(
            "--learning_rate %g: prodigy finds the rate by itself and multiplies it by this; 1 is usual",
            options.learning_rate,
        )
    if (options.optimizer, _state_format(options)) == ("adam", "8-bit bitsandbytes") and options.weight_decay:
        logger.warning("--optimizer adam --use_8bit: bitsandbytes decays the weights directly, as adamw does")


def build_schedule(optimizer: torch.optim.Optimizer, options: OptimizerOptions, num_steps: int):
    """The learning rate over `num_steps` optimizer steps; `step()` is called once after each of them.

    diffusers' `constant` ignores the warm-up in silence; here a warm-up that is asked for takes place.
    """
    from diffusers.optimization import get_scheduler

    warms_up = options.lr_scheduler == "constant" and options.lr_warmup_steps > 0
    # A warm-up that fills the training leaves nothing to decay over, which diffusers' polynomial divides by.
    warms_up = warms_up or (options.lr_scheduler == "polynomial" and options.lr_warmup_steps >= num_steps)
    end_of_polynomial = 1e-7  # diffusers' own
    if options.lr_scheduler == "polynomial" and optimizer.defaults["lr"] <= end_of_polynomial:
        raise UserError(
            f"--learning_rate {optimizer.defaults['lr']:g}: must be more than {end_of_polynomial:g}, where "
            "--lr_scheduler polynomial ends"
        )
    return get_scheduler(
        "constant_with_warmup" if warms_up else options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )

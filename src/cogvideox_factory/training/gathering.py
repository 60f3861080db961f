"""What ranks divide among them, put together on one of them to be written down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import Module, Parameter


class Gathered:
    """Trained weights and the optimizer's state, whole and on the host, for whoever writes them down."""

    def __init__(self, weights: Mapping[Parameter, torch.Tensor], state: Mapping[str, Any]):
        self._weights, self._state = weights, state

    def held_weight(self, parameter: Parameter) -> torch.Tensor:
        return self._weights[_original(parameter)]

    def state_dict(self) -> Mapping[str, Any]:
        return self._state


def gathered(optimizer: torch.optim.Optimizer, *, is_kept: bool) -> Any:
    """What a checkpoint reads of an optimizer, whole on a rank where `is_kept`. Every rank calls it."""
    return optimizer.gathered(is_kept=is_kept) if hasattr(optimizer, "gathered") else optimizer


@contextlib.contextmanager
def whole_parameters(model: Module, *, only_trained: bool, is_kept: bool) -> Iterator[None]:
    """Meanwhile parameters that ranks divide among them are whole, on the host of a rank where `is_kept`, to be read.

    Every rank enters it. The model is not to be run."""
    places: list[tuple[Module, str, Parameter]] = []
    copies: dict[Parameter, Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_divided(parameter) or (only_trained and not parameter.requires_grad):
                continue
            places.append((module, name, parameter))
            with gathered_parameter(parameter) as value:
                if is_kept and parameter not in copies:
                    copy = Parameter(value.detach().to("cpu", copy=True), parameter.requires_grad)
                    copy.stands_for = parameter  # type: ignore[attr-defined]
                    copies[parameter] = copy
    try:
        for module, name, parameter in places if is_kept else ():
            module._parameters[name] = copies[parameter]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


@contextlib.contextmanager
def gathered_parameter(parameter: Parameter, *, is_changed: bool = False) -> Iterator[torch.Tensor]:
    """A parameter, whole on every rank. `is_changed`: DeepSpeed divides again what the first rank has made of it."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0 if is_changed else None):
            yield parameter
    else:
        yield parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether ranks divide a parameter of the model among them: DeepSpeed's stage 3, or FSDP2."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor")


def part_of(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def is_a_number_a_weight(value: Any) -> bool:
    """Whether a part of an optimizer's state has the shape of its weight."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _original(parameter: Parameter) -> Parameter:
    return getattr(parameter, "stands_for", parameter)

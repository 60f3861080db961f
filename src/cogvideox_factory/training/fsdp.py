"""An optimizer over weights that FSDP2 divides among the ranks, as the loop knows optimizers.

Each rank steps its part of every weight, in fp32; torch calls such a weight a DTensor. What is read of one is put
together from the ranks, so that a checkpoint is the same whatever the engine. Rejected: torch's distributed
checkpoints, which no other engine reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Parameter

from cogvideox_factory.training.gathering import Gathered, is_a_number_a_weight


class DividedSteps(torch.optim.Optimizer):
    """An Adam or AdamW over DTensors. Whatever is gathered is gathered by all ranks together."""

    def __init__(self, inner: torch.optim.Optimizer):
        """`inner` has one group of parameters."""
        self._inner = inner
        self._parameters: list[Parameter] = list(inner.param_groups[0]["params"])

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self._inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._inner.defaults

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        self._inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> torch.Tensor:
        """Scale the gradients of all ranks down to a common norm of `limit`; the norm before."""
        return whole(torch.nn.utils.clip_grad_norm_(self._parameters, limit))

    def held_weight(self, parameter: Parameter) -> torch.Tensor:
        return whole(parameter.detach())

    @torch.no_grad()
    def set_held_weight(self, parameter: Parameter, value: torch.Tensor) -> None:
        """Each rank keeps its part of a value that is the same on all of them."""
        parameter.copy_(_divided_as(parameter, value))

    def gathered(self, *, is_kept: bool) -> Gathered:
        """All of it on the host, of a rank where `is_kept`; the others only give their parts."""

        def kept(value: torch.Tensor) -> torch.Tensor:
            value = whole(value.detach())
            return value.cpu() if is_kept else value.new_empty(0)

        weights = {parameter: kept(parameter) for parameter in self._parameters}
        return Gathered(weights, _map_state(self._inner.state_dict(), lambda number, value: kept(value)))

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Each rank takes its part of states of whole weights."""

        def divided(number: int, value: torch.Tensor) -> torch.Tensor:
            return _divided_as(self._parameters[number], value) if is_a_number_a_weight(value) else value

        self._inner.load_state_dict(_map_state(state_dict, divided))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from all ranks, where they divide it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _divided_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _map_state(state_dict: Mapping[str, Any], change: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """With every tensor of a weight's state changed, given the weight's number."""
    states = {
        number: {
            name: change(number, value) if isinstance(value, torch.Tensor) else value for name, value in state.items()
        }
        for number, state in state_dict["state"].items()
    }
    return {"state": states, "param_groups": state_dict["param_groups"]}

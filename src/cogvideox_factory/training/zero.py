"""DeepSpeed's optimizer, whose fp32 weights and states are divided among the ranks, as the loop knows optimizers.

ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) lays all trained weights end to end and gives each rank
one part of their fp32 masters and states to step. What is read here of a weight is put together from the ranks, so that
a checkpoint is the same whatever the engine and the number of processes that wrote it, or that go on from it. Rejected:
DeepSpeed's own checkpoints, which are pickles, and fit one number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import Parameter


class Gathered:
    """Trained weights and the optimizer's state, whole and on the host, for whoever writes them down."""

    def __init__(self, weights: Mapping[Parameter, torch.Tensor], state: Mapping[str, Any]):
        self._weights, self._state = weights, state

    def held_weight(self, parameter: Parameter) -> torch.Tensor:
        return self._weights[parameter]

    def state_dict(self) -> Mapping[str, Any]:
        return self._state


class ZeroSteps(torch.optim.Optimizer):
    """The optimizer of a DeepSpeed engine that has ZeRO stage 2.

    It steps in `accelerator.backward`, in that of the step's last batch, and clips there; `step` and `zero_grad` have
    nothing left to do. Whatever is gathered is gathered by all ranks together.
    """

    def __init__(self, engine, parameters: Iterable[Parameter]):
        """`engine` is DeepSpeed's, around an optimizer over these parameters, in this order, in one group."""
        self._engine = engine
        self._parameters = list(parameters)
        assert len(self.param_groups) == 1

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The settings; what stands for the parameters is the part of this rank."""
        return self._engine.basic_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """Nothing that others may move: DeepSpeed keeps views of it."""
        return {}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._engine.basic_optimizer.defaults

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def gradient_norm(self) -> torch.Tensor:
        """Of the step that was just taken, over all ranks, before clipping; infinite where a gradient was no number,
        for which DeepSpeed leaves the step out."""
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def held_weight(self, parameter: Parameter) -> torch.Tensor:
        """The fp32 master of a parameter, put together from all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    @torch.no_grad()
    def set_held_weight(self, parameter: Parameter, value: torch.Tensor) -> None:
        """Set a parameter and its master; each rank keeps its part of it."""
        from deepspeed.utils import safe_set_full_fp32_param

        value = value.to(parameter.device, torch.float32)
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)

    def gathered(self, *, is_kept: bool) -> Gathered:
        """All of it on the host, of a rank where `is_kept`; the others only give their parts."""
        weights = {}
        for parameter in self._parameters:
            weight = self.held_weight(parameter)
            if is_kept:
                weights[parameter] = weight.cpu()
        return Gathered(weights, self.state_dict(is_kept=is_kept))

    def state_dict(self, *, is_kept: bool = True) -> dict[str, Any]:
        """As that of the same optimizer over whole weights, so that it can go on under another engine."""
        from deepspeed.utils import safe_get_full_optimizer_state

        ours = self._state_of_this_rank()
        states: dict[int, dict[str, torch.Tensor]] = {}
        for number, parameter in enumerate(self._parameters):
            state = {}
            for name, value in ours.items():
                if value.dim():
                    whole = safe_get_full_optimizer_state(parameter, name)
                    state[name] = whole.cpu() if is_kept else whole.new_empty(0)
                else:
                    state[name] = value.cpu()  # the number of steps, which is that of every weight
            if state:
                states[number] = state
        settings = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        return {"state": states, "param_groups": [{**settings, "params": list(range(len(self._parameters)))}]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Each rank takes its part of states of whole weights, before the first step of this optimizer."""
        (group,) = self.param_groups
        (saved_group,) = state_dict["param_groups"]
        group.update({name: value for name, value in saved_group.items() if name != "params"})
        states: Mapping[int, Mapping[str, torch.Tensor]] = state_dict["state"]
        if not states:
            return
        (part,) = group["params"]
        ours = self._engine.basic_optimizer.state[part]
        assert not ours, "a state that DeepSpeed has views of already"
        for name, value in states[0].items():
            ours[name] = torch.zeros_like(part) if value.dim() else value.clone()
        for number, parameter in enumerate(self._parameters):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # all of it belongs to other ranks
                continue
            here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            for name, value in states[number].items():
                if value.dim():
                    of_rank = value.flatten().narrow(0, there.start, there.numel)
                    ours[name].narrow(0, here.start, here.numel).copy_(of_rank)

    def _state_of_this_rank(self) -> Mapping[str, torch.Tensor]:
        """By the names of its tensors; empty before the first step. Adam's, as `check_engine` allows no other."""
        (part,) = self.param_groups[0]["params"]
        return self._engine.basic_optimizer.state.get(part, {})


def gathered(optimizer: torch.optim.Optimizer, *, is_kept: bool) -> Any:
    """What a checkpoint reads of an optimizer, whole on a rank where `is_kept`. Every rank calls it."""
    return optimizer.gathered(is_kept=is_kept) if isinstance(optimizer, ZeroSteps) else optimizer

"""DeepSpeed's optimizer, whose fp32 weights and states are divided among the ranks, as the loop knows optimizers.

ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) gives each rank a part of the fp32 masters and states
of all trained weights to step; its stage 3 divides the weights that compute as well. What is read here of a weight is
put together from the ranks, so that a checkpoint is the same whatever the engine and the number of processes that wrote
it, or that go on from it. Rejected: DeepSpeed's own checkpoints, which are pickles, and fit one number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import Parameter

from cogvideox_factory.training.gathering import Gathered, gathered_parameter, is_a_number_a_weight, is_divided


class ZeroSteps(torch.optim.Optimizer):
    """The optimizer of a DeepSpeed engine of ZeRO stage 2 or 3: Adam or AdamW, whose states are one number a weight.

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
        """The settings; what stands for the parameters is DeepSpeed's."""
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
        """Set a parameter and its master; each rank keeps its part. `value` is the same on all of them."""
        from deepspeed.utils import safe_set_full_fp32_param

        value = value.to(parameter.device, torch.float32)
        with gathered_parameter(parameter, is_changed=True):
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

        of_part: Mapping[str, Any] = next((state for state in self._engine.basic_optimizer.state.values() if state), {})
        states: dict[int, dict[str, torch.Tensor]] = {}
        for number, parameter in enumerate(self._parameters if of_part else ()):
            states[number] = {}
            for name, value in of_part.items():
                if is_a_number_a_weight(value):
                    whole = safe_get_full_optimizer_state(parameter, name)
                    states[number][name] = whole.cpu() if is_kept else whole.new_empty(0)
                else:
                    states[number][name] = torch.tensor(float(value))  # the number of steps
        settings = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        return {"state": states, "param_groups": [{**settings, "params": list(range(len(self._parameters)))}]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Each rank takes its part of states of whole weights, before the first step of this optimizer."""
        from deepspeed.utils import safe_set_full_optimizer_state

        (saved_group,) = state_dict["param_groups"]
        self.param_groups[0].update({name: value for name, value in saved_group.items() if name != "params"})
        states: Mapping[int, Mapping[str, torch.Tensor]] = state_dict["state"]
        if not states:
            return
        counts_in_tensors = not type(self._engine.basic_optimizer).__module__.startswith("deepspeed")
        for part in self._parts():
            ours = self._engine.basic_optimizer.state[part]
            assert not ours, "a state that DeepSpeed has views of already"
            for name, value in states[0].items():
                if is_a_number_a_weight(value):
                    ours[name] = torch.zeros_like(part)
                else:
                    ours[name] = torch.tensor(float(value)) if counts_in_tensors else int(value)
        for number, parameter in enumerate(self._parameters):
            for name, value in states[number].items():
                if not is_a_number_a_weight(value):
                    continue
                if is_divided(parameter):
                    safe_set_full_optimizer_state(parameter, value, name)
                elif mapping := parameter._hp_mapping:  # type: ignore[attr-defined]  # some of it is this rank's
                    # As DeepSpeed's own function does, which knows no states before the first step.
                    here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                    target = self._engine.basic_optimizer.state[self._parts()[0]][name]
                    of_rank = value.flatten().narrow(0, there.start, there.numel)
                    target.narrow(0, here.start, here.numel).copy_(of_rank)

    def _parts(self) -> list[torch.Tensor]:
        """What this rank steps: fp32 weights laid end to end."""
        optimizer = self._engine.optimizer
        stage_3 = getattr(optimizer, "fp32_partitioned_groups_flat", None)
        return stage_3 or optimizer.single_partition_of_fp32_groups

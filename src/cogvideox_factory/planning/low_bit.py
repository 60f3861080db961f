"""Stand-ins for optimizers with low-bit states, whose kernels do not run on fake tensors: they hold what those hold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from cogvideox_factory.training.optimizers import Kind, optimizer_class_of

SMALLEST = 4096  # both libraries keep the state of smaller weights in fp32


class LowBitStates(torch.optim.Optimizer):
    """Two states a weight, `bits` a number with a fp32 scale for each `block` of them."""

    def __init__(self, parameters, *, bits: int, block: int, whole_blocks: bool, num_decoded: int, lr: float, **_: Any):
        """`whole_blocks`: the states of a weight that the block does not divide stay in fp32. `num_decoded`: states of
        a weight that are there in fp32 at the most while it is stepped."""
        super().__init__(parameters, {"lr": lr})
        self._bits, self._block, self._whole_blocks, self._num_decoded = bits, block, whole_blocks, num_decoded

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = self._states(parameter)
                _ = [torch.empty_like(parameter, dtype=torch.float32) for _ in range(self._num_decoded)]

    def _states(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        count = parameter.numel()
        if count < SMALLEST or (self._whole_blocks and count % self._block):
            return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("first", "second")}
        empty = functools.partial(torch.empty, device=parameter.device)
        states = {name: empty(count * self._bits // 8, dtype=torch.uint8) for name in ("first", "second")}
        scales = {f"{name}_scale": empty(-(-count // self._block), dtype=torch.float32) for name in ("first", "second")}
        return {**states, **scales}


def class_of(kind: Kind) -> Callable[..., torch.optim.Optimizer]:
    """The class of an optimizer, or what stands in for it."""
    if kind.package == "bitsandbytes":
        return functools.partial(LowBitStates, bits=8, block=256, whole_blocks=False, num_decoded=0)  # one kernel
    if kind.package == "torchao":
        is_4bit = "4bit" in kind.class_name
        return functools.partial(
            LowBitStates,
            bits=4 if is_4bit else 8,
            block=128 if is_4bit else 256,
            whole_blocks=True,
            num_decoded=2,  # what of it the compiler fuses is not known here
        )
    return optimizer_class_of(kind)

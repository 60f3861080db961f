"""Frozen linear layers whose weights are kept in int8, fp8 or nf4, and dequantized one layer at a time.

A quantized layer is what it was, of the same name, except that it holds fewer bytes: its `weight` is made anew, in the
type that the model computes in, whenever it is asked for, by the layer itself or by peft (for the norms of DoRA).
Neither the forward pass nor the backward pass keeps it. What is held are ordinary frozen parameters, so that
block swap moves them, checkpoints recompute with them, and a plan on fake tensors counts them, as they do any others.

int8 and fp8 (e4m3) have one fp32 scale for each row of a weight, an output channel; nf4 has the 16 levels of the
quantiles of a normal distribution, and a scale for each 64 weights (Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314). That paper's own scales are 8-bit numbers with scales of their own; here they are
bf16, which takes 1/64 byte a weight more, and no table that each device must hold.

Rejected: torchao's weight-only tensors and bitsandbytes' `Linear4bit`, whose weights are tensors of their own kinds.
Neither can be built on fake tensors, and the bytes of neither can lie in memory that block swap has allotted. Of
bitsandbytes only the two operations are taken that make nf4 of a weight and a weight of nf4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cogvideox_factory.config import UserError

NF4_BLOCK = 64  # weights that share a scale


@dataclass(frozen=True)
class Format:
    """A way to keep a weight, (out, in), in few bytes."""

    parts: tuple[str, ...]  # names of the tensors that make a weight
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    dequantize: Callable[[tuple[torch.Tensor, ...], tuple[int, int], torch.dtype], torch.Tensor]


class QuantizedLinear(torch.nn.Linear):
    """A frozen linear layer that holds its weight in another format. It is made of a plain one, by `quantize_layer`."""

    format: Format
    compute_dtype: torch.dtype

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(out, in), dequantized anew: a tensor that lives as long as the caller keeps it."""
        return self.dequantize(*self.parts())

    def parts(self) -> list[torch.Tensor]:
        """The tensors that make the weight."""
        return [self.get_parameter(name) for name in self.format.parts]

    def dequantize(self, *parts: torch.Tensor) -> torch.Tensor:
        """(out, in), of such tensors."""
        return self.format.dequantize(parts, (self.out_features, self.in_features), self.compute_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out)."""
        return _FrozenLinear.apply(input, self.bias, self.dequantize, *self.parts())


class _FrozenLinear(torch.autograd.Function):
    """input @ weight.T + bias, with a gradient for the input alone and the weight dequantized in each direction.

    The parts are *saved*, not looked up in the layer again: to ask for what was saved is what makes a checkpoint
    recompute its block, and that is what brings the block's weights back to the device where blocks are swapped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        bias: torch.Tensor | None,
        dequantize: Callable[..., torch.Tensor],
        *parts: torch.Tensor,
    ) -> torch.Tensor:
        ctx.dequantize = dequantize
        ctx.save_for_backward(*parts)
        return torch.nn.functional.linear(input, dequantize(*parts), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = ctx.saved_tensors
        return (gradient @ ctx.dequantize(*parts), None, None, *(None for _ in parts))


def _in_units_of_scales(weight: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with each row divided by a scale, so that its largest number is `largest`; and the scales, (out, 1)."""
    weight = weight.float()
    scale = torch.linalg.vector_norm(weight, torch.inf, dim=1, keepdim=True) / largest
    scale.clamp_(min=torch.finfo(torch.float32).tiny)  # of a row of zeros
    return weight / scale, scale


def _to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    content, scale = _in_units_of_scales(weight, 127)
    return content.round_().to(torch.int8), scale


def _from_int8(parts: tuple[torch.Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    content, scale = parts
    return content.to(dtype).mul_(scale)  # exact, then multiplied in fp32 and rounded once


def _to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    content, scale = _in_units_of_scales(weight, torch.finfo(torch.float8_e4m3fn).max)
    return content.to(torch.float8_e4m3fn).view(torch.uint8), scale  # bytes, which no conversion of a model changes


def _from_fp8(parts: tuple[torch.Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    content, scale = parts
    return content.view(torch.float8_e4m3fn).to(dtype).mul_(scale)  # exact, as above


def _to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    import bitsandbytes  # noqa: F401  (registers its operations)

    content, absmax = torch.ops.bitsandbytes.quantize_4bit(weight, NF4_BLOCK, "nf4", torch.uint8)
    return content, absmax.bfloat16()


def _from_nf4(parts: tuple[torch.Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    content, absmax = parts
    # As rows of one block where they are whole: of rows that are no multiple of it, bitsandbytes 0.50.2 takes the wrong
    # scales on some CPUs.
    size = math.prod(shape)
    rows = shape if size % NF4_BLOCK else (size // NF4_BLOCK, NF4_BLOCK)
    weight = torch.ops.bitsandbytes.dequantize_4bit(content, absmax.float(), NF4_BLOCK, "nf4", rows, dtype)
    return weight.reshape(shape)


FORMATS = {
    "int8": Format(("content", "scale"), _to_int8, _from_int8),
    "fp8": Format(("content", "scale"), _to_fp8, _from_fp8),
    "nf4": Format(("content", "absmax"), _to_nf4, _from_nf4),
}


def check_library(name: str) -> None:
    """Raises UserError where a format needs a library that is not installed."""
    if name != "nf4":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--quantize_base nf4: needs bitsandbytes, which cannot be imported ({error}); pip install bitsandbytes, "
            "or take int8"
        ) from error


def quantize_base(transformer, name: str, device: torch.device) -> None:
    """Quantize the frozen linear layers of a transformer's blocks; names, and all that is outside the blocks, stay.

    Each layer goes to `device` to be quantized and comes back, so that the device never holds more than one, and what
    block swap keeps on the host is never all on the device.
    """
    for block in transformer.transformer_blocks:
        for layer in block.modules():
            is_frozen = not any(parameter.requires_grad for parameter in layer.parameters())
            if type(layer) is torch.nn.Linear and is_frozen:
                quantize_layer(layer, FORMATS[name], device)


@torch.no_grad()
def quantize_layer(layer: torch.nn.Linear, format: Format, device: torch.device) -> None:
    """Make a quantized layer of a plain one, in place, with the arithmetic on `device`."""
    weight = layer.weight
    parts = format.quantize(weight.detach().to(device))
    del layer.weight
    layer.__class__ = QuantizedLinear
    assert isinstance(layer, QuantizedLinear)
    layer.format, layer.compute_dtype = format, weight.dtype
    for name, part in zip(format.parts, parts, strict=True):
        layer.register_parameter(name, torch.nn.Parameter(part.to(weight.device), requires_grad=False))

"""A LoRA that computes in the base model's type while its weights stay fp32.

peft converts the *input* of a LoRA to the type of the LoRA's weights: where the base is bf16 and the LoRA fp32, a
second copy of every activation, twice as large, and products in fp32. Here the weights are converted instead, for each
product, which is how stock diffusers runs the exported LoRA; gradients arrive in fp32.
"""

from __future__ import annotations

import torch


class LinearInTypeOfInput(torch.nn.Linear):
    """A linear layer whose weights are converted to the type of what it is given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return torch.nn.functional.linear(input, self.weight.to(input.dtype), bias)


def compute_in_base_type(transformer) -> None:
    """Let each plain LoRA layer over a 16-bit layer compute in 16 bits; names and types of its weights stay.

    DoRA keeps computing in fp32: it divides by a norm of the whole weight, which 16 bits would blur.
    """
    from peft.tuners.lora import LoraLayer

    for layer in transformer.modules():
        if isinstance(layer, LoraLayer) and layer.lora_A and not layer.lora_variant:
            if layer.get_base_layer().weight.dtype not in (torch.bfloat16, torch.float16):
                continue
            layer.cast_input_dtype_enabled = False
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                assert type(part) is torch.nn.Linear
                part.__class__ = LinearInTypeOfInput

"""A bf16 model with a LoRA against a plain loop with stock peft layers in bf16 and fp32 copies of their weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from training_steps import LORA, OPTIMIZER, SEED, steps_of, train

from cogvideox_factory.config import LoraOptions, MemoryOptions
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.memory.lora_precision import compute_in_base_type
from cogvideox_factory.model.adapters import attach_lora, trainable_parameters
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler, load_transformer
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.training.objective import velocity_loss

NUM_STEPS = 3


def plain_loop(
    checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry], masters: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Trains from these fp32 weights; the model holds them rounded."""
    transformer = load_transformer(checkpoint, torch.bfloat16)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(LORA.target_modules)))
    parameters = trainable_parameters(transformer)
    for parameter in parameters.values():
        parameter.data = parameter.data.bfloat16()
    held = {name: torch.nn.Parameter(value.clone()) for name, value in masters.items()}
    optimizer = torch.optim.AdamW(held.values(), lr=OPTIMIZER.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    denoiser, scheduler = Denoiser(checkpoint, torch.bfloat16), load_scheduler(checkpoint)
    for step in steps_of(prepared, entries, NUM_STEPS):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(held[name])
                parameter.grad = None
        (batch,) = step.batches
        velocity_loss(transformer, denoiser, scheduler, batch).mean().backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            held[name].grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(held.values(), 1.0)
        optimizer.step()
    return {name: value.detach() for name, value in held.items()}


def test_a_bf16_run_equals_a_plain_loop_with_fp32_masters(
    checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    masters: dict[str, torch.Tensor] = {}

    def keep(number: int, transformer) -> None:
        if number == 0:
            masters.update({name: value.detach().clone() for name, value in trainable_parameters(transformer).items()})

    ours = train(
        checkpoint, prepared, entries, MemoryOptions(), torch.bfloat16, num_steps=NUM_STEPS, before_step=keep
    ).weights
    assert SEED == 7 and {value.dtype for value in (*masters.values(), *ours.values())} == {torch.float32}
    theirs = plain_loop(checkpoint, prepared, entries, masters)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert not torch.equal(value, masters[name]) and torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("dtype", "lora", "expected"),
    [
        (torch.bfloat16, LoraOptions(rank=2), torch.bfloat16),
        (torch.float16, LoraOptions(rank=2), torch.float16),
        (torch.float32, LoraOptions(rank=2), torch.float32),
        (torch.bfloat16, LoraOptions(rank=2, use_dora=True), torch.float32),
    ],
    ids=["bf16", "fp16", "fp32", "dora"],
)
def test_what_enters_a_lora_has_the_bases_type(
    checkpoint: Checkpoint, dtype: torch.dtype, lora: LoraOptions, expected: torch.dtype
) -> None:
    transformer = load_transformer(checkpoint, dtype)
    attach_lora(transformer, lora, seed=0)
    names = list(transformer.state_dict())
    compute_in_base_type(transformer)
    assert list(transformer.state_dict()) == names
    layer = transformer.transformer_blocks[0].attn1.to_q
    entered: list[torch.dtype] = []
    layer.lora_A["default"].register_forward_pre_hook(lambda module, arguments: entered.append(arguments[0].dtype))
    output = layer(torch.ones(1, 3, layer.in_features, dtype=dtype))
    output.float().sum().backward()
    assert entered[-1] == expected and output.dtype == dtype
    assert layer.lora_B["default"].weight.grad.dtype == torch.float32

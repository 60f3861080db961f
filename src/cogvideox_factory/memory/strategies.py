"""The table of memory strategies, which the trainer applies and a planner reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cogvideox_factory.config import MemoryOptions, Train, UserError
from cogvideox_factory.memory.activations import OffloadedCheckpoints
from cogvideox_factory.memory.block_swap import swap_blocks
from cogvideox_factory.memory.feed_forward import chunk_feed_forward
from cogvideox_factory.memory.lora_precision import compute_in_base_type
from cogvideox_factory.memory.quantized_base import check_library, quantize_base
from cogvideox_factory.memory.rotation import rotate_in_parts
from cogvideox_factory.memory.split_checkpoints import SplitCheckpoints, split_blocks
from cogvideox_factory.model.adapters import is_lora

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lever:
    """Values of options that a search may choose, and what they are expected to cost.

    `slowdown` is how much longer a step takes, from figures that others published for models of this size; it orders
    what is tried, and promises nothing.
    """

    values: Mapping[str, Any]
    slowdown: float
    is_exact: bool = True  # up to rounding


@dataclass(frozen=True)
class Strategy:
    """One way to spend less memory."""

    name: str
    flag: str | None  # None: it has none, and is on wherever it applies
    is_on: Callable[[MemoryOptions], bool]
    apply: Callable[[Any, MemoryOptions, torch.device], None]  # to a transformer with what it trains attached
    saves: str
    costs: str
    levers: tuple[Lever, ...] = ()  # from the gentlest to the strongest; one of them or none is chosen
    needs_checkpointing: bool = False
    needs_offloading: bool = False  # of what is checkpointed
    needs_all_weights: bool = False  # on the device
    needs_lora: bool = False
    needs_one_process: bool = False
    steps_in_backward: bool = False


def _checkpoint_blocks(transformer, options: MemoryOptions, device: torch.device) -> None:
    kind = SplitCheckpoints if options.split_checkpoints else OffloadedCheckpoints
    transformer.enable_gradient_checkpointing(kind(device) if options.offload_activations else None)


# In the order in which they are applied.
STRATEGIES: tuple[Strategy, ...] = (
    Strategy(
        name="LoRA in the base model's type",
        flag=None,
        is_on=lambda options: True,
        apply=lambda transformer, options, device: compute_in_base_type(transformer) if is_lora(transformer) else None,
        saves="fp32 copies of the activations that enter a LoRA over a 16-bit layer",
        costs="products of the LoRA are rounded to 16 bits, as those of the base are",
        needs_lora=True,
    ),
    Strategy(
        name="rotation in parts",
        flag=None,
        is_on=lambda options: True,
        apply=lambda transformer, options, device: rotate_in_parts(transformer),
        saves="fp32 copies of all queries and keys, while videos are made",
        costs="nothing",
    ),
    Strategy(
        name="quantized base",
        flag="--quantize_base",
        is_on=lambda options: options.quantize_base is not None,
        apply=lambda transformer, options, device: _quantize(transformer, options, device),
        saves="half of the frozen weights in the blocks with int8 and fp8, nearly three quarters with nf4",
        costs="each layer is dequantized whenever it is used; the base is off by what is rounded",
        levers=(
            Lever({"quantize_base": "int8"}, 1.3, is_exact=False),
            Lever({"quantize_base": "nf4"}, 1.5, is_exact=False),
        ),
        needs_lora=True,
    ),
    Strategy(
        name="feed-forward in chunks",
        flag="--feed_forward_chunks",
        is_on=lambda options: options.feed_forward_chunks > 1,
        apply=lambda transformer, options, device: chunk_feed_forward(transformer, options.feed_forward_chunks),
        saves="all but one chunk of the hidden activations of a feed-forward, at the peak of a step",
        costs="each feed-forward is computed once more; results differ by rounding",
        levers=(Lever({"feed_forward_chunks": 8}, 1.08),),
    ),
    Strategy(
        name="block checkpointing",
        flag="--gradient_checkpointing",
        is_on=lambda options: options.gradient_checkpointing,
        apply=_checkpoint_blocks,
        saves="the activations of all blocks but one, save the inputs of each",
        costs="each block is computed once more in the backward pass",
        levers=(Lever({"gradient_checkpointing": True}, 1.33),),
    ),
    Strategy(
        name="block inputs on the host",
        flag="--offload_activations",
        is_on=lambda options: options.offload_activations,
        apply=lambda transformer, options, device: None,  # it is how blocks are checkpointed
        saves="the inputs of all blocks but a few",
        costs="as much host memory, and copies that run beside the computation",
        levers=(Lever({"offload_activations": True}, 1.05),),
        needs_checkpointing=True,
    ),
    Strategy(
        name="split checkpoints",
        flag="--split_checkpoints",
        is_on=lambda options: options.split_checkpoints,
        apply=lambda transformer, options, device: split_blocks(transformer),
        saves="the activations of the attention while a feed-forward goes backward",
        costs="twice the block inputs on the host",
        needs_checkpointing=True,
        needs_offloading=True,
        needs_all_weights=True,
    ),
    Strategy(
        name="block swap",
        flag="--resident_blocks",
        is_on=lambda options: options.resident_blocks is not None,
        apply=lambda transformer, options, device: _swap(transformer, options, device),
        saves="the frozen weights of all blocks but a few",
        costs="as much host memory, and copies of them in every pass, which run beside the computation",
        levers=(Lever({"resident_blocks": 2}, 1.1),),
        needs_checkpointing=True,
        needs_lora=True,
        needs_one_process=True,
    ),
    Strategy(
        name="optimizer in the backward pass",
        flag="--optimizer_in_backward",
        is_on=lambda options: options.optimizer_in_backward,
        apply=lambda transformer, options, device: None,  # it is how the optimizer is built
        saves="the gradients of all weights but one",
        costs="with clipping, both passes twice; gradients of accumulated batches are kept after all",
        levers=(Lever({"optimizer_in_backward": True}, 1.9),),  # with clipping, which takes a second pass
        needs_one_process=True,
        steps_in_backward=True,
    ),
)


def _quantize(transformer, options: MemoryOptions, device: torch.device) -> None:
    assert options.quantize_base is not None
    quantize_base(transformer, options.quantize_base, device)


def _swap(transformer, options: MemoryOptions, device: torch.device) -> None:
    assert options.resident_blocks is not None
    if options.resident_blocks < len(transformer.transformer_blocks):
        swap_blocks(transformer, options.resident_blocks, device)
    else:
        transformer.to(device)


def chosen(options: MemoryOptions) -> list[Strategy]:
    """The strategies that the options ask for, in the order in which they are applied."""
    return [strategy for strategy in STRATEGIES if strategy.is_on(options)]


def check_memory(options: Train, num_processes: int, *, has_scaler: bool) -> None:
    """Raises UserError where a strategy is asked for that cannot be applied. `has_scaler`: gradients are fp16."""
    method = options.method
    for strategy in chosen(options.memory):
        if strategy.flag is None:
            continue
        if strategy.needs_checkpointing and not options.memory.gradient_checkpointing:
            raise UserError(f"{strategy.flag}: needs the blocks to be checkpointed; add --gradient_checkpointing")
        if strategy.needs_offloading and not options.memory.offload_activations:
            raise UserError(f"{strategy.flag}: on the GPU it takes more than it saves; add --offload_activations")
        if strategy.needs_all_weights and options.memory.resident_blocks is not None:
            raise UserError(
                f"{strategy.flag}: not together with --resident_blocks {options.memory.resident_blocks}, which moves "
                "weights by whole blocks; leave one of the two out"
            )
        if strategy.needs_lora and method.training_type != "lora":
            raise UserError(
                f"{strategy.flag}: is for weights that are frozen, and --training_type {method.training_type} trains "
                "them; leave it out, or take --training_type lora"
            )
        if strategy.needs_one_process and num_processes > 1:
            raise UserError(f"{strategy.flag}: for one GPU only, and there are {num_processes} processes; leave it out")
        if strategy.steps_in_backward:
            _check_steps_in_backward(strategy.flag, options, has_scaler)
    if options.memory.quantize_base is not None:
        check_library(options.memory.quantize_base)


def _check_steps_in_backward(flag: str, options: Train, has_scaler: bool) -> None:
    """Raises UserError for what has to see all gradients of a step at once."""
    if options.optimizer.offload_gradients:
        logger.warning("--offload_gradients: without effect with %s, which drops gradients instead", flag)
    num_batches, limit = options.training.gradient_accumulation_steps, options.optimizer.max_grad_norm
    if num_batches > 1 and not options.optimizer.use_cpu_offload_optimizer:
        logger.warning(
            "%s: saves %s with --gradient_accumulation_steps %d, whose gradients are kept on the GPU; take 1 and a "
            "larger --train_batch_size, or add --use_cpu_offload_optimizer",
            *(flag, "nothing" if limit else "little", num_batches),
        )
    elif num_batches == 1 and limit:
        logger.info(
            "%s: clips to --max_grad_norm %g by running each step's forward and backward pass twice; --max_grad_norm 0 "
            "spares that",
            *(flag, limit),
        )
    if options.optimizer.optimizer == "prodigy":
        raise UserError(f"{flag}: prodigy finds one rate from all gradients together; take --optimizer adamw")
    if has_scaler:
        raise UserError(f"{flag}: not together with fp16, whose gradients are scaled; take --mixed_precision bf16")


def apply(transformer, options: MemoryOptions, device: torch.device):
    """The transformer on its device, with the strategies that the options ask for; it is changed in place.

    It comes with what it trains attached, all of it on the host, and with options that `check_memory` has passed.
    """
    for strategy in chosen(options):
        strategy.apply(transformer, options, device)
    # Swapped blocks have put it there already, and must not be moved.
    return transformer if options.resident_blocks is not None else transformer.to(device)

"""One or many processes: the Accelerator of a run, and what it makes of the model and the optimizer."""

from __future__ import annotations

import datetime

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, InitProcessGroupKwargs

from cogvideox_factory.config import Train, UserError
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.prepare import PATIENCE


def make_accelerator(options: Train, checkpoint: Checkpoint) -> Accelerator:
    """One object for one or many processes. Autocast is never on: the base model has one type throughout."""
    is_cpu = not torch.cuda.is_available()
    precision = options.training.mixed_precision
    if is_cpu and precision == "fp16":
        raise UserError("--mixed_precision fp16: needs a GPU; on a CPU take no or bf16")
    torch.backends.cuda.matmul.allow_tf32 = options.training.allow_tf32
    seconds = options.training.nccl_timeout
    timeout = PATIENCE if seconds is None else datetime.timedelta(seconds=seconds)
    weights_are_fp16 = not is_cpu and checkpoint.dtype_for(precision, torch.device("cuda")) == torch.float16
    return Accelerator(
        cpu=is_cpu,
        mixed_precision="fp16" if weights_are_fp16 else "no",  # fp16 gradients need a loss scaler, bf16 none
        kwargs_handlers=[AutocastKwargs(enabled=False), InitProcessGroupKwargs(timeout=timeout)],
    )


def wrap(accelerator: Accelerator, transformer, optimizer: torch.optim.Optimizer):
    """Model and optimizer as the engine wants them.

    Weights and the optimizer's state are where they belong already, which is not always the GPU; DeepSpeed wants no
    say in it.
    """
    placement = None if accelerator.distributed_type == DistributedType.DEEPSPEED else [False, False]
    return accelerator.prepare(transformer, optimizer, device_placement=placement)

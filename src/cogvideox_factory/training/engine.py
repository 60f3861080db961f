"""One or many processes: the Accelerator of a run, and what it makes of the model and the optimizer.

Which engine it is, plain processes (DDP) or DeepSpeed, is chosen outside, by the file that `accelerate launch` is
given. What the options of a run say (clipping, accumulation, precision) holds there too, whatever that file says.
"""

from __future__ import annotations

import datetime
import importlib.util
import logging
import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from cogvideox_factory.config import Train, UserError
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.prepare import PATIENCE
from cogvideox_factory.training.fsdp import DividedSteps
from cogvideox_factory.training.zero import ZeroSteps

logger = logging.getLogger(__name__)
DDP_FILE = "accelerate_configs/ddp.yaml"
ENGINES = {"ddp": "DDP", "zero2": "DeepSpeed", "zero3": "DeepSpeed", "fsdp2": "FSDP2"}  # and what they are called


def make_accelerator(options: Train, checkpoint: Checkpoint) -> Accelerator:
    """One object for one or many processes. Autocast is never on: the base model has one type throughout.

    Raises UserError for a precision that this machine or the engine does not have.
    """
    is_cpu = not torch.cuda.is_available()
    precision = options.training.mixed_precision
    if is_cpu and precision == "fp16":
        raise UserError("--mixed_precision fp16: needs a GPU; on a CPU take no or bf16")
    torch.backends.cuda.matmul.allow_tf32 = options.training.allow_tf32
    seconds = options.training.nccl_timeout
    timeout = PATIENCE if seconds is None else datetime.timedelta(seconds=seconds)
    dtype = checkpoint.dtype_for(precision, torch.device("cpu" if is_cpu else "cuda"))
    num_batches, backend = 1, "nccl"  # each loss has its share of a step already
    if asks_for_deepspeed():
        _check_deepspeed_can_run()
        num_batches = options.training.gradient_accumulation_steps  # DeepSpeed has to know
        if is_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            backend = "gloo"  # else accelerate finds it by itself
    accelerator = Accelerator(
        cpu=is_cpu and not asks_for_deepspeed(),  # accelerate leaves DeepSpeed out where a CPU is asked for
        mixed_precision=_precision_of_engine(dtype),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=num_batches),  # not that of a launcher
        kwargs_handlers=[
            AutocastKwargs(enabled=False),
            InitProcessGroupKwargs(backend=backend, timeout=timeout),
            # No buffer changes in training, and gradients need no second place beside the one that travels.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if is_deepspeed(accelerator):
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # or the text encoder, which one rank loads alone, would be divided as well
        _configure_deepspeed(accelerator, options)
    if not accelerator.is_main_process:  # what all of them would say is said once
        logging.getLogger("cogvideox_factory").setLevel(logging.WARNING)
    return accelerator


def asks_for_deepspeed() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def _check_deepspeed_can_run() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is asked for by the launcher, and is not installed; pip install deepspeed")
    if _is_set("ACCELERATE_USE_CPU"):  # accelerate would go on with plain processes
        raise UserError(
            "DeepSpeed is asked for, and ACCELERATE_USE_CPU or the launcher's --cpu rules it out; leave that out "
            "(without a GPU, DeepSpeed runs on the CPU by itself)"
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "t", "y")


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_fsdp(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def has_masters(accelerator: Accelerator) -> bool:
    """Whether the engine puts fp32 weights of its own, of which it keeps views, in the place of those that train."""
    return is_deepspeed(accelerator) or is_fsdp(accelerator)


def has_divided_weights(accelerator: Accelerator) -> bool:
    """Whether ranks divide the weights that compute among them, so that each forward pass takes all of them."""
    return is_fsdp(accelerator) or (is_deepspeed(accelerator) and accelerator.deepspeed_plugin.zero_stage == 3)


def first_rank_says(accelerator: Accelerator, flag: bool) -> bool:
    """The first rank's answer, on all of them: what is on the disk changes while the others look."""
    return broadcast_object_list([flag])[0] if accelerator.num_processes > 1 else flag


def check_engine(options: Train, accelerator: Accelerator) -> None:
    """Raises UserError for what cannot be done under the engine that the launcher has chosen."""
    engine = "ddp"
    if is_fsdp(accelerator):
        if not accelerator.is_fsdp2:
            raise UserError("fsdp_version 1: only 2; take accelerate_configs/fsdp2.yaml")
        engine = "fsdp2"
    elif is_deepspeed(accelerator):
        engine = f"zero{accelerator.deepspeed_plugin.zero_stage}"
    check_options_of_engine(options, engine)


def engine_of_launcher() -> str | None:
    """The engine that a launcher asks for, before any process waits for another; None where a file of DeepSpeed's own
    says it."""
    if asks_for_deepspeed():
        if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            return None
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "fsdp2" if _is_set("ACCELERATE_USE_FSDP") else "ddp"


def check_options_of_engine(options: Train, engine: str) -> None:
    """Raises UserError for what cannot be done under one of `ENGINES`, and for another engine."""
    if engine == "ddp":
        return
    if engine not in ENGINES:
        raise UserError(f"zero_stage {engine[-1]} of DeepSpeed: only 2 and 3; instead of 0 and 1 take {DDP_FILE}")
    name = ENGINES[engine]
    has_divided = engine in ("zero3", "fsdp2")
    optimizer, memory = options.optimizer, options.memory
    keeps_masters = "it keeps fp32 weights and states itself, divided among the ranks"
    offloads = "it has that itself, as accelerate_configs/deepspeed_zero3_offload.yaml shows"
    has_dora = options.method.training_type == "lora" and options.lora.use_dora
    for is_given, flag, why in (
        (optimizer.optimizer not in ("adam", "adamw"), f"--optimizer {optimizer.optimizer}", "take adamw"),
        (optimizer.use_8bit, "--use_8bit", keeps_masters),
        (optimizer.use_4bit, "--use_4bit", keeps_masters),
        (optimizer.use_fp8, "--use_fp8", keeps_masters),
        (optimizer.trainable_dtype == "bf16", "--trainable_dtype bf16", keeps_masters),
        (optimizer.use_cpu_offload_optimizer, "--use_cpu_offload_optimizer", offloads),
        (memory.optimizer_in_backward, "--optimizer_in_backward", "it takes the steps itself"),
        (memory.resident_blocks is not None, "--resident_blocks", "it places weights itself; ZeRO-3 offloads them"),
        (memory.quantize_base is not None, "--quantize_base", "it would convert the scales of the weights to bf16"),
        (has_dora, "--use_dora", "it would convert the norms of DoRA to bf16"),
        (
            has_divided and options.method.ema_decay is not None,
            "--ema_decay",
            "the weights are divided among the ranks; ZeRO-2 divides none",
        ),
        (engine == "fsdp2" and memory.offload_activations, "--offload_activations", "it moves blocks by itself"),
    ):
        if is_given:
            raise UserError(f"{flag}: not together with {name} ({why}); leave it out, or take {DDP_FILE}")


def wrap(accelerator: Accelerator, transformer, optimizer: torch.optim.Optimizer):
    """Model and optimizer as the engine wants them.

    Weights and the optimizer's state are where they belong already, which is not always the GPU; DeepSpeed wants no
    say in it.
    """
    if not has_masters(accelerator):
        return accelerator.prepare(transformer, optimizer, device_placement=[False, False])
    if is_fsdp(accelerator):
        return _divide(accelerator, transformer, optimizer)
    parameters = list(optimizer.param_groups[0]["params"])  # DeepSpeed puts its own in their place
    weights = [parameter.detach().clone() for parameter in parameters if parameter.dtype == torch.float32]
    model, _ = accelerator.prepare(transformer, optimizer)
    steps = ZeroSteps(model, parameters)
    if weights and parameters[0].dtype != torch.float32:  # a LoRA has been rounded to bf16, and need not be
        for parameter, weight in zip(parameters, weights, strict=True):
            steps.set_held_weight(parameter, weight)
    return model, steps


def _divide(accelerator: Accelerator, transformer, optimizer: torch.optim.Optimizer):
    """With FSDP2. Trained weights are fp32, and gathered in the type that the model computes in."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing is changed in place
    dtype = next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # positions stay fp32
    )
    model, wrapped = accelerator.prepare(transformer, optimizer)
    return model, DividedSteps(wrapped.optimizer)


def backward(accelerator: Accelerator, model, loss: torch.Tensor, *, is_last: bool) -> None:
    """Add a batch's gradients to those of the step. `loss` is this rank's part of the step's loss.

    Engines average gradients over ranks, which makes a sum of parts too small by the number of ranks.
    """
    loss = loss * accelerator.num_processes
    if is_deepspeed(accelerator):
        accelerator.sync_gradients = is_last  # with it, DeepSpeed clips and steps
        accelerator.backward(loss * accelerator.gradient_accumulation_steps)  # by which DeepSpeed divides
    else:
        accelerator.backward(loss)


def check_precision_of_engine(dtype: torch.dtype, engine: str | None) -> None:
    """Raises UserError for fp16 where an engine steps weights of its own, which would not know of the loss scaler."""
    if dtype == torch.float16 and engine != "ddp":
        name = ENGINES.get(engine or "", "DeepSpeed")
        raise UserError(f"--mixed_precision fp16: not together with {name} here; take --mixed_precision bf16")


def _precision_of_engine(dtype: torch.dtype) -> str:
    """fp16 gradients need a loss scaler, bf16 none. DeepSpeed is to know of bf16, whose weights get masters there."""
    check_precision_of_engine(dtype, engine_of_launcher())
    is_bf16 = dtype == torch.bfloat16 and asks_for_deepspeed()
    return "bf16" if is_bf16 else "fp16" if dtype == torch.float16 else "no"


def _configure_deepspeed(accelerator: Accelerator, options: Train) -> None:
    """What the options say stands in DeepSpeed's settings, instead of what a file says."""
    plugin = accelerator.deepspeed_plugin
    settings = plugin.deepspeed_config
    limit = float(options.optimizer.max_grad_norm or 0)
    others = settings.get("gradient_clipping")
    if others not in (None, "auto", limit):
        logger.warning("gradient_clipping %s of the engine's settings: --max_grad_norm %g holds", others, limit)
    settings["gradient_clipping"] = limit
    settings["gradient_accumulation_steps"] = options.training.gradient_accumulation_steps
    settings["train_micro_batch_size_per_gpu"] = options.training.train_batch_size
    settings["train_batch_size"] = "auto"
    # A mean of bf16 gradients over many ranks, made in bf16, would be of 8 bits.
    settings.setdefault("communication_data_type", "fp32")
    settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    settings["bf16"]["check_grad_overflow"] = True  # leave a step out whose gradients are not numbers

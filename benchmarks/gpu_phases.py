"""Runs the phases of a training with random weights at real size, and reads the memory that each takes.

All but the weights and the clips is what `train` runs. Models are made on their device tensor by tensor, so that
nothing is downloaded and no disk holds 22 GB; making them is not measured. A phase that begins with models on the
host, as they come from a disk, has them there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_rows import Row, opened

from cogvideox_factory.config import Plan
from cogvideox_factory.memory.text_encoder import place_text_encoder
from cogvideox_factory.memory.tracker import MemoryTracker
from cogvideox_factory.model.adapters import attach, trainable_parameters
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler
from cogvideox_factory.model.device import free_memory
from cogvideox_factory.model.encoders import TextEncoder, VideoEncoder
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.planning.fakes import as_on_cuda, build
from cogvideox_factory.planning.phases import (
    FakeTokenizer,
    encoders_dtype,
    fake_step,
    largest_bucket,
    load_text_encoder,
    load_transformer,
    make_video,
    training_dtype,
)
from cogvideox_factory.sampling import pipeline_in_memory, place
from cogvideox_factory.training.engine import make_accelerator, wrap
from cogvideox_factory.training.loop import build_model, held_between_steps, optimizer_step
from cogvideox_factory.training.optimizers import build_optimizer
from cogvideox_factory.training.validation import waiting

GIB = 1024**3
CPU = torch.device("cpu")


class CudaMeter:
    """torch's counters of a GPU, which is limited to what a smaller card would have."""

    kind = "torch.cuda"
    device = torch.device("cuda")  # without a number, as accelerate gives it

    def __init__(self, card: float | None):
        self.stages: Any = SimpleNamespace(start_stage=lambda name: None)  # what a tracker is told
        if card is not None:
            free, total = torch.cuda.mem_get_info()  # what is in use is this process's context, if it is alone
            share = (card * GIB - (total - free)) / total
            torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0))

    def counting(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def start(self) -> None:
        """Peaks are from here on."""
        torch.cuda.synchronize()
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        if hasattr(torch.cuda, "reset_peak_host_memory_stats"):
            torch.cuda.reset_peak_host_memory_stats()
        with contextlib.suppress(OSError):  # the highest resident memory starts anew; where it cannot, it is of all
            Path("/proc/self/clear_refs").write_text("5")

    def current(self) -> float:
        return torch.cuda.memory_allocated() / GIB

    def read(self) -> dict[str, float]:
        """GiB: `outside` is what the card holds beside the allocator's memory, `pinned` is rounded up as torch does."""
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        stats = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
        lines = Path("/proc/self/status").read_text().splitlines()
        of_all = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # where the kernel tells no other
        resident = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), of_all)
        figures = {
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "outside": total - free - torch.cuda.memory_reserved(),
            "host": resident * 1024,
            "pinned": stats.get("allocated_bytes.peak", 0),
        }
        return {name: round(value / GIB, 3) for name, value in figures.items()}


class TinyMeter:
    """Tensors on a CPU, where host and device are one."""

    kind = "tensors on a CPU"
    device = CPU

    def __init__(self) -> None:
        self._tracker = MemoryTracker(CPU)
        self.stages: Any = self._tracker

    def counting(self) -> contextlib.AbstractContextManager[Any]:
        return self._tracker

    def start(self) -> None:
        gc.collect()
        self._tracker.start_phase()

    def current(self) -> float:
        return self._tracker.current / GIB

    def read(self) -> dict[str, float]:
        return {"peak": self._tracker.peak / GIB}


Meter = CudaMeter | TinyMeter


def with_random_weights(make: Callable[[], Any], where: torch.device, drawn_on: torch.device) -> Any:
    """A model on a device, which no disk and, tensor by tensor, no other device has held whole."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device=where)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.dim() < 2:  # of norms and biases, so that numbers stay in their range
                value.fill_(1 if name.endswith("weight") else 0)
            else:
                value.copy_(torch.randn(value.shape, dtype=value.dtype, device=drawn_on).mul_(0.02))
    return model


def random_vae(checkpoint: Checkpoint, dtype: torch.dtype, meter: Meter) -> Any:
    from diffusers import AutoencoderKLCogVideoX

    def make() -> Any:
        return build(lambda: AutoencoderKLCogVideoX.from_config(dict(checkpoint.vae)), dtype)

    return with_random_weights(make, CPU, meter.device)


def measure_preparing(options: Plan, checkpoint: Checkpoint, meter: Meter) -> dict[str, float]:
    """A caption through T5, then a clip through the VAE."""
    from diffusers import CogVideoXPipeline

    dtype = encoders_dtype(options, checkpoint)
    text_encoder = with_random_weights(lambda: load_text_encoder(checkpoint, dtype), CPU, meter.device)
    meter.start()
    place_text_encoder(text_encoder, options.encoding, meter.device)
    pipeline = CogVideoXPipeline(FakeTokenizer(), text_encoder, vae=None, transformer=None, scheduler=None)
    TextEncoder(pipeline, checkpoint.max_text_tokens, meter.device).encode("")
    of_text = meter.read()
    del pipeline, text_encoder
    encoder = VideoEncoder.of(random_vae(checkpoint, dtype, meter), checkpoint, use_tiling=options.encoding.use_tiling)
    meter.start()
    encoder.vae.to(meter.device)
    encoder.encode_tensor(torch.randint(256, (*largest_bucket(options), 3), dtype=torch.uint8, device=meter.device))
    return {name: max(value, of_text[name]) for name, value in meter.read().items()}


def as_original(options: Plan, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, load: Any) -> Any:
    """The model as the original steps it: a 16-bit base, a fp32 LoRA, CUDA's autocast, stock checkpoints."""
    transformer = load(checkpoint, dtype)
    attach(transformer, options.method, options.lora, options.seed)
    if options.memory.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.forward = torch.autocast(device.type, dtype=dtype)(transformer.forward)
    return transformer.to(device)


def measure_training(
    row: Row, options: Plan, checkpoint: Checkpoint, meter: Meter, num_steps: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Steps of the loop, then a video beside all that they keep."""
    dtype = training_dtype(options, checkpoint)
    on_host = options.memory.resident_blocks is not None or options.memory.quantize_base is not None

    def load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
        where = CPU if on_host else meter.device
        transformer = with_random_weights(lambda: load_transformer(checkpoint, dtype), where, meter.device)
        meter.start()
        return transformer

    accelerator = make_accelerator(options, checkpoint)
    make = as_original if row.is_original else build_model
    transformer = make(options, checkpoint, dtype, meter.device, load=load)
    parameters = list(trainable_parameters(transformer).values())
    raw_optimizer = build_optimizer(
        parameters,
        options.optimizer,
        options.training.train_batch_size,
        in_backward=options.memory.optimizer_in_backward,
    )
    if isinstance(meter, TinyMeter):
        as_on_cuda(raw_optimizer)
    counts = {
        "parameters": sum(value.numel() for value in transformer.parameters()),
        "trained": sum(value.numel() for value in parameters),
        "tokens": 0,
    }

    transformer.transformer_blocks[-1].attn1.register_forward_pre_hook(
        lambda _, args, given: counts.update(
            tokens=given["hidden_states"].shape[1] + given["encoder_hidden_states"].shape[1]
        ),
        with_kwargs=True,
    )
    transformer.train()
    model, optimizer = wrap(accelerator, transformer, raw_optimizer)
    scheduler, denoiser = load_scheduler(checkpoint), Denoiser(checkpoint, dtype)
    before, seconds, losses = meter.current(), [], []
    for _ in range(num_steps):
        step = fake_step(options, checkpoint)
        for batch in step.batches:
            batch.timestep_quantiles.uniform_()
            for tensor in (batch.raw_latents, batch.noise, batch.prompt_embeds, batch.raw_image_latents):
                if tensor is not None:
                    tensor.normal_()
        started = time.perf_counter()
        loss = optimizer_step(step, accelerator, model, optimizer, denoiser, scheduler, parameters, options).loss
        seconds.append(time.perf_counter() - started)  # the loss has been waited for, and with it all of the step
        losses.append(loss)
    times = {"first_step": round(seconds[0], 3), "step": round(statistics.median(seconds[1:] or seconds), 3)}
    yield "training", {**meter.read(), "before": before, "seconds": times, "losses": losses, **counts}
    if "validation" in row.phases:
        held = held_between_steps(raw_optimizer, None)
        yield "validation", measure_validation(options, checkpoint, transformer, scheduler, held, meter)
    accelerator.free_memory()


def measure_validation(
    options: Plan, checkpoint: Checkpoint, transformer: Any, scheduler: Any, held: list[torch.Tensor], meter: Meter
) -> dict[str, float]:
    """A video beside all that the training keeps: one step of its denoising, and the decoding."""
    dtype = training_dtype(options, checkpoint)
    meter.start()
    transformer.eval()
    with waiting(options, transformer, held, meter.device) as while_decoding:
        pipeline = pipeline_in_memory(
            *(checkpoint, transformer, scheduler, options.sampling, dtype, meter.device),
            load=functools.partial(random_vae, meter=meter),
            while_decoding=while_decoding,
        )
        shape = (1, checkpoint.max_text_tokens, checkpoint.transformer["text_embed_dim"])
        embeds = torch.randn(shape, dtype=dtype, device=meter.device)
        make_video(pipeline, options, checkpoint, meter.stages, prompt_embeds=embeds, negative_prompt_embeds=embeds)
        pipeline.vae = None
    return meter.read()


def measure_testing(options: Plan, checkpoint: Checkpoint, meter: Meter) -> dict[str, float]:
    """A video by the whole stock pipeline, which comes from the disk to the host."""
    dtype = training_dtype(options, checkpoint)
    transformer, text_encoder = (
        with_random_weights(functools.partial(load, checkpoint, dtype), CPU, meter.device)
        for load in (load_transformer, load_text_encoder)
    )
    if options.method.training_type == "lora":
        attach(transformer, options.method, options.lora, options.seed)
        for parameter in trainable_parameters(transformer).values():
            parameter.data = parameter.data.to(dtype)  # as diffusers loads it
    pipeline = checkpoint.pipeline_class(
        tokenizer=FakeTokenizer(),
        text_encoder=text_encoder,
        vae=random_vae(checkpoint, dtype, meter),
        transformer=transformer,
        scheduler=load_scheduler(checkpoint),
    )
    del transformer, text_encoder
    meter.start()
    prompts = place(
        *(pipeline, checkpoint, options.sampling, meter.device),
        blocks=options.memory,
        text_encoder=options.encoding,
        prompts=[""],
        max_sequence_length=checkpoint.max_text_tokens,
    )
    make_video(pipeline, options, checkpoint, meter.stages, **prompts[""])
    return meter.read()


def measure_row(row: Row, meter: Meter, num_steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Phase by phase; what one has made is gone before the next."""
    with opened(row, isinstance(meter, TinyMeter)) as (options, checkpoint), meter.counting():
        if "preparing" in row.phases:
            yield "preparing", measure_preparing(options, checkpoint, meter)
            free_memory()
        if {"training", "validation"} & set(row.phases):
            yield from measure_training(row, options, checkpoint, meter, num_steps)
            free_memory()
        if "testing" in row.phases:
            yield "testing", measure_testing(options, checkpoint, meter)

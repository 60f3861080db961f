"""Traces each phase of a run on fake tensors: the program's own code, and what lives on the GPU while it runs.

`preparing` encodes a caption, then a clip. `training` is the loop's step once the optimizer has its states.
`validation` makes a video beside all that the training holds. `testing` makes one from what was saved.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import DistributedType

from cogvideox_factory.config import Plan, SamplingOptions, Train
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.loader import Batch, StepBatches
from cogvideox_factory.data.sampler import Position
from cogvideox_factory.memory.text_encoder import place_text_encoder
from cogvideox_factory.memory.tracker import MemoryTracker, Moment
from cogvideox_factory.model.adapters import attach, is_lora, trainable_parameters
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler, round_positions
from cogvideox_factory.model.encoders import TextEncoder, VideoEncoder
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.planning import low_bit
from cogvideox_factory.planning.depth import Stages, mark_stages
from cogvideox_factory.planning.engines import Weights
from cogvideox_factory.planning.fakes import GPU, HOST, FakeTracker, as_on_cuda, build
from cogvideox_factory.planning.repeats import Calls, remember_blocks, remember_calls
from cogvideox_factory.sampling import pipeline_in_memory, place
from cogvideox_factory.training.ema import WeightAverage, averaged, build_average
from cogvideox_factory.training.fp32_steps import held_weights
from cogvideox_factory.training.loop import build_model, held_between_steps, optimizer_step
from cogvideox_factory.training.optimizers import build_optimizer
from cogvideox_factory.training.start_images import first_frame_decoder
from cogvideox_factory.training.validation import waiting

HELD = "held before the first step", 0  # a stage of the training


@dataclass(frozen=True)
class Phase:
    """What a phase holds at the highest moment of each of its stages."""

    name: str
    stages: Stages

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes on the GPU by what they are for, at the highest moment of all."""
        return max(self.stages.values(), key=lambda stage: stage.peak).parts

    @property
    def peak(self) -> int:
        """Bytes on the GPU."""
        return sum(self.parts.values())

    @property
    def host(self) -> int:
        """Most bytes of tensors on the host, at any moment."""
        return max(stage.host for stage in self.stages.values())

    @classmethod
    def of(cls, name: str, tracker: MemoryTracker) -> Phase:
        return cls(name, tracker.stages)


def largest_bucket(options: Train) -> Bucket:
    """The one whose clips have the most pixels."""
    data = options.data
    return Bucket(max(data.frame_buckets), max(data.height_buckets), max(data.width_buckets))


def training_dtype(options: Train, checkpoint: Checkpoint) -> torch.dtype:
    """The transformer's type on a GPU."""
    return checkpoint.dtype_for(options.training.mixed_precision, torch.device("cuda"))


def encoders_dtype(options: Plan, checkpoint: Checkpoint) -> torch.dtype:
    """The type of T5 and of the encoding VAE on a GPU."""
    return checkpoint.dtype_for(options.encoding.dtype, torch.device("cuda"))


def trace_text(options: Plan, checkpoint: Checkpoint) -> Phase:
    """A caption through T5."""
    with _phase() as tracker:
        dtype = encoders_dtype(options, checkpoint)
        text_encoder = load_text_encoder(checkpoint, dtype)
        with tracker.part("weights"):
            place_text_encoder(text_encoder, options.encoding, GPU)
        tracker.add(_tensors(text_encoder), "weights")
        remember_blocks(text_encoder.encoder.block, tracker)
        tokens = options.encoding.max_sequence_length or checkpoint.max_text_tokens
        pipeline = _text_pipeline(text_encoder)
        tracker.start_phase()
        TextEncoder(pipeline, tokens, GPU).encode("")
        return Phase.of("preparing", tracker)


def trace_encoding(options: Plan, checkpoint: Checkpoint) -> Phase:
    """A clip of the largest bucket through the VAE."""
    with _phase() as tracker:
        vae = load_vae(checkpoint, encoders_dtype(options, checkpoint))
        encoder = VideoEncoder.of(vae, checkpoint, use_tiling=options.encoding.use_tiling)
        vae.to(GPU)
        tracker.add(_tensors(vae), "weights")
        remember_calls(vae.encoder, tracker)
        tracker.start_phase()
        encoder.encode_tensor(torch.empty((*largest_bucket(options), 3), dtype=torch.uint8, device=GPU))
        return Phase.of("preparing", tracker)


def trace_first_frame(options: Plan, checkpoint: Checkpoint) -> Phase:
    """The picture that an image-to-video model's video starts from, decoded from the latents of a clip."""
    with _phase() as tracker:
        vae = first_frame_decoder(
            *(checkpoint, encoders_dtype(options, checkpoint)), use_tiling=options.encoding.use_tiling, load=load_vae
        ).to(GPU)
        tracker.add(_tensors(vae), "weights")
        tracker.start_phase()
        _, height, width = largest_bucket(options)
        size = (height // checkpoint.spatial_factor, width // checkpoint.spatial_factor)
        latents = torch.empty(1, checkpoint.vae["latent_channels"], 1, *size, dtype=vae.dtype, device=GPU)
        with torch.no_grad():
            vae.decode(latents)
        return Phase.of("preparing", tracker)


def trace_held(options: Plan, checkpoint: Checkpoint) -> Phase:
    """What a training holds between two steps: a bound from below of its peak, in a fraction of the time."""
    with _phase() as tracker:
        with tracker.part("weights"):
            transformer = build_model(
                options, checkpoint, training_dtype(options, checkpoint), GPU, load=load_transformer
            )
        _training = begin_training(options, checkpoint, transformer, tracker)  # named, as it would be gone else
        tracker.start_phase()
        return Phase.of("held", tracker)


def trace_training(options: Plan, checkpoint: Checkpoint) -> Phase:
    """The training step."""
    dtype = training_dtype(options, checkpoint)
    with _phase() as tracker:
        with tracker.part("weights"):
            transformer = build_model(options, checkpoint, dtype, GPU, load=load_transformer)
        return trace_steps(options, checkpoint, transformer, dtype, tracker).phase


def engine_holds(options: Plan) -> bool:
    """Whether an engine has views of what is trained, so that it cannot wait elsewhere while a video is decoded."""
    return options.num_processes > 1 and options.engine != "ddp"


def trace_validation(options: Plan, checkpoint: Checkpoint, decodings: Calls | None = None) -> Phase:
    """A video made beside what the training holds. `decodings` are remembered calls of the VAE's decoder."""
    dtype = training_dtype(options, checkpoint)
    with _phase() as tracker:
        with tracker.part("weights"):
            transformer = build_model(options, checkpoint, dtype, GPU, load=load_transformer)
        training = begin_training(options, checkpoint, transformer, tracker)
        tracker.start_phase()
        held = None if engine_holds(options) else held_between_steps(training.optimizer, training.average)
        with averaged(training.average), waiting(options, transformer, held, GPU) as while_decoding:
            pipeline = pipeline_in_memory(
                *(checkpoint, transformer, training.scheduler, options.sampling, dtype, GPU),
                load=load_vae,
                while_decoding=while_decoding,
            )
            tracker.add(_tensors(pipeline.vae), "weights")
            remember_calls(pipeline.vae.decoder, tracker, decodings)
            remember_blocks(transformer.transformer_blocks, tracker)
            embeds = torch.empty(_embeds_shape(options, checkpoint), dtype=dtype, device=GPU)
            make_video(pipeline, options, checkpoint, tracker, prompt_embeds=embeds, negative_prompt_embeds=embeds)
            pipeline.vae = None
        return Phase.of("validation", tracker)


def count_weights(options: Plan, checkpoint: Checkpoint) -> Weights:
    """The transformer's, with what is trained attached."""
    transformer = load_transformer(checkpoint, training_dtype(options, checkpoint))
    keeps_bf16 = options.optimizer.trainable_dtype == "bf16"
    attach(transformer, options.method, options.lora, options.seed, keeps_bf16=keeps_bf16)
    trained = trainable_parameters(transformer).values()
    blocks = transformer.transformer_blocks
    count, whole, in_blocks = (
        sum(one.numel() for one in some) for some in (trained, transformer.parameters(), blocks.parameters())
    )
    return Weights(
        count=whole,
        trained=count,
        trained_bytes=sum(parameter.nbytes for parameter in trained),
        part="adapter" if is_lora(transformer) else "weights",
        gathered=whole - in_blocks + 2 * in_blocks // len(blocks),
        average=0 if options.method.ema_decay is None else 4 * count,
    )


@dataclass(frozen=True)
class Training:
    """What a training holds between two steps."""

    phase: Phase
    trained: list[torch.nn.Parameter]
    scheduler: Any
    average: Any
    optimizer: torch.optim.Optimizer


def begin_training(options: Plan, checkpoint: Checkpoint, transformer, tracker: MemoryTracker) -> Training:
    """A training whose optimizer has its states; `tracker` is entered, `transformer` is built."""
    trained = trainable_parameters(transformer)
    tracker.add(_tensors(transformer), "weights")
    tracker.add(trained.values(), "adapter" if is_lora(transformer) else "weights")
    for parameter in trained.values():
        parameter.register_post_accumulate_grad_hook(lambda parameter: _tell_gradient(parameter, tracker))
    with tracker.part("optimizer"):
        average = build_average(trained, options.method.ema_decay)
        optimizer = build_optimizer(
            trained.values(),
            options.optimizer,
            1,
            in_backward=options.memory.optimizer_in_backward,
            class_of=low_bit.class_of,
        )
    as_on_cuda(optimizer)
    stepping = _Stepping(optimizer, tracker)
    scheduler = load_scheduler(checkpoint)
    transformer.train()
    held = Moment(dict(tracker.parts), tracker.host_peak)  # the host's as the model was loaded
    mark_stages(transformer, tracker)

    # States come with the first step. This one has gradients and no batch, which would only cost time.
    sum(parameter.sum() for parameter in trained.values()).backward()  # type: ignore[union-attr]
    stepping.step()
    stepping.zero_grad()
    tracker.add(_states(optimizer), "optimizer")
    gc.collect()
    if is_lora(transformer):  # of a checkpoint that is written while steps go on
        tracker.host += _saved_bytes(trained, optimizer, average)
    return Training(Phase("training", {HELD: held}), list(trained.values()), scheduler, average, optimizer)


def trace_steps(
    options: Plan, checkpoint: Checkpoint, transformer, dtype: torch.dtype, tracker: MemoryTracker
) -> Training:
    """The loop's step with the optimizer's states in place; `tracker` is entered, `transformer` is built."""
    training = begin_training(options, checkpoint, transformer, tracker)
    tracker.start_phase()
    optimizer_step(
        fake_step(options, checkpoint),
        OneProcess(tracker.device),
        transformer,
        _Stepping(training.optimizer, tracker),
        Denoiser(checkpoint, dtype),
        training.scheduler,
        training.trained,
        options,
    )
    return replace(training, phase=Phase("training", {**training.phase.stages, **tracker.stages}))


def trace_testing(options: Plan, checkpoint: Checkpoint, decodings: Calls | None = None) -> Phase:
    """A video by the whole stock pipeline, as it is loaded from what the training saved.

    `decodings` are remembered calls of the VAE's decoder.
    """
    with _phase() as tracker:
        dtype = training_dtype(options, checkpoint)
        transformer = load_transformer(checkpoint, dtype)
        if options.method.training_type == "lora":
            attach(transformer, options.method, options.lora, options.seed)
            for parameter in trainable_parameters(transformer).values():
                parameter.data = parameter.data.to(dtype)
        pipeline = checkpoint.pipeline_class(
            tokenizer=FakeTokenizer(),
            text_encoder=load_text_encoder(checkpoint, dtype),
            vae=load_vae(checkpoint, dtype),
            transformer=transformer,
            scheduler=load_scheduler(checkpoint),
        )
        remember_calls(pipeline.vae.decoder, tracker, decodings)
        remember_blocks(pipeline.text_encoder.encoder.block, tracker)
        remember_blocks(pipeline.transformer.transformer_blocks, tracker)
        _mark_text(pipeline.text_encoder, tracker)
        tracker.start_phase()
        with tracker.part("weights"):
            prompts = place(
                *(pipeline, checkpoint, options.sampling, GPU),
                blocks=options.memory,
                text_encoder=options.encoding,
                prompts=[""],
                max_sequence_length=options.encoding.max_sequence_length or checkpoint.max_text_tokens,
            )
        mark_stages(pipeline.transformer, tracker)
        make_video(pipeline, options, checkpoint, tracker, **prompts[""])
        return Phase.of("testing", tracker)


def make_video(pipeline, options: Plan, checkpoint: Checkpoint, tracker: MemoryTracker, **prompt: Any) -> None:
    """As `sampling.generate`, to the point where the video leaves the GPU."""
    sampling: SamplingOptions = options.sampling
    assert sampling.height is not None and sampling.width is not None
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: tracker.start_stage("decoding"))
    if checkpoint.is_image_to_video:
        prompt["image"] = torch.empty((1, 3, sampling.height, sampling.width), device=HOST)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        **prompt,
        height=sampling.height,
        width=sampling.width,
        num_frames=sampling.num_frames,
        num_inference_steps=2,
        callback_on_step_end=_skip_other_steps,
        guidance_scale=sampling.guidance_scale,
        use_dynamic_cfg=sampling.use_dynamic_cfg,
        generator=torch.Generator(),
        output_type="pt",
        max_sequence_length=options.encoding.max_sequence_length or checkpoint.max_text_tokens,
    )


def _skip_other_steps(pipeline, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """They are like the first, but for a few MB of latents that some schedules keep from step to step."""
    pipeline._interrupt = True
    return values


def fake_step(options: Plan, checkpoint: Checkpoint) -> StepBatches:
    """A step's batches of the largest bucket, in the host's memory; a third batch would be like the second."""
    frames, height, width = largest_bucket(options)
    channels = checkpoint.vae["latent_channels"]
    size = (channels, height // checkpoint.spatial_factor, width // checkpoint.spatial_factor)
    latent_frames = (frames - 1) // checkpoint.temporal_factor + 1
    padded = math.ceil(latent_frames / checkpoint.latent_frame_multiple) * checkpoint.latent_frame_multiple
    clips = options.training.train_batch_size
    count = min(options.training.gradient_accumulation_steps, 2)
    batches = [
        Batch(
            raw_latents=torch.zeros(clips, latent_frames, *size),
            noise=torch.zeros(clips, padded, *size),
            timestep_quantiles=torch.zeros(clips),
            prompt_embeds=torch.zeros(
                (clips, *_embeds_shape(options, checkpoint)[1:]), dtype=encoders_dtype(options, checkpoint)
            ),
            share=1 / count,
            raw_image_latents=torch.zeros(clips, *size) if checkpoint.is_image_to_video else None,
        )
        for _ in range(count)
    ]
    return StepBatches(Position(), batches, clips * count)


def _embeds_shape(options: Plan, checkpoint: Checkpoint) -> tuple[int, int, int]:
    tokens = options.encoding.max_sequence_length or checkpoint.max_text_tokens
    return 1, tokens, checkpoint.transformer["text_embed_dim"]


class OneProcess:
    """What the loop's step asks of an accelerator, for one process and no engine."""

    num_processes = 1
    distributed_type = DistributedType.NO
    scaler = None
    distributed_type = DistributedType.NO

    def __init__(self, device: torch.device):
        self.device = device

    def no_sync(self, model) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)


class _Stepping:
    """An optimizer whose new tensors are counted as its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, tracker: MemoryTracker):
        self.optimizer = optimizer
        self.tracker = tracker

    def step(self) -> None:
        self.tracker.start_stage("update")
        with self.tracker.part("optimizer"):
            self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class FakeTokenizer:
    """A caption as long as the model takes, or of one token."""

    def __call__(self, prompt: str | list[str], max_length: int = 1, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.zeros(1, max_length, dtype=torch.int64))


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype):
    """The transformer of a checkpoint, without content."""
    from diffusers import CogVideoXTransformer3DModel

    transformer = build(lambda: CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer)), dtype)
    round_positions(transformer, dtype)
    return transformer


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype):
    """The VAE of a checkpoint, without content."""
    from diffusers import AutoencoderKLCogVideoX

    vae = build(lambda: AutoencoderKLCogVideoX.from_config(dict(checkpoint.vae)), dtype)
    # Tiles are blended in place, a row or column of pixels at a time: thousands of operations, of a few KB each.
    vae.blend_v = vae.blend_h = lambda first, second, extent: second
    return vae


def load_text_encoder(checkpoint: Checkpoint, dtype: torch.dtype):
    """The text encoder of a checkpoint, without content."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config.from_pretrained(checkpoint.folder, subfolder="text_encoder")
    text_encoder = build(lambda: T5EncoderModel(config), dtype)
    if dtype == torch.float16:  # where `from_pretrained` keeps some layers in fp32
        for name, module in text_encoder.named_modules():
            if name.rpartition(".")[2] in (text_encoder._keep_in_fp32_modules or ()):
                module.float()
    return text_encoder


def _text_pipeline(text_encoder):
    from diffusers import CogVideoXPipeline

    return CogVideoXPipeline(FakeTokenizer(), text_encoder, vae=None, transformer=None, scheduler=None)


@contextlib.contextmanager
def _phase() -> Iterator[FakeTracker]:
    """A tracker that is entered; what earlier phases left in cycles is gone."""
    gc.collect()
    with FakeTracker() as tracker:
        yield tracker
    gc.collect()


def _mark_text(text_encoder: torch.nn.Module, tracker: FakeTracker) -> None:
    """Its work is a stage of its own, in which activations come to be, also where weights are placed around it."""
    forward = text_encoder.forward

    def marked(*args: Any, **kwargs: Any) -> Any:
        tracker.start_stage("text")
        with tracker.part("activations"):
            output = forward(*args, **kwargs)
        tracker.start_stage("after the text")
        return output

    text_encoder.forward = marked


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _saved_bytes(
    trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, average: WeightAverage | None
) -> int:
    """What `Snapshot.num_bytes` gives of a LoRA: weights, states, the average, and once more as others load it."""
    weights = list(held_weights(optimizer, trained).values())
    saved = [*weights, *_states(optimizer), *(average.tensors() if average else ())]
    return sum(tensor.numel() * tensor.element_size() for tensor in saved) + 4 * sum(map(torch.numel, weights))


def _tell_gradient(parameter: torch.Tensor, tracker: MemoryTracker) -> None:
    if parameter.grad is not None:
        tracker.add([parameter.grad], "gradients")


def _states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]

"""Every option, declared once, with its help text, its check and its YAML name.

The dataclasses below are the command line: `command_line.py` turns each field into a flag of the same name, in the
group of its class, and the string under a field into its help. The same names are the keys of a YAML file given with
``--config``. A command is a class that lists the groups it needs, so no option is declared twice.

Rejected: argparse declarations beside a dataclass (each option then stands in three places), and a dictionary of
settings passed around whole (a function here receives the group that it reads, so that its signature says so).

This module imports nothing heavy: ``--help`` must answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import docstring_parser
import tyro
import yaml

from cogvideox_factory import __version__
from cogvideox_factory.redaction import remember_token, without_secrets


class UserError(Exception):
    """What the user asked for cannot be done as asked: one message that names the value and the fix, exit code 2."""


class RunError(Exception):
    """Something failed on the way that is no fault of the options: one message that names it, exit code 1."""


@dataclass(frozen=True)
class AtLeast:
    """Check of a number, or of each number in a list: no less than `minimum`."""

    minimum: float

    def complaint(self, value: float) -> str | None:
        return None if self.minimum <= value < math.inf else f"must be {self.minimum:g} or more"


@dataclass(frozen=True)
class MoreThan:
    """Check of a number: strictly more than `bound`."""

    bound: float

    def complaint(self, value: float) -> str | None:
        return None if self.bound < value < math.inf else f"must be more than {self.bound:g} and finite"


@dataclass(frozen=True)
class Within:
    """Check of a number: from `low` to `high`, both included unless it says otherwise."""

    low: float
    high: float
    includes_high: bool = True

    def complaint(self, value: float) -> str | None:
        if self.low <= value < self.high or (self.includes_high and value == self.high):
            return None
        return f"must be from {self.low:g} to {'' if self.includes_high else 'below '}{self.high:g}"


@dataclass(frozen=True)
class NotEmpty:
    """Check of a text."""

    def complaint(self, value: str) -> str | None:
        return None if value else "must not be empty"


class Secret:
    """A text that must not be written down: only `reveal` gives it, and neither YAML nor JSON takes the object."""

    def __init__(self, value: str):
        self._value = value
        remember_token(value)

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"


# Optional values are spelled by what one types, not as "{None}|STR".
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
PathOption = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N"), AtLeast(1)]
Rate = Annotated[float | None, tyro.conf.arg(metavar="FPS", aliases=["--target_fps"]), MoreThan(0)]
SecretText = Annotated[
    Secret | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda typed: Secret(typed[0]),
        is_instance=lambda value: value is None or isinstance(value, Secret),
        str_from_instance=lambda value: ["None" if value is None else "…"],
    ),
]
Precision = Annotated[Literal["fp32", "fp16", "bf16"] | None, tyro.conf.arg(metavar="{fp32,fp16,bf16}")]


OptionGroup = TypeVar("OptionGroup")


@typing.dataclass_transform(frozen_default=True, field_specifiers=(field,))
def option_group(cls: type[OptionGroup]) -> type[OptionGroup]:
    """A frozen dataclass whose fields are options; the string under each is its help, with lines joined.

    tyro would read the same strings, but keep their line breaks, and would print "(default: None)" beside a help
    text that says what the default is.
    """
    cls = dataclass(frozen=True)(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    for option in docstring_parser.parse_from_object(cls).params:
        says_default_itself = getattr(cls, option.arg_name, None) in (None, ())
        cls.__annotations__[option.arg_name] = Annotated[
            hints[option.arg_name],
            tyro.conf.arg(
                help=" ".join((option.description or "").split()),
                help_behavior_hint="" if says_default_itself else None,
            ),
        ]
    return cls


@option_group
class ModelOptions:
    """Which CogVideoX model to work on."""

    pretrained_model_name_or_path: Annotated[Text, tyro.conf.arg(aliases=["--model_id"])] = None
    """The base model: a name on the Hugging Face Hub, such as THUDM/CogVideoX-5b, or a folder that
    `save_pretrained` wrote."""
    revision: Text = None
    """Branch, tag or commit of the model on the Hub."""
    variant: Text = None
    """Weight files to take where the model has several, such as fp16."""
    cache_dir: PathOption = None
    """Where downloaded models are kept. Default: the Hub's own cache."""


@option_group
class DataOptions:
    """Which clips and captions, and how a clip is cut to the sizes that the model sees. Such a size, frames × height ×
    width, is called a bucket."""

    data_root: PathOption = None
    """Folder of the data set. Paths in its lists are relative to it. With --load_tensors: a folder that
    `prepare` wrote."""
    dataset_file: PathOption = None
    """A CSV, JSONL or JSON file with a column of videos and one of captions. Without it, the folder is read as what it
    holds: prompts.txt with videos.txt, metadata.jsonl or metadata.csv, or videos each with a .txt beside it."""
    video_column: str = "video"
    """Column that holds the paths of the videos (where it is absent, file_name or path is taken). Without columns:
    the name of the text file, default videos.txt."""
    caption_column: str = "text"
    """Column that holds the captions (where it is absent, caption or prompt is taken). Without columns: the name of
    the text file, default prompts.txt."""
    allow_outside_paths: bool = False
    """Accept paths of clips that lead out of --data_root, judged as they are written: links in it may lead anywhere."""
    id_token: Text = None
    """A word put before every caption, by which the trained model is later called."""
    frame_buckets: Annotated[tuple[int, ...], AtLeast(1)] = ()
    """Numbers of frames to train on, each a multiple of 8 or one more (48, 49). A clip goes to the largest that it
    fills. Default: the model's."""
    frame_extraction: Literal["head", "center", "uniform", "slide"] = "head"
    """Which frames of a longer clip are used. head: from its start. center: around its middle. uniform:
    --num_excerpts excerpts, evenly spread. slide: an excerpt every --excerpt_stride frames. Each excerpt counts as
    a clip of its own."""
    num_excerpts: Count = None
    """Excerpts of a clip with uniform (default 4), or at most so many with slide (default: all)."""
    excerpt_stride: Count = None
    """Frames, at the training rate, from one excerpt to the next with slide. Default: the length of an excerpt, so
    that none overlap."""
    height_buckets: Annotated[tuple[int, ...], AtLeast(16)] = ()
    """Heights to train on, in pixels. Default: the model's native height."""
    width_buckets: Annotated[tuple[int, ...], AtLeast(16)] = ()
    """Widths to train on, in pixels. Every height is combined with every width. Default: the model's native
    width."""
    fps: Rate = None
    """Frames a second that clips are resampled to by their time stamps, so that they keep their speed. Default: the
    model's (8 for CogVideoX 1.0, 16 for 1.5)."""
    max_num_frames: Count = None
    """Make no excerpt longer than this, even where a clip fills a larger bucket."""
    skip_frames_start: Annotated[int, AtLeast(0)] = 0
    """Frames of the source to leave out at the start of every clip."""
    skip_frames_end: Annotated[int, AtLeast(0)] = 0
    """Frames of the source to leave out at the end of every clip."""
    video_reshape_mode: Literal["center", "random", "none"] = "center"
    """center: scale to cover the bucket and crop around the centre, never stretching. random: crop anywhere, once for
    a whole clip. none: stretch to the bucket."""
    random_flip: Annotated[float, Within(0, 1)] = 0.0
    """Share of what is shown that is mirrored, always a whole clip. Leave it at 0 where left and right matter."""
    num_variants: Annotated[int, AtLeast(1)] = 4
    """Versions of a clip that are encoded where crops or flips are random; every epoch draws one of them."""
    num_decode_workers: Annotated[int, AtLeast(0), tyro.conf.arg(aliases=["--num_decode_threads"])] = 2
    """Processes that decode clips ahead of the encoder. 0: decode in the program's own process."""
    strict: bool = False
    """A clip that cannot be used ends the command with exit code 2, instead of being named and skipped. With
    `inspect`, any problem does, once all is shown."""


@option_group
class TextEncoderOptions:
    """How the text encoder works."""

    offload_text_encoder: bool = False
    """Let the text encoder's layers pass through the GPU one after the other; its weights stay in the host's memory."""


@option_group
class EncodingOptions(TextEncoderOptions):
    """How clips become latents (what the VAE compresses a video to) and captions become embeddings."""

    max_sequence_length: Count = None
    """Tokens (words, or pieces of them) of a caption that the text encoder reads. Default: the model's (226)."""
    dtype: Precision = None
    """Precision of the VAE and the text encoder. Default: the model's own on a GPU, fp32 on a CPU."""
    use_tiling: bool = False
    """Let the VAE work tile by tile: much less memory, slightly different latents at the seams."""
    num_image_draws: Annotated[int, AtLeast(1)] = 4
    """Image-to-video models: noised first frames of a clip that are encoded; every epoch draws one of them."""


@option_group
class ConditioningOptions:
    """How an image-to-video model takes its image."""

    ignore_learned_positional_embeddings: bool = False
    """CogVideoX-5b-I2V: leave out its learned positions, which exist for its native size only, and train other sizes
    with its rotary positions. Whoever uses the LoRA has to leave them out too; the model card shows how."""
    image_latents_scale: Literal["checkpoint", "multiply", "divide"] = "checkpoint"
    """Whether the latents of the image are multiplied or divided by the VAE's scaling factor. checkpoint: as its
    config says, which is what stock diffusers does."""


@option_group
class MethodOptions:
    """What is trained, and what of it is kept."""

    training_type: Literal["lora", "sft"] = "lora"
    """lora: a small adapter beside the frozen model. sft: the weights of the model themselves (full fine-tuning)."""
    trainable_modules: tuple[str, ...] = ()
    """With sft: the modules whose weights are trained, by name (transformer_blocks.0), part of a name (attn1) or
    pattern ("transformer_blocks.*.ff"). Default: the whole transformer."""
    ema_decay: Annotated[
        float | None, tyro.conf.arg(metavar="DECAY"), MoreThan(0), Within(0, 1, includes_high=False)
    ] = None
    """Keep a moving average of the trained weights, average = DECAY × average + (1 - DECAY) × weights after each step,
    and show and export it instead of the last weights. It spans about 1 / (1 - DECAY) steps. Default: none."""


@option_group
class LoraOptions:
    """The adapter that is trained while the base model stays frozen."""

    rank: Annotated[int, AtLeast(1)] = 64
    """Rank of the LoRA matrices."""
    lora_alpha: Annotated[float, MoreThan(0)] = 64
    """Scale of the adapter: its output is multiplied by lora_alpha / rank. The exported file has it in its weights."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the linear layers that get an adapter."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(rank) instead, which keeps large ranks learning (rank-stabilized LoRA)."""
    use_dora: bool = False
    """Train direction and magnitude of each weight apart (DoRA): closer to full fine-tuning, slower."""


@option_group
class TrainingOptions:
    """Length, batch and bookkeeping of the training."""

    load_tensors: bool = False
    """--data_root holds a prepared set (made by `prepare`), not raw clips."""
    train_batch_size: Annotated[int, AtLeast(1)] = 1
    """Clips a step on each GPU. Clips of one batch share a bucket."""
    gradient_accumulation_steps: Annotated[int, AtLeast(1)] = 1
    """Batches whose gradients are averaged before one optimizer step."""
    num_train_epochs: Annotated[int, AtLeast(1)] = 1
    """Passes over the data set. Ignored where --max_train_steps is given."""
    max_train_steps: Count = None
    """Optimizer steps (updates of the weights) in all. Default: what --num_train_epochs takes."""
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, tyro.conf.arg(metavar="{no,fp16,bf16}")] = None
    """Precision of the model; noise and loss are always fp32; a LoRA's weights are, unless --trainable_dtype is bf16.
    no: fp32. Default: the model's own type on a GPU (with sft, bf16 where that is fp16), fp32 on a CPU."""
    drop_last: bool = False
    """Leave out the clips of a bucket that do not fill a batch, anew in each epoch. Default: they make a smaller
    batch, so that every clip is seen once an epoch."""
    caption_dropout: Annotated[float, Within(0, 1)] = 0.1
    """Share of clips that are shown with an empty caption, which classifier-free guidance needs."""
    noised_image_dropout: Annotated[float, Within(0, 1)] = 0.05
    """Image-to-video models: share of clips that are shown without their image."""
    max_skipped_steps: Annotated[int, AtLeast(1)] = 10
    """A step whose loss or gradient is no number changes no weight: it is skipped, and its clips are named. The run
    ends at so many in a row."""
    checkpointing_steps: Annotated[int, AtLeast(1)] = 500
    """Save a checkpoint every so many optimizer steps."""
    checkpoints_total_limit: Count = None
    """Keep no more than this many checkpoints. Default: all."""
    resume_from_checkpoint: Text = None
    """latest, or the folder of a checkpoint: go on exactly where it stopped."""
    dataloader_num_workers: Annotated[int, AtLeast(0)] = 0
    """Processes that read prepared clips ahead of the training."""
    pin_memory: bool = False
    """Read into page-locked memory, from which copies to a GPU are faster."""
    allow_tf32: bool = False
    """Allow TF32 arithmetic for fp32 matrix products on Ampere and newer GPUs."""
    nccl_timeout: Annotated[int | None, tyro.conf.arg(metavar="SECONDS"), AtLeast(1)] = None
    """How long processes wait for each other within a step before they give up. It does not count while one of them
    prepares clips, makes videos or saves. Default: 1800."""


@option_group
class BlockOptions:
    """Ways to run the blocks of the transformer with less memory, in training and when videos are made."""

    feed_forward_chunks: Annotated[int, AtLeast(1)] = 1
    """Compute the feed-forward of each block in so many parts of its sequence, each recomputed in the backward pass, so
    that only one part's activations are there at a time. Results differ by rounding."""
    resident_blocks: Count = None
    """Keep the frozen weights of the blocks in the host's memory, and on the GPU those of so many blocks at a time;
    from 2 on, the next block is copied while one is computed. Training needs a LoRA and --gradient_checkpointing for
    it. Default: all."""


@option_group
class MemoryOptions(BlockOptions):
    """Ways to train with less memory. They change how a step is computed, not what it learns; --quantize_base does,
    a little."""

    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: far less memory, about a third
    more time."""
    offload_activations: bool = False
    """With --gradient_checkpointing: what is kept of each block, its input, waits in the host's memory for the backward
    pass, copied while the GPU computes."""
    split_checkpoints: bool = False
    """With --offload_activations: checkpoint the attention and the feed-forward of each block by themselves, so that at
    the peak only one's activations are there. Takes the host twice as much for what is kept, and no more time to
    compute. Not with --resident_blocks."""
    quantize_base: Annotated[Literal["int8", "fp8", "nf4"] | None, tyro.conf.arg(metavar="{int8,fp8,nf4}")] = None
    """With a LoRA: keep the frozen linear layers of the blocks in 8 bits (int8, fp8) or in 4 (nf4, with bitsandbytes),
    a half or little more than a quarter of the memory, and bring each to the model's type when it is its turn, which
    takes time. The LoRA learns beside a base that is slightly off, by about 1% (int8), 2% (fp8) or 5% (nf4) of its
    output; what is exported is for the base as it was. Default: as it is."""
    optimizer_in_backward: bool = False
    """Step each weight as soon as its gradient is there, and drop the gradient. Clipping then takes each step a second
    forward and backward pass, the first to measure the norm, which --max_grad_norm 0 spares; with
    --gradient_accumulation_steps, gradients are kept until the last batch: on the host with
    --use_cpu_offload_optimizer, which alone makes it save much then. One GPU, not with fp16 or prodigy."""


@option_group
class BudgetOptions:
    """How much memory there is, and who chooses how to stay within it."""

    fit: bool = False
    """Choose what needs less memory, as little of it as gets all phases into --gpu_memory and --host_memory: the
    fastest such settings, exact ones before approximations. What is given otherwise stays as it is given."""
    gpu_memory: Annotated[float | None, tyro.conf.arg(metavar="GIB"), MoreThan(0)] = None
    """Memory of the GPU, in GiB, which all phases must fit into. Default of train: that of its GPU."""
    host_memory: Annotated[float | None, tyro.conf.arg(metavar="GIB"), MoreThan(0)] = None
    """Memory of the machine, in GiB, which must suffice for what waits there. Default of train: that of its machine."""


@option_group
class ObjectiveOptions:
    """Which noise levels the training sees, and what they weigh."""

    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps are drawn. uniform: all alike. logit_normal: the logit of a timestep's place in the schedule
    (0: clean, 1: noise) is normally distributed, so that the middle comes more often (Esser et al. 2024)."""
    logit_mean: Annotated[float, Within(-20, 20)] = 0.0
    """Mean of logit_normal: below 0 for less noise, above 0 for more."""
    logit_std: Annotated[float, MoreThan(0)] = 1.0
    """Standard deviation of logit_normal: the larger, the more often the ends of the schedule come."""
    stratified_timesteps: bool = False
    """Spread the timesteps of one optimizer step evenly over their distribution, over all GPUs and accumulated
    batches, so that the loss of a step varies less. A clip's timestep then depends on how many and which clips share
    its step, and so on the batch size; without this it does not."""
    snr_gamma: Annotated[float | None, tyro.conf.arg(metavar="GAMMA"), MoreThan(0)] = None
    """Weigh each timestep by its signal-to-noise ratio, clamped to this value (min-SNR, Hang et al. 2023, who take 5).
    The loss that is shown is the weighted one, and the last timestep, pure noise, weighs nothing. Default: all weigh
    alike."""


@option_group
class OptimizerOptions:
    """The optimizer and the schedule of its learning rate."""

    optimizer: Literal["adam", "adamw", "prodigy", "came"] = "adamw"
    """adamw decays the weights directly, adam through the gradient. prodigy finds the learning rate by itself (set
    --learning_rate 1). came keeps much less state than adamw for the same weights."""
    use_8bit: bool = False
    """Keep the state of adam or adamw in 8 bits, with bitsandbytes: a quarter of the memory."""
    use_4bit: bool = False
    """Keep it in 4 bits, with torchao: an eighth of the memory."""
    use_fp8: bool = False
    """Keep it in 8-bit floating point, with torchao."""
    use_torchao: bool = False
    """Take torchao's low-bit optimizer, which is compiled at its first step: for --use_8bit in place of bitsandbytes',
    and for --use_4bit and --use_fp8, which only torchao has."""
    use_cpu_offload_optimizer: bool = False
    """Keep the optimizer's state, and fp32 copies of the weights, in the host's memory, and step there: slower, but the
    GPU holds none of it."""
    offload_gradients: bool = False
    """With --use_cpu_offload_optimizer: also move each gradient to the host as soon as it is there. One GPU only, and
    without effect with --optimizer_in_backward, which drops them."""
    trainable_dtype: Literal["fp32", "bf16"] = "fp32"
    """How trained weights are kept. fp32: exactly; where the model computes in bf16, beside its copy. bf16: in that
    type alone, rounded up or down by chance after each step, so that small updates count on average: least memory."""
    learning_rate: Annotated[float, MoreThan(0), Within(0, 1e30)] = 1e-4
    """Learning rate after the warm-up."""
    scale_lr: bool = False
    """Multiply the learning rate by batch size × accumulation steps × number of processes."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Course of the learning rate after the warm-up."""
    lr_warmup_steps: Annotated[int, AtLeast(0)] = 0
    """Optimizer steps over which the learning rate rises from zero."""
    lr_num_cycles: Annotated[int, AtLeast(1)] = 1
    """Restarts of cosine_with_restarts."""
    lr_power: Annotated[float, MoreThan(0)] = 1.0
    """Power of the polynomial schedule."""
    beta1: Annotated[float, Within(0, 1, includes_high=False)] = 0.9
    """Decay of the running mean of the gradient."""
    beta2: Annotated[float | None, tyro.conf.arg(metavar="FLOAT"), Within(0, 1, includes_high=False)] = None
    """Decay of the running mean of its square. Default: 0.95; 0.999 with came."""
    beta3: Annotated[float | None, tyro.conf.arg(metavar="FLOAT"), Within(0, 1, includes_high=False)] = None
    """prodigy: decay of the estimate of the learning rate. came: decay of the mean instability. Default: the root of
    --beta2 for prodigy, 0.9999 for came."""
    prodigy_decouple: bool = False
    """prodigy: decay the weights directly, as adamw does, not through the gradient."""
    prodigy_use_bias_correction: bool = False
    """prodigy: correct the running means of the first steps, as adam does."""
    prodigy_safeguard_warmup: bool = False
    """prodigy: keep a warm-up of the learning rate from distorting the estimate."""
    weight_decay: Annotated[float, AtLeast(0)] = 1e-4
    """Weight decay."""
    epsilon: Annotated[float, MoreThan(0)] = 1e-8
    """Added to the denominator of the update."""
    max_grad_norm: Annotated[float, AtLeast(0)] = 1.0
    """Scale gradients down to this global norm. 0: no clipping."""


@option_group
class SamplingOptions:
    """How videos are made, in validation and in `sample`."""

    height: Count = None
    """Height of the video in pixels. Default: what the model was trained on."""
    width: Count = None
    """Width of the video in pixels. Default: what the model was trained on."""
    num_frames: Count = None
    """Frames of the video. Default: what the model was trained on."""
    num_inference_steps: Annotated[int, Within(1, 1000)] = 50
    """Denoising steps."""
    guidance_scale: Annotated[float, AtLeast(0)] = 6.0
    """How strongly a video follows its prompt (classifier-free guidance); 1 turns it off."""
    use_dynamic_cfg: bool = False
    """Raise the guidance from 1 to its full weight over the denoising steps."""
    enable_model_cpu_offload: bool = False
    """Keep on the GPU only the part of the pipeline that works (text encoder, transformer, VAE in turn). While a video
    is decoded during the training of a LoRA, all that the training holds waits in the host's memory."""
    enable_slicing: bool = False
    """Decode one video at a time where several come together."""
    enable_tiling: bool = False
    """Decode tile by tile: much less memory, faint differences at the seams."""


@option_group
class ValidationOptions:
    """Videos made before, during and after the training."""

    validation_prompt: Text = None
    """Prompts to make videos of, split by the separator. Without a prompt there is no validation."""
    validation_prompt_separator: Annotated[str, NotEmpty()] = ":::"
    """What stands between two validation prompts, and between two images."""
    validation_images: Text = None
    """Image-to-video models: the images that the videos start from, split by the separator, one a prompt or one for
    all. An image is a file, an http(s) address, or first_frame: the first frame of the clip whose caption the prompt
    is, or else of the first, second, … clip. Default: first_frame."""
    allow_private_addresses: bool = False
    """Fetch images from addresses within this machine's own network too."""
    num_validation_videos: Annotated[int, AtLeast(1)] = 1
    """Videos a prompt, each from its own noise."""
    validation_steps: Count = None
    """Validate every so many optimizer steps."""
    validation_epochs: Count = None
    """Validate every so many epochs. Before the first and after the last step there is always a validation."""


@option_group
class HeldOutOptions:
    """The loss on clips that are not trained on, which tells learning from memorising."""

    validation_fraction: Annotated[float, Within(0, 1, includes_high=False)] = 0.0
    """Share of the videos to hold out of the training. All excerpts and copies of a video fall on the same side, and
    stay there when others are added; another size or rate of the clips can give another split."""
    validation_data_root: PathOption = None
    """A second data set to hold out instead, read as --data_root is: raw clips, or with --load_tensors a prepared
    set."""
    validation_loss_steps: Count = None
    """Measure the loss on the held-out clips every so many optimizer steps, besides before the first and after the
    last. Default: --checkpointing_steps, so that every checkpoint has its value."""


@option_group
class TrackingOptions:
    """Where the course of a training is shown while it goes on. The run's folder holds all of it in any case."""

    report_to: tuple[Literal["none", "tensorboard", "wandb", "trackio", "all"], ...] = ()
    """Dashboards that get the metrics and the validation videos; several are allowed. all: every one that is
    installed. Default: tensorboard where it is installed."""
    tracker_name: Annotated[str, NotEmpty()] = "cogvideox-factory"
    """Project that the run belongs to in wandb and trackio. The run itself is named after --output_dir."""
    logging_dir: PathOption = None
    """Folder of the dashboards' files, relative to --output_dir; each run has a folder in it. Default: logs."""


@option_group
class HubOptions:
    """Sharing the result on the Hugging Face Hub."""

    push_to_hub: bool = False
    """Upload the result, its model card and the last validation videos when the run is complete. The token is tried
    out before the training starts."""
    hub_model_id: Text = None
    """Name of the repository, with or without an owner before it. Default: the name of --output_dir."""
    hub_private_repo: bool = False
    """Make the repository, if it is new, visible to its owner only."""
    hub_token: SecretText = None
    """Token with the right to write; it is never written down. Better kept out of the command line: the variable
    HF_TOKEN, or `hf auth login`, which is the default."""


@option_group
class MessageOptions:
    """What is said while a command works, on standard error."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level of the messages that are shown. warning: no progress either. debug: also the notes of the libraries
    that the program uses."""
    log_format: Literal["text", "json"] = "text"
    """text: lines and progress bars for people; where standard error is no terminal, a line of progress every ten
    seconds. json: each message one JSON object on a line of its own, with time, level and message; and metrics, for
    every optimizer step."""


@option_group
class Demo:
    """Show the whole chain on a CPU in minutes: a tiny CogVideoX learns a style from a few rendered clips.

    Each command that the demo runs is printed as one would type it.
    """

    messages: MessageOptions = field(default_factory=MessageOptions)
    output_dir: Path = Path("runs/demo")
    """Folder for everything that the demo makes. It is emptied first if an earlier demo wrote it."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 42
    """Seed of the choice of clips and of the training."""

    example = "cogvideox-factory demo --output_dir runs/demo"


@option_group
class Inspect:
    """Show what training would see of a data set, and every problem in it, before a GPU is rented.

    Decodes every clip as `prepare` would, prints a table of buckets and a list of problems with their remedies, and
    writes a contact sheet of the frames exactly as the model will get them.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    messages: MessageOptions = field(default_factory=MessageOptions)
    max_sequence_length: Count = None
    """Tokens (words, or pieces of them) of a caption that the text encoder reads. Default: the model's (226)."""
    output_dir: Path = Path("runs/inspect")
    """Folder for contact_sheet.png, contact_sheet.html and inspection.json."""
    num_rows: Annotated[int, AtLeast(1)] = 40
    """Clips on the contact sheet: all, or so many spread evenly over the data set."""
    json: bool = False
    """Print one JSON object on standard output, for programs."""

    required = ("pretrained_model_name_or_path", "data_root")
    example = (
        "cogvideox-factory inspect --pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root data/steamboat "
        "--height_buckets 480 720 --width_buckets 480 720"
    )


@option_group
class Prepare:
    """Encode clips and captions into a prepared set that `train --load_tensors` reads.

    What is encoded once needs neither VAE nor text encoder, the large models that do it, while the training goes on.
    Only what is new or changed is encoded when it is run again.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    messages: MessageOptions = field(default_factory=MessageOptions)
    output_dir: PathOption = None
    """Folder to write the prepared set to."""

    required = ("pretrained_model_name_or_path", "data_root", "output_dir")
    example = (
        "cogvideox-factory prepare --pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root data/steamboat "
        "--output_dir data/steamboat-prepared"
    )


@option_group
class Train:
    """Fine-tune a LoRA, or the whole model, on the clips of a folder or on a prepared set.

    Raw clips are first prepared into the run's folder; the encoders have left the memory when the training starts.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    conditioning: ConditioningOptions = field(default_factory=ConditioningOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    budget: BudgetOptions = field(default_factory=BudgetOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    held_out: Annotated[HeldOutOptions, tyro.conf.arg(name="held out")] = field(default_factory=HeldOutOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    messages: MessageOptions = field(default_factory=MessageOptions)
    output_dir: PathOption = None
    """Folder of the run."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 42
    """Seed of the adapter's first weights, of the order of the clips, and of all noise."""

    required = ("pretrained_model_name_or_path", "data_root", "output_dir")
    example = (
        "cogvideox-factory train --pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root data/steamboat "
        "--output_dir runs/steamboat --max_train_steps 1000 --gradient_checkpointing "
        '--validation_prompt "a mouse whistles at the wheel of a steamboat"'
    )


@option_group
class Plan(Train):
    """Show the peak memory of each phase of a training, without a GPU and without the weights of the model.

    Takes the options of `train`, and traces what `train` would do with a batch of the largest of the buckets. Of the
    published models the name is enough; nothing is downloaded.
    """

    num_processes: Annotated[int, AtLeast(1)] = 1
    """Processes that share the training, each with a GPU; the figures are those of one of them."""
    num_machines: Annotated[int, AtLeast(1)] = 1
    """Machines that the processes are spread over; those of one machine share its memory."""
    engine: Literal["ddp", "zero2", "zero3", "fsdp2"] = "ddp"
    """What they divide, as the files of accelerate_configs/ have it. ddp: nothing but the clips. zero2 (DeepSpeed):
    also gradients, optimizer states and fp32 weights. zero3: also the weights, and all of it waits on the host. fsdp2:
    all of it on the GPUs."""
    json: bool = False
    """Print one JSON object on standard output, for programs."""

    required = ("pretrained_model_name_or_path",)  # type: ignore[assignment]
    example = (
        "cogvideox-factory plan --pretrained_model_name_or_path THUDM/CogVideoX-5b --fit --gpu_memory 24 "
        "--host_memory 64"
    )


@option_group
class Sample:
    """Make a video from a base model, from a base model with a LoRA, or from a training run.

    A LoRA is a small adapter that was trained beside the frozen base model. The VAE is the part of the model that turns
    what the rest of it works on, the latents, into frames.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    conditioning: ConditioningOptions = field(default_factory=ConditioningOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    text_encoder: Annotated[TextEncoderOptions, tyro.conf.arg(name="text encoder")] = field(
        default_factory=TextEncoderOptions
    )
    blocks: BlockOptions = field(default_factory=BlockOptions)
    messages: MessageOptions = field(default_factory=MessageOptions)
    prompt: Text = None
    """What the video shows."""
    image: Text = None
    """Image-to-video models: the picture that the video starts from, a file or an http(s) address. One of another
    shape is scaled to cover the video and cropped around its centre."""
    allow_private_addresses: bool = False
    """Fetch the image from an address within this machine's own network too."""
    output: PathOption = None
    """The file to write, ending in .mp4, or a folder for one lossless PNG a frame."""
    run: PathOption = None
    """Folder that `train` wrote: its base model with its LoRA, or the model that it fine-tuned."""
    step: Annotated[int | None, tyro.conf.arg(metavar="N"), AtLeast(0)] = None
    """Take the run's checkpoint of this step instead of its final weights; 0 is the base model."""
    lora: PathOption = None
    """A LoRA file, or a folder with pytorch_lora_weights.safetensors."""
    fps: Rate = None
    """Frames a second of the mp4. Default: the run's, or the model's."""
    dtype: Precision = None
    """Precision of the model. Default: the model's own on a GPU, fp32 on a CPU."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 42
    """Seed of the first noise."""
    json: bool = False
    """Print one JSON object on standard output, for programs."""

    required = ("prompt", "output")
    example = 'cogvideox-factory sample --run runs/steamboat --prompt "a mouse dances" --output mouse.mp4'


@option_group
class Report:
    """Write the report of a training run, or compare several: one HTML file that opens offline."""

    messages: MessageOptions = field(default_factory=MessageOptions)
    run: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH [PATH ...]")] = ()
    """Folder that `train` wrote. Of several, the curves are drawn on the same axes, with what differs in their options
    and their last videos side by side. Where the folders come first, --run itself can be left out."""
    output: PathOption = None
    """The HTML file. Default: report.html in the run's folder; of several, comparison.html in the first one's."""

    required = ("run",)
    first_option = "run"  # which arguments before any flag belong to
    example = "cogvideox-factory report --run runs/steamboat\n  cogvideox-factory report runs/rank-16 runs/rank-64"


Options = TypeVar("Options")
Command = Demo | Inspect | Prepare | Plan | Train | Sample | Report
COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "inspect": Inspect,
    "prepare": Prepare,
    "plan": Plan,
    "train": Train,
    "sample": Sample,
    "report": Report,
}
# Flags that existing scripts use and that have become needless: accepted, with a line that says what happens instead.
_SLICING = {"use_slicing": "clips are encoded one by one"}
NEEDLESS: dict[type, dict[str, str]] = {
    Train: _SLICING,
    Plan: _SLICING,
    Prepare: {
        **_SLICING,
        "save_latents_and_embeddings": "latents and embeddings are always saved",
        "save_image_latents": "what image-to-video models need is saved for them by itself",
        "batch_size": "clips are encoded one by one, which gives the same tensors and needs the least memory",
        "num_artifact_workers": "each clip is written as soon as it is encoded",
        "seed": "crops, flips and noise are keyed by the clip, the same whenever it is prepared",
    },
}


def option_values(options: Any) -> dict[str, Any]:
    """All options of a command as one flat mapping, in the order of their declaration."""
    return {name: getattr(owner, name) for owner, name, _ in walk_options(options)}


def with_values(options: Options, values: Mapping[str, Any]) -> Options:
    """Options of a command with other values, by the names of the options. Raises KeyError for a name it has not."""
    left = dict(values)
    changed = _with_values(options, left)
    if left:
        raise KeyError(*left)
    return changed


def _with_values(options: Any, left: dict[str, Any]) -> Any:
    """With those of the values whose names the options have, which are taken out of `left`."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if dataclasses.is_dataclass(value):
            changes[item.name] = _with_values(value, left)
        elif item.name in left:
            changes[item.name] = left.pop(item.name)
    return dataclasses.replace(options, **changes)


def plain_values(options: Any) -> dict[str, Any]:
    """All options of a command that may be written down, as YAML and JSON know them: no secrets, not even a name."""
    hints = {name: annotation for _, name, annotation in walk_options(options)}
    values = option_values(options)
    return {name: _plain(value) for name, value in values.items() if not _is_secret(hints[name])}


def _is_secret(annotation: Any) -> bool:
    return annotation is Secret or any(_is_secret(part) for part in typing.get_args(annotation))


def config_text(options: Command) -> str:
    """Every option but secrets, and the version that wrote it, as YAML that `--config` takes back."""
    values = plain_values(options)
    return yaml.safe_dump({"version": __version__, **values}, sort_keys=False, allow_unicode=True)


def read_config(path: Path) -> dict[str, Any]:
    """Mapping of a YAML file with options. Raises UserError where the file is missing or is no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = without_secrets(str(error))  # YAML's messages quote the line
        raise UserError(f"--config {path}: not valid YAML: {reason}") from error
    if not isinstance(content or {}, dict):
        raise UserError(f"--config {path}: a mapping of options is needed, such as `rank: 64`")
    return content or {}


def nearest(name: str, known: Sequence[str]) -> str:
    """Half a sentence that proposes the known name closest to a mistyped one, or nothing."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def walk_options(options: Any) -> Iterator[tuple[Any, str, Any]]:
    """(owner, option name, annotation) of every option, groups opened."""
    hints = typing.get_type_hints(type(options), include_extras=True)
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if dataclasses.is_dataclass(value):
            yield from walk_options(value)
        else:
            yield options, item.name, hints[item.name]


def _plain(value: Any) -> Any:
    """A value as YAML knows it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return value

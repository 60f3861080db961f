"""Videos from a pipeline in memory, for validation and for `sample`.

Everything is done by the stock diffusers pipeline, so what is seen here is what others will see.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogvideox_factory.config import (
    BlockOptions,
    ConditioningOptions,
    ModelOptions,
    RunError,
    Sample,
    SamplingOptions,
    TextEncoderOptions,
    UserError,
    read_config,
)
from cogvideox_factory.data.files import make_output_folder, write_durably
from cogvideox_factory.data.images import fit_image, read_image
from cogvideox_factory.data.manifest import MANIFEST, damage_of, read_manifest
from cogvideox_factory.data.video import write_video
from cogvideox_factory.memory.block_swap import swap_blocks
from cogvideox_factory.memory.feed_forward import chunk_feed_forward
from cogvideox_factory.memory.rotation import rotate_in_parts
from cogvideox_factory.memory.set_aside import set_model_aside
from cogvideox_factory.memory.text_encoder import place_text_encoder
from cogvideox_factory.model import denoiser, encoders
from cogvideox_factory.model.adapters import (
    AVERAGE_FILE,
    LORA_FILE,
    TRAINED_FILE,
    find_export,
    find_lora,
    has_trained_weights,
    holds_lora,
    load_trained,
)
from cogvideox_factory.model.device import default_device, free_memory
from cogvideox_factory.model.encoders import load_vae, spare_memory, tell_if_cut
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning
from cogvideox_factory.model.pipeline_folder import is_pipeline
from cogvideox_factory.progress import progress_bar, show_bars_of_diffusers
from cogvideox_factory.redaction import without_secrets
from cogvideox_factory.resolve import check_positions
from cogvideox_factory.run_folder import checkpoint_folder, step_folders, step_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Video:
    """A video to be made."""

    file: str
    prompt: str
    seed: int
    image: str | None = None  # that it starts from: a path relative to the folder of all validations


WhileDecoding = Callable[[], contextlib.AbstractContextManager[Any]]
Prompts = Mapping[str, dict[str, Any]]  # what `generate` takes of each: its text, or its embeddings


def pipeline_from_disk(checkpoint: Checkpoint, trained: Path | None, dtype: torch.dtype):
    """The whole stock pipeline of a checkpoint, with a LoRA or weights of a run's checkpoint where they are given."""
    show_bars_of_diffusers()
    pipeline = checkpoint.pipeline_class.from_pretrained(checkpoint.folder, variant=checkpoint.variant, dtype=dtype)
    denoiser.follow_config(pipeline.transformer, checkpoint)
    encoders.follow_config(pipeline.vae, checkpoint)
    if trained is not None:
        load_trained(pipeline, trained, checkpoint.name)
    return pipeline


def pipeline_in_memory(
    checkpoint: Checkpoint,
    transformer,
    scheduler,
    options: SamplingOptions,
    dtype: torch.dtype,
    device: torch.device,
    load=load_vae,
    while_decoding: WhileDecoding = contextlib.nullcontext,
):
    """A pipeline around the model that trains: no text encoder (prompts come encoded), a VAE of its own.

    `load` gives the VAE; planning gives one without weights. `while_decoding` is entered while it decodes.
    """
    vae = load(checkpoint, dtype)
    if not checkpoint.is_image_to_video:
        vae.encoder = None  # never used then
    vae.to(device)
    spare_memory(vae, checkpoint, use_slicing=options.enable_slicing, use_tiling=options.enable_tiling)
    pipeline = checkpoint.pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=type(scheduler).from_config(scheduler.config),  # it counts steps; the training's must not
    )
    _decode_within(pipeline, while_decoding)
    return pipeline


def place(
    pipeline,
    checkpoint: Checkpoint,
    options: SamplingOptions,
    device: torch.device,
    *,
    blocks: BlockOptions,
    text_encoder: TextEncoderOptions,
    prompts: Iterable[str],
    max_sequence_length: int,
) -> Prompts:
    """Put a pipeline from disk where it runs, sparing memory as the options say, and give its prompts.

    Where the models may not be there together (`resident_blocks`, `offload_text_encoder`), prompts are encoded here
    and now, and the text encoder is dropped before the other models come. The frames are the same in any case, but for
    the rounding of a feed-forward in chunks.
    """
    spare_memory(pipeline.vae, checkpoint, use_slicing=options.enable_slicing, use_tiling=options.enable_tiling)
    ready: Prompts = {prompt: {"prompt": prompt} for prompt in prompts}
    if text_encoder.offload_text_encoder or blocks.resident_blocks is not None:
        ready = _encode_and_drop(pipeline, ready, options, text_encoder, device, max_sequence_length)
    if blocks.feed_forward_chunks > 1:
        chunk_feed_forward(pipeline.transformer, blocks.feed_forward_chunks)
    # Never two of these: moving the pipeline afterwards undoes the offloading.
    if blocks.resident_blocks is not None:
        pipeline.transformer.requires_grad_(False)  # a LoRA too, which travels with its block
        swap_blocks(pipeline.transformer, blocks.resident_blocks, device)
        pipeline.vae.to(device)
        rotate_in_parts(pipeline.transformer)
        _decode_within(pipeline, lambda: set_model_aside(pipeline.transformer, device))
    elif options.enable_model_cpu_offload and device != torch.device("cpu"):
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return ready


@torch.no_grad()
def _encode_and_drop(
    pipeline,
    prompts: Iterable[str],
    options: SamplingOptions,
    text_encoder: TextEncoderOptions,
    device: torch.device,
    max_sequence_length: int,
) -> Prompts:
    """Embeddings of prompts, and of the empty one for the guidance, as the pipeline would make them itself."""
    place_text_encoder(pipeline.text_encoder.requires_grad_(False), text_encoder, device)
    encoded = {}
    for prompt in prompts:
        embeds, negative = pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=options.guidance_scale > 1,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        encoded[prompt] = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    pipeline.text_encoder = None
    free_memory()
    return encoded


def _decode_within(pipeline, context: WhileDecoding) -> None:
    """Let a pipeline decode its latents within a context."""
    decode = pipeline.decode_latents

    def within(latents: torch.Tensor) -> torch.Tensor:
        with context():
            return decode(latents)

    pipeline.decode_latents = within


def generate(
    pipeline,
    options: SamplingOptions,
    seed: int,
    *,
    prompt: str | None = None,
    prompt_embeds: torch.Tensor | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
    image: Image.Image | None = None,
    max_sequence_length: int,
) -> np.ndarray:
    """One video, uint8 of shape (frames, height, width, 3), from a prompt or from embeddings of shape (1, L, D).

    `options` has its size and number of frames resolved. `image` is for image-to-video and is cut to that
    size. The noise comes from a CPU generator of this seed, so that it is the same on every device.
    """
    assert options.height is not None and options.width is not None
    frames = pipeline(
        **({} if image is None else {"image": fit_image(image, options.height, options.width)}),
        prompt=prompt,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        use_dynamic_cfg=options.use_dynamic_cfg,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        max_sequence_length=max_sequence_length,
    ).frames[0]
    if not np.isfinite(frames).all():
        raise RunError("the model gave no numbers (NaN): the LoRA may be broken, or the precision too low")
    return (frames * 255).round().astype(np.uint8)


def write_frames(frames: np.ndarray, output: Path, fps: float) -> None:
    """An mp4 where the name ends so, else a folder with one lossless PNG a frame."""
    if output.suffix.lower() == ".mp4":
        write_video(output, frames, fps)
        return
    output.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(output / f"{index:05}.png")


def write_video_list(folder: Path, videos: Sequence[Video]) -> None:
    """prompts.json beside the videos of a validation."""
    content = json.dumps([as_json(video) for video in videos], indent=2, ensure_ascii=False)
    write_durably(folder / "prompts.json", content.encode())


def as_json(video: Video) -> dict[str, Any]:
    """A video as prompts.json lists it."""
    return {name: value for name, value in asdict(video).items() if value is not None}


def resolve_sampling(
    options: SamplingOptions, size: tuple[int, int, int], divisor: int, temporal_factor: int
) -> SamplingOptions:
    """Options with frames, height and width filled in from `size` where the user gave none.

    `temporal_factor` counts the frames in one latent. Raises UserError for a size that is no multiple of the model's
    divisor, and for a number of frames that the VAE does not decode to.
    """
    frames, height, width = size
    resolved = replace(
        options,
        num_frames=options.num_frames or frames,
        height=options.height or height,
        width=options.width or width,
    )
    assert resolved.num_frames is not None
    latents = (resolved.num_frames - 1) // temporal_factor + 1
    made = latents * temporal_factor if latents % 2 == 0 else (latents - 1) * temporal_factor + 1
    if made != resolved.num_frames:
        raise UserError(f"--num_frames {resolved.num_frames}: the VAE would give {made} frames; take {made}")
    for flag, value in (("height", resolved.height), ("width", resolved.width)):
        assert value is not None
        if value % divisor:
            nearest = max(divisor, round(value / divisor) * divisor)
            raise UserError(f"--{flag} {value}: must be a multiple of {divisor}, such as {nearest}")
    return resolved


def run(options: Sample) -> dict[str, Any]:
    """The `sample` command: make the video that the options ask for, and say what was made.

    Raises UserError where the model, the run, the step or the LoRA does not exist, or the output cannot be named so.
    """
    assert options.prompt is not None and options.output is not None
    if options.output.suffix.lower() not in ("", ".mp4"):
        raise UserError(f"--output {options.output}: give a file that ends in .mp4, or a folder for PNG frames")
    if options.run and not (options.run / "config.yaml").is_file():
        raise UserError(f"--run {options.run}: holds no run (no config.yaml); give a folder that `train` wrote")
    settings = read_config(options.run / "config.yaml") if options.run else {}
    trained = _trained_weights(options)
    if options.lora is not None:
        find_lora(options.lora)  # before a model is downloaded
    model = options.model
    if options.run and trained and is_pipeline(trained):  # full fine-tuning: a whole model, which needs no base
        if model.pretrained_model_name_or_path is not None:
            raise UserError(
                f"--pretrained_model_name_or_path {model.pretrained_model_name_or_path}: --run {options.run} is a "
                "whole model, which needs no base; leave one of them out"
            )
        model, trained = ModelOptions(pretrained_model_name_or_path=str(trained)), None
    if model.pretrained_model_name_or_path is None:
        if not settings:
            raise UserError("give --run, or --pretrained_model_name_or_path (with --lora, if you like)")
        model = ModelOptions(**{name: settings[name] for name in asdict(model) if settings.get(name) is not None})
    checkpoint = open_checkpoint(model)
    image = _image_of(options, checkpoint)
    checkpoint = with_conditioning(checkpoint, _conditioning_of(options, settings))
    device = default_device()
    frames, height, width = checkpoint.native_size
    size = (
        settings.get("num_frames") or frames,
        settings.get("height") or height,
        settings.get("width") or width,
    )
    sampling = resolve_sampling(options.sampling, size, checkpoint.size_divisor, checkpoint.temporal_factor)
    assert sampling.num_frames is not None and sampling.height is not None and sampling.width is not None
    check_positions(checkpoint, [(sampling.num_frames, sampling.height, sampling.width)])
    make_output_folder(options.output.parent, "--output")
    max_tokens = settings.get("max_sequence_length") or checkpoint.max_text_tokens
    pipeline = pipeline_from_disk(checkpoint, trained, checkpoint.dtype_for(options.dtype, device))
    tell_if_cut(pipeline.tokenizer, options.prompt, max_tokens)
    prompts = place(
        *(pipeline, checkpoint, sampling, device),
        blocks=options.blocks,
        text_encoder=options.text_encoder,
        prompts=[options.prompt],
        max_sequence_length=max_tokens,
    )
    pipeline.progress_bar = functools.partial(progress_bar, None, "Denoising", "step")  # as all others look
    video = generate(
        pipeline,
        sampling,
        options.seed,
        **prompts[options.prompt],
        image=image,
        max_sequence_length=max_tokens,
    )
    fps = options.fps or settings.get("fps") or checkpoint.native_fps
    write_frames(video, options.output, fps)
    logger.info("%s: %d frames of %d×%d at %g fps", options.output, len(video), video.shape[2], video.shape[1], fps)
    return {
        "output": str(options.output),
        "prompt": options.prompt,
        **({"image": without_secrets(options.image)} if options.image else {}),
        "seed": options.seed,
        "model": checkpoint.name,
        "lora": str(trained) if trained and holds_lora(trained) else None,
        "weights": str(trained) if trained and not holds_lora(trained) else None,
        "frames": len(video),
        "height": video.shape[1],
        "width": video.shape[2],
        "fps": fps,
    }


def _image_of(options: Sample, checkpoint: Checkpoint) -> Image.Image | None:
    """The picture to start from. Raises UserError where the model takes none, or lacks one."""
    if options.image and not checkpoint.is_image_to_video:
        raise UserError(f"--image {options.image}: {checkpoint.name} is a text-to-video model and takes no image")
    if checkpoint.is_image_to_video and not options.image:
        raise UserError(f"--image is missing: {checkpoint.name} makes a video from a picture and a prompt")
    if not options.image:
        return None
    return read_image(options.image, "--image", allow_private_addresses=options.allow_private_addresses)


def _conditioning_of(options: Sample, settings: Mapping[str, Any]) -> ConditioningOptions:
    """What was asked for, and else what the run was trained with."""
    asked, default = asdict(options.conditioning), asdict(ConditioningOptions())
    of_run = {name: settings.get(name, value) for name, value in default.items()}
    return ConditioningOptions(
        **{name: of_run[name] if asked[name] == default[name] else asked[name] for name in asked}
    )


def _trained_weights(options: Sample) -> Path | None:
    """Where what the options name lies: a LoRA, what a run exported, or one of its checkpoints."""
    if options.run is None:
        if options.step is not None:
            raise UserError(f"--step {options.step}: is a step of a run; give --run too")
        if options.lora is not None and (options.lora / MANIFEST).is_file():
            _check_whole(options.lora, f"--lora {options.lora}")
        return options.lora
    if options.lora is not None:
        raise UserError("--run and --lora: give one of them")
    if options.step == 0:
        return None
    steps = [step_of(folder) for folder in step_folders(options.run / "checkpoints") if has_trained_weights(folder)]
    present = f"it has {', '.join(map(str, steps)) or 'none'}"
    if options.step is None:
        if find_export(options.run) is None:
            raise UserError(
                f"--run {options.run}: has nothing trained to the end yet; --step takes one of its checkpoints "
                f"({present})"
            )
        return options.run
    if options.step not in steps:
        raise UserError(f"--step {options.step}: the run has no such checkpoint; {present}")
    folder = checkpoint_folder(options.run, options.step)
    _check_whole(folder, f"--step {options.step}")
    return folder


def _check_whole(checkpoint: Path, flag: str) -> None:
    """Raises UserError where the weights that are shown of a checkpoint are not those that were written.

    A number of theirs that has changed would show in the video at the most.
    """
    try:
        files = read_manifest(checkpoint)
        shown = next((name for name in (LORA_FILE, AVERAGE_FILE, TRAINED_FILE) if name in files), TRAINED_FILE)
        damage = damage_of(checkpoint, [shown])
    except (OSError, ValueError) as error:
        damage = f"{MANIFEST} is missing" if isinstance(error, FileNotFoundError) else str(error)
    if damage:
        raise UserError(f"{flag}: {checkpoint} is damaged: {damage}; take another step")

"""Clips and captions → a prepared set; only what is new or changed is encoded.

The text encoder works first and leaves the memory before the VAE comes. While the VAE encodes one clip, a thread
decodes the next (PyAV lets go of the interpreter lock while it works).
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cogvideox_factory.config import DataOptions, EncodingOptions, Prepare, UserError
from cogvideox_factory.data.buckets import Bucket, all_buckets, choose_bucket
from cogvideox_factory.data.clips import Clip, read_clips
from cogvideox_factory.data.store import Entry, PreparedSet, hash_of, hash_of_file, make_output_folder
from cogvideox_factory.data.video import Timeline, VideoError, read_frames, read_timeline
from cogvideox_factory.model.device import default_device, free_memory
from cogvideox_factory.model.encoders import TextEncoder, VideoEncoder
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, refuse_image_to_video
from cogvideox_factory.progress import progress_bar
from cogvideox_factory.stopping import StopRequest, stop_requests

logger = logging.getLogger(__name__)

# Raised by hand whenever the same inputs come to give other tensors.
FORMAT = 1


@dataclass(frozen=True)
class Excerpt:
    """What of a clip is encoded, and where its tensors belong."""

    clip: Clip
    timeline: Timeline
    times: np.ndarray
    bucket: Bucket
    entry: Entry


def run(options: Prepare) -> None:
    """The `prepare` command."""
    assert options.output_dir is not None
    checkpoint = open_checkpoint(options.model)
    refuse_image_to_video(checkpoint)
    check_text_length(checkpoint, options.encoding)
    data = replace(options.data, **resolve_data_options(options.data, checkpoint))
    read_clips(data)  # what is wrong with the data set as a whole is said before a folder is made
    make_output_folder(options.output_dir)
    with stop_requests() as stop:
        prepared = PreparedSet(options.output_dir)
        prepare(checkpoint, data, options.encoding, prepared, default_device(), stop)


def prepare(
    checkpoint: Checkpoint,
    data: DataOptions,
    encoding: EncodingOptions,
    prepared: PreparedSet,
    device: torch.device,
    stop: StopRequest,
) -> list[Entry]:
    """Bring a prepared set up to date with its clips, and give its entries.

    `data` has its buckets and rate resolved (see `resolve_data_options`). Raises UserError where no clip is left, or
    where one cannot be used and `data.strict` is set; Stopped after a signal, with all that is encoded kept.
    """
    clips = read_clips(data)
    identity = _identity(checkpoint, encoding, device)
    skipped: list[tuple[Clip, str]] = []
    excerpts = list(_choose_excerpts(clips, data, identity, skipped, stop))
    encode_prompts(
        checkpoint,
        encoding,
        prepared,
        ["", *(excerpt.clip.caption for excerpt in excerpts)],
        device,
        stop,
    )
    encoded = _encode_clips(checkpoint, encoding, prepared, excerpts, data, skipped, device, stop)
    broken = {id(clip) for clip, _ in skipped}
    entries = [excerpt.entry for excerpt in excerpts if id(excerpt.clip) not in broken]
    prepared.write_json(
        "report.json",
        {
            "clips": len(clips),
            "encoded": encoded,
            "reused": len(entries) - encoded,
            "skipped": [{"path": clip.source, "reason": reason} for clip, reason in skipped],
        },
    )
    if not entries:
        raise UserError(
            f"--data_root {data.data_root}: no usable clip among {len(clips)}"
            + (f"; the first: {skipped[0][0].source}: {skipped[0][1]}" if skipped else "; the lists are empty")
        )
    prepared.write_index(entries, {"fps": data.fps, **identity, "empty_prompt": _prompt_file("", identity)})
    logger.info(
        "%d clips: %d encoded, %d reused, %d skipped → %s",
        len(clips),
        encoded,
        len(entries) - encoded,
        len(skipped),
        prepared.folder,
    )
    return entries


def resolve_data_options(data: DataOptions, checkpoint: Checkpoint) -> dict[str, Any]:
    """Buckets and rate as they will be used: the checkpoint's where none are given, sizes made to divide.

    Raises UserError for a number of frames that the VAE cannot encode.
    """
    frames, height, width = checkpoint.native_size
    batch = checkpoint.frame_batch
    frame_buckets = data.frame_buckets or (frames,)
    for number in frame_buckets:
        if number % batch not in (0, 1):
            below = number // batch * batch + 1
            raise UserError(
                f"--frame_buckets {number}: the VAE encodes {batch}k or {batch}k+1 frames; the nearest are {below} "
                f"and {below + batch - 1}"
            )

    def divisible(flag: str, sizes: Sequence[int]) -> tuple[int, ...]:
        divisor = checkpoint.size_divisor
        nearest = [max(divisor, round(size / divisor) * divisor) for size in sizes]
        for size, used in zip(sizes, nearest, strict=True):
            if size != used:
                logger.warning("--%s %d: not a multiple of %d, %d is used", flag, size, divisor, used)
        return tuple(dict.fromkeys(nearest))

    return {
        "frame_buckets": tuple(dict.fromkeys(frame_buckets)),
        "height_buckets": divisible("height_buckets", data.height_buckets or (height,)),
        "width_buckets": divisible("width_buckets", data.width_buckets or (width,)),
        "fps": data.fps or checkpoint.native_fps,
    }


def check_text_length(checkpoint: Checkpoint, encoding: EncodingOptions) -> None:
    """Raises UserError for a number of tokens that the transformer cannot place."""
    tokens, longest = encoding.max_sequence_length, checkpoint.max_text_tokens
    has_fixed_length = not checkpoint.transformer.get("use_rotary_positional_embeddings")
    if tokens is not None and (tokens > longest or (has_fixed_length and tokens != longest)):
        raise UserError(
            f"--max_sequence_length {tokens}: {checkpoint.name} takes {'' if has_fixed_length else 'up to '}{longest}"
        )


def check_prepared(checkpoint: Checkpoint, prepared: PreparedSet) -> dict[str, Any]:
    """Settings of a prepared set that fits the checkpoint. Raises UserError where it was made with other encoders."""
    settings = prepared.read_settings()
    if settings.get("format") != FORMAT:
        raise UserError(f"{prepared.folder} was prepared by another version of this program; run `prepare` again")
    for component in ("vae", "text_encoder", "tokenizer"):
        if settings.get(component) != checkpoint.fingerprint(component):
            raise UserError(
                f"{prepared.folder} was prepared with another {component} than that of {checkpoint.name}; run "
                "`prepare` again with this model"
            )
    return settings


def encode_prompts(
    checkpoint: Checkpoint,
    encoding: EncodingOptions,
    prepared: PreparedSet,
    prompts: Sequence[str],
    device: torch.device,
    stop: StopRequest,
) -> dict[str, str]:
    """File in the set of each distinct prompt; the text encoder is loaded only if one is missing."""
    identity = _identity(checkpoint, encoding, device)
    files = {prompt: _prompt_file(prompt, identity) for prompt in prompts}
    missing = {prompt: file for prompt, file in files.items() if not prepared.has(file)}
    if missing:
        dtype = checkpoint.dtype_for(encoding.dtype, device)
        encoder = TextEncoder.load(checkpoint, encoding.max_sequence_length, dtype, device)
        for prompt, file in progress_bar(missing.items(), "Encoding captions", "caption"):
            prepared.write_tensors(file, {"prompt_embeds": encoder.encode(prompt)})
            stop.check("stopped while encoding captions; start again to go on")
        del encoder
        free_memory()
    return files


def _identity(checkpoint: Checkpoint, encoding: EncodingOptions, device: torch.device) -> dict[str, Any]:
    """All that tensors depend on besides the clip itself."""
    return {
        "format": FORMAT,
        "vae": checkpoint.fingerprint("vae"),
        "text_encoder": checkpoint.fingerprint("text_encoder"),
        "tokenizer": checkpoint.fingerprint("tokenizer"),
        "dtype": str(checkpoint.dtype_for(encoding.dtype, device)),
        "tiling": encoding.use_tiling,
        "max_sequence_length": encoding.max_sequence_length or checkpoint.max_text_tokens,
    }


def _prompt_file(prompt: str, identity: dict[str, Any]) -> str:
    parts = ("format", "text_encoder", "tokenizer", "dtype", "max_sequence_length")
    return PreparedSet.prompt_file(hash_of(prompt, *(identity[part] for part in parts)))


def _latents_file(content: str, times: np.ndarray, bucket: Bucket, data: DataOptions, identity: dict[str, Any]) -> str:
    parts = [identity[part] for part in ("format", "vae", "dtype", "tiling")]
    frame_choice = [round(float(time), 6) for time in times]
    return PreparedSet.latents_file(hash_of(content, frame_choice, list(bucket), data.video_reshape_mode, *parts))


def _choose_excerpts(
    clips: Sequence[Clip],
    data: DataOptions,
    identity: dict[str, Any],
    skipped: list[tuple[Clip, str]],
    stop: StopRequest,
) -> Iterator[Excerpt]:
    """What of each usable clip is encoded; the others are added to `skipped`."""
    assert data.fps is not None
    buckets = all_buckets(data.frame_buckets, data.height_buckets, data.width_buckets)
    shortest = min(bucket.frames for bucket in buckets)
    slow: list[str] = []
    seen: collections.Counter[str] = collections.Counter()
    for clip in progress_bar(clips, "Reading clips", "clip"):
        stop.check("stopped while reading clips; start again to go on")
        try:
            if not clip.source or not clip.caption:
                raise VideoError("has no caption" if clip.source else "the data set names no file for it")
            timeline = read_timeline(clip.path)
            times = timeline.sample_times(data.fps, data.skip_frames_start, data.skip_frames_end)
            times = times[: data.max_num_frames]
            bucket = choose_bucket(len(times), timeline.height, timeline.width, buckets)
            if bucket is None:
                raise VideoError(
                    f"is too short: {len(times)} frames at {data.fps:g} fps, the smallest bucket has {shortest}"
                )
            times = times[: bucket.frames]
            latents = _latents_file(hash_of_file(clip.path), times, bucket, data, identity)
        except (VideoError, OSError) as error:
            _skip(clip, str(error), skipped, data.strict)
            continue
        files = {"latents": latents, "prompt": _prompt_file(clip.caption, identity)}
        if len(timeline.times) > 1 and float(np.median(np.diff(timeline.times))) > 1.5 / data.fps:
            slow.append(clip.source)
        # A clip that is listed again, to weigh more, has random numbers of its own.
        key = hash_of(sorted(files.items()), seen[latents + clip.caption])
        seen[latents + clip.caption] += 1
        yield Excerpt(clip, timeline, times, bucket, Entry(clip.source, clip.caption, bucket, files, key))
    if slow:
        logger.warning(
            "%d clips have fewer frames a second than --fps %g, so frames are repeated; the first: %s",
            len(slow),
            data.fps,
            slow[0],
        )


def _encode_clips(
    checkpoint: Checkpoint,
    encoding: EncodingOptions,
    prepared: PreparedSet,
    excerpts: Sequence[Excerpt],
    data: DataOptions,
    skipped: list[tuple[Clip, str]],
    device: torch.device,
    stop: StopRequest,
) -> int:
    """Encode what the set does not have yet, and say how much that was."""
    missing: dict[str, list[Excerpt]] = {}  # by file: a clip that is listed twice or copied is encoded once
    for excerpt in excerpts:
        file = excerpt.entry.files["latents"]
        if not prepared.has(file):
            missing.setdefault(file, []).append(excerpt)
    if not missing:
        return 0
    encoder = VideoEncoder.load(
        checkpoint,
        checkpoint.dtype_for(encoding.dtype, device),
        device,
        use_slicing=encoding.use_slicing,
        use_tiling=encoding.use_tiling,
    )
    encoded = 0
    for excerpt, pixels in progress_bar(
        _decode_ahead([same[0] for same in missing.values()], data.video_reshape_mode),
        "Encoding clips",
        "clip",
        len(missing),
    ):
        file = excerpt.entry.files["latents"]
        try:
            mean, logvar = encoder.encode(pixels.result())
        except (VideoError, OSError) as error:
            for same in missing[file]:
                _skip(same.clip, str(error), skipped, data.strict)
            continue
        prepared.write_tensors(file, {"mean": mean, "logvar": logvar})
        encoded += 1
        stop.check("stopped while encoding clips, all that are done are kept; start again to go on")
    del encoder
    free_memory()
    return encoded


def _decode_ahead(excerpts: Sequence[Excerpt], reshape_mode: str) -> Iterator[tuple[Excerpt, Future[np.ndarray]]]:
    """Each excerpt with its pixels; one clip is decoded ahead, so that at most two are in memory."""
    with ThreadPoolExecutor(max_workers=1) as pool:

        def submit(excerpt: Excerpt) -> Future[np.ndarray]:
            return pool.submit(
                read_frames, excerpt.clip.path, excerpt.timeline, excerpt.times, excerpt.bucket, reshape_mode
            )

        upcoming = submit(excerpts[0])
        for index, excerpt in enumerate(excerpts):
            current = upcoming
            current.exception()  # wait for it, so that only one clip is ahead
            if index + 1 < len(excerpts):
                upcoming = submit(excerpts[index + 1])
            yield excerpt, current


def _skip(clip: Clip, reason: str, skipped: list[tuple[Clip, str]], strict: bool) -> None:
    name = clip.source or "(no name)"
    if strict:
        raise UserError(f"{name}: {reason} (--strict stops at the first clip that cannot be used)")
    logger.warning("skipped %s: %s", name, reason)
    skipped.append((clip, reason))

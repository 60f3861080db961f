"""Options as they will be used: what a checkpoint decides where the user did not, and what it cannot take."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from cogvideox_factory.config import DataOptions, UserError
from cogvideox_factory.model.family import Checkpoint

logger = logging.getLogger(__name__)

# Heights and widths for which the program is documented; others work as far as the model does, and are told.
SUPPORTED_SIZES = range(256, 2048 + 1)


def resolve_data_options(data: DataOptions, checkpoint: Checkpoint) -> dict[str, Any]:
    """Buckets and rate: the checkpoint's where none are given, sizes made to divide.

    Raises UserError for a number of frames that the VAE cannot encode, and for options that do not go together.
    """
    if data.num_excerpts and data.frame_extraction not in ("uniform", "slide"):
        raise UserError(f"--num_excerpts {data.num_excerpts}: needs --frame_extraction uniform or slide")
    if data.excerpt_stride and data.frame_extraction != "slide":
        raise UserError(f"--excerpt_stride {data.excerpt_stride}: needs --frame_extraction slide")
    frames, height, width = checkpoint.native_size
    frame_buckets = data.frame_buckets or (frames,)
    for number in frame_buckets:
        _check_frames(number, checkpoint.frame_batch)
    return {
        "frame_buckets": tuple(dict.fromkeys(frame_buckets)),
        "height_buckets": _fit_sizes("height_buckets", data.height_buckets, height, checkpoint.size_divisor),
        "width_buckets": _fit_sizes("width_buckets", data.width_buckets, width, checkpoint.size_divisor),
        "fps": data.fps or checkpoint.native_fps,
    }


def _check_frames(number: int, batch: int) -> None:
    if number % batch in (0, 1):
        return
    below = number // batch * batch + 1
    raise UserError(
        f"--frame_buckets {number}: the VAE encodes {batch}k or {batch}k+1 frames; the nearest are {below} "
        f"and {below + batch - 1}"
    )


def _fit_sizes(flag: str, sizes: Sequence[int], native: int, divisor: int) -> tuple[int, ...]:
    """The nearest sizes that divide, each once; the native one where none is given."""
    fitting = []
    for size in sizes or (native,):
        nearest = max(divisor, round(size / divisor) * divisor)
        if nearest != size:
            logger.warning("--%s %d: not a multiple of %d, %d is used", flag, size, divisor, nearest)
        if nearest not in SUPPORTED_SIZES and nearest != native:
            logger.warning(
                "--%s %d: outside of %d to %d, where CogVideoX has been seen to work; expect poor results",
                *(flag, nearest, SUPPORTED_SIZES.start, SUPPORTED_SIZES.stop - 1),
            )
        fitting.append(nearest)
    return tuple(dict.fromkeys(fitting))


def check_text_length(checkpoint: Checkpoint, tokens: int | None) -> None:
    """Raises UserError for a number of tokens that the transformer cannot place."""
    longest = checkpoint.max_text_tokens
    has_fixed_length = not checkpoint.transformer.get("use_rotary_positional_embeddings")
    if tokens is not None and (tokens > longest or (has_fixed_length and tokens != longest)):
        raise UserError(
            f"--max_sequence_length {tokens}: {checkpoint.name} takes {'' if has_fixed_length else 'up to '}{longest}"
        )


def check_positions(checkpoint: Checkpoint, sizes: Iterable[Sequence[int]]) -> None:
    """Raises UserError for (frames, height, width) that a model with learned positions cannot take.

    Of another number of frames it only warns: stock diffusers then puts sines in the place of the learned positions.
    """
    if not checkpoint.has_learned_positions:
        return
    frames, *native = checkpoint.native_size
    for size in sizes:
        if list(size[1:]) != native:
            raise UserError(
                f"{size[1]}×{size[2]}: {checkpoint.name} has learned positions for {native[0]}×{native[1]} only; take "
                "that size, or add --ignore_learned_positional_embeddings"
            )
        if size[0] != frames:
            logger.warning(
                "%d frames: %s has learned positions for %d; for other numbers diffusers takes sines instead, which "
                "the model does not know. --ignore_learned_positional_embeddings leaves both out",
                *(size[0], checkpoint.name, frames),
            )

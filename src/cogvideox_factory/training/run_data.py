"""The clips that a run trains on and those that it holds out, prepared."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

from accelerate import Accelerator

from cogvideox_factory.config import Train, UserError
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.clips import read_clips
from cogvideox_factory.data.loader import PreparedClips
from cogvideox_factory.data.split import overlap, split_entries
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.prepare import check_prepared, prepare
from cogvideox_factory.resolve import check_positions
from cogvideox_factory.stopping import StopRequest
from cogvideox_factory.training.run_options import held_out_options, naming_the_second_set

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """A prepared set with the entries to train on, and the file of the empty prompt's embedding."""

    prepared: PreparedSet
    entries: list[Entry]
    empty_prompt: str

    @property
    def most_frequent_bucket(self) -> Bucket:
        """The size that most clips have; of equals, the largest."""
        buckets = [entry.bucket for entry in self.entries]
        return max(set(buckets), key=lambda bucket: (buckets.count(bucket), bucket))


def check_data_sets(options: Train) -> None:
    """Raises UserError where a data set of raw clips is wrong as a whole."""
    if options.training.load_tensors:
        return
    read_clips(options.data)
    second_set = held_out_options(options)
    if second_set:
        with naming_the_second_set(second_set):
            read_clips(second_set.data)


def prepare_data(
    options: Train, checkpoint: Checkpoint, accelerator: Accelerator, stop: StopRequest
) -> tuple[TrainingData, TrainingData | None]:
    """What to train on, and what to measure the held-out loss on, if that is asked for.

    Raises UserError where a clip has a size that the model cannot take.
    """
    data = _prepare_one(options, checkpoint, accelerator, stop)
    data, held_out = _hold_out(options, data, checkpoint, accelerator, stop)
    every_clip = [*data.entries, *(held_out.entries if held_out else ())]
    check_positions(checkpoint, {entry.bucket for entry in every_clip})
    return data, held_out


def clips_of(
    data: TrainingData, options: Train, checkpoint: Checkpoint, rank: int = 0, *, is_held_out: bool = False
) -> PreparedClips:
    """The clips of a rank with their random numbers; held-out ones are always shown whole."""
    training = options.training
    image_dropout = 0.0 if is_held_out else training.noised_image_dropout
    return PreparedClips(
        data.prepared,
        data.entries,
        data.empty_prompt,
        seed=options.seed,
        caption_dropout=0.0 if is_held_out else training.caption_dropout,
        latent_frame_multiple=checkpoint.latent_frame_multiple,
        noised_image_dropout=image_dropout if checkpoint.is_image_to_video else None,
        rank=rank,
        stratified_timesteps=options.objective.stratified_timesteps and not is_held_out,
    )


def _prepare_one(
    options: Train, checkpoint: Checkpoint, accelerator: Accelerator, stop: StopRequest, folder: str = "prepared"
) -> TrainingData:
    """The prepared set that the options name, or one made from their clips in the run's folder."""
    assert options.output_dir is not None and options.data.data_root is not None
    if options.training.load_tensors:
        prepared = PreparedSet(options.data.data_root)
        entries = prepared.read_index()
        empty_prompt = check_prepared(checkpoint, prepared)["empty_prompt"]
        lost = {file for entry in entries for file in entry.all_files if not prepared.has(file)}
        if not prepared.has(empty_prompt):
            lost.add(empty_prompt)
        if lost:
            raise UserError(
                f"--data_root {prepared.folder}: {len(lost)} files of its index are missing, such as {min(lost)}; run "
                "`prepare` again, which makes what is missing"
            )
        return TrainingData(prepared, entries, empty_prompt)
    prepared = PreparedSet(options.output_dir / folder)
    prepare(checkpoint, options.data, options.encoding, prepared, accelerator.device, stop)  # each process its part
    return TrainingData(prepared, prepared.read_index(), prepared.read_settings()["empty_prompt"])


def _hold_out(
    options: Train,
    data: TrainingData,
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    stop: StopRequest,
) -> tuple[TrainingData, TrainingData | None]:
    second_set = held_out_options(options)
    if second_set:
        with naming_the_second_set(second_set):
            held_out = _prepare_one(second_set, checkpoint, accelerator, stop, "prepared-validation")
        common = overlap(held_out.entries, data.entries)
        if common:
            logger.warning(
                "--validation_data_root: %d of its %d clips are also trained on, such as %s; their loss tells nothing "
                "of clips that are not",
                *(len(common), len(held_out.entries), common[0].source),
            )
        return data, held_out
    if options.held_out.validation_fraction:
        trained, held = split_entries(data.entries, options.held_out.validation_fraction)
        return dataclasses.replace(data, entries=trained), dataclasses.replace(data, entries=held)
    return data, None

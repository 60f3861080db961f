"""What a run trains on, and how held-out clips are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvideox_factory.config import ModelOptions, ObjectiveOptions, Train, TrainingOptions
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.training.run_data import TrainingData, clips_of


def test_held_out_clips_are_shown_whole(checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]) -> None:
    options = Train(
        model=ModelOptions(pretrained_model_name_or_path=str(checkpoint.folder)),
        training=TrainingOptions(caption_dropout=0.3),
        objective=ObjectiveOptions(stratified_timesteps=True),
        seed=9,
    )
    data = TrainingData(prepared, entries, "prompts/empty.safetensors")
    trained, held_out = clips_of(data, options, checkpoint, 1), clips_of(data, options, checkpoint, is_held_out=True)
    assert (trained.caption_dropout, trained.stratified_timesteps, trained.rank, trained.seed) == (0.3, True, 1, 9)
    assert (held_out.caption_dropout, held_out.stratified_timesteps) == (0.0, False)


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        ([(17, 64, 96)] * 2 + [(9, 64, 96)] * 3, (9, 64, 96)),
        ([(17, 64, 96), (9, 64, 96)], (17, 64, 96)),  # of equals, the largest
    ],
)
def test_the_size_that_most_clips_have(
    tmp_path: Path, buckets: list[tuple[int, int, int]], expected: tuple[int, int, int]
) -> None:
    entries = [Entry("a.mp4", "a", Bucket(*bucket), {}, key=str(number)) for number, bucket in enumerate(buckets)]
    assert TrainingData(PreparedSet(tmp_path), entries, "").most_frequent_bucket == expected

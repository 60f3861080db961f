"""The demo's last picture and its distances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from cogvideox_factory.data.video import write_video
from cogvideox_factory.demo.before_after import GAP, LINE, BeforeAfter, read_all, write_animation

FRAMES, HEIGHT, WIDTH = 5, 32, 48


def plain(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((FRAMES, HEIGHT, WIDTH, 3), colour, np.uint8)


@pytest.fixture
def row() -> BeforeAfter:
    return BeforeAfter("a caption", plain((200, 10, 10)), plain((10, 200, 10)), plain((10, 10, 250)))


def test_distances_are_mean_differences_of_pixels(row: BeforeAfter) -> None:
    assert row.distances == pytest.approx(((190 + 0 + 240) / 3, (0 + 190 + 240) / 3))


def test_the_distance_of_nothing_is_that_of_the_background() -> None:
    target = plain((10, 8, 22))
    target[:, :8] = (110, 108, 122)  # a quarter of the picture
    row = BeforeAfter("a caption", target, target, target)
    assert row.distance_of_nothing == pytest.approx(25)


def test_a_video_is_read_whole_at_its_own_size(tmp_path: Path) -> None:
    frames = np.stack([np.full((HEIGHT, WIDTH, 3), 40 * index, np.uint8) for index in range(FRAMES)])
    write_video(tmp_path / "x.mp4", frames, 8)
    read = read_all(tmp_path / "x.mp4")
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).max() < 8


def test_the_animation_shows_each_frame_of_the_three_side_by_side(row: BeforeAfter, tmp_path: Path) -> None:
    row.base[:] = 40 * np.arange(FRAMES, dtype=np.uint8)[:, None, None, None]
    write_animation(tmp_path / "x.gif", [row, row], 8)
    with Image.open(tmp_path / "x.gif") as picture:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(picture)]
    assert len(frames) == FRAMES
    for number in range(2):
        top = GAP + LINE + number * (2 * HEIGHT + LINE + GAP)
        for column, video in enumerate((row.base, row.tuned, row.target)):
            left = GAP + column * (2 * WIDTH + GAP)
            for index, frame in enumerate(frames):
                shown = frame[top : top + 2 * HEIGHT, left : left + 2 * WIDTH]
                assert np.abs(shown - video[index, 0, 0]).max() < 8

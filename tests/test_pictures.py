"""Cuts, black and still pictures, on frames that are made to have them, or to look as if they had."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cogvideox_factory.demo.world import Scene
from cogvideox_factory.pictures import look_at

HEIGHT, WIDTH, NUM_FRAMES = 120, 180, 24
CUT = 10


def scene(seed: int, contrast: float = 1.0) -> np.ndarray:
    """A picture of soft shapes, wider than a frame, as floats of 0 … 255."""
    coarse = np.random.default_rng(seed).integers(20, 235, (12, 40, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((WIDTH * 3, HEIGHT), Image.Resampling.BICUBIC), float)
    return 128 + (picture - 128) * contrast


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH * 3, 3)).astype(float)


def pan(picture: np.ndarray, pixels: int, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Frames of a camera that moves over a picture by so many pixels a frame."""
    return np.stack([picture[:, index * pixels :][:, :WIDTH] for index in range(num_frames)])


def with_grain(frames: np.ndarray) -> np.ndarray:
    """As a camera gives them: rounded, with a little noise."""
    grain = np.random.default_rng(9).normal(0, 2, frames.shape)
    return np.clip(np.round(frames + grain), 0, 255).astype(np.uint8)


def cuts(frames: np.ndarray, times_shown: int = 1) -> list[int]:
    """Numbers of the frames at which look_at finds a new scene; each frame may stand several times."""
    shown = np.repeat(with_grain(frames), times_shown, axis=0)
    return [int(time) for time in look_at(shown, np.arange(len(shown))).cuts]


@pytest.mark.parametrize("speed", [0, 1, 4])
def test_a_hard_cut_is_found_at_its_frame(speed: int) -> None:
    frames = np.concatenate([pan(scene(1), speed, CUT), pan(scene(2), speed, NUM_FRAMES - CUT)])
    assert cuts(frames) == [CUT]


def test_each_of_several_cuts_is_found() -> None:
    frames = np.concatenate([pan(scene(seed), 1, 8) for seed in (1, 2, 3)])
    assert cuts(frames) == [8, 16]


def test_a_cut_is_found_between_bars_that_stay_black() -> None:
    frames = np.concatenate([pan(scene(1), 1, CUT), pan(scene(2), 1, CUT)])
    frames[:, :30] = frames[:, -30:] = 0  # half of the picture
    assert cuts(frames) == [CUT]


def test_a_cut_over_a_blended_frame_is_one_cut() -> None:
    before, after = pan(scene(1), 1, CUT), pan(scene(2), 1, CUT)
    between = (before[-1:] + after[:1]) / 2
    assert cuts(np.concatenate([before, between, after])) == [CUT]


def test_a_cut_is_found_where_frames_stand_twice_or_thrice() -> None:
    frames = np.concatenate([pan(scene(1), 3, 6), pan(scene(2), 3, 6)])
    assert cuts(frames, times_shown=3) == [18]


@pytest.mark.parametrize("speed", [1, 5, 12])
def test_a_pan_is_no_cut_however_fast(speed: int) -> None:
    assert cuts(pan(scene(1), speed)) == []
    assert cuts(pan(noise(1), speed)) == []


def test_a_pan_that_sets_in_or_stops_suddenly_is_no_cut() -> None:
    for picture in (scene(1), noise(1)):
        still = np.repeat(picture[None, :, :WIDTH], 12, axis=0)
        assert cuts(np.concatenate([still, pan(picture, 9, 12)])) == []
        assert cuts(np.concatenate([pan(picture, 9, 12)[::-1], still])) == []


@pytest.mark.parametrize("times_shown", [2, 3])
def test_a_fast_pan_whose_frames_stand_several_times_is_no_cut(times_shown: int) -> None:
    assert cuts(pan(scene(1), 25, 12), times_shown) == []


def test_a_fade_and_a_long_dissolve_are_no_cuts() -> None:
    share = np.linspace(1, 0, NUM_FRAMES)[:, None, None, None]
    one, other = pan(scene(1), 1), pan(scene(2), 1)
    assert cuts(one * share) == []
    assert cuts(one * share + other * (1 - share)) == []


@pytest.mark.parametrize("length", [1, 2])
def test_a_flash_is_no_cut(length: int) -> None:
    frames = pan(scene(1, contrast=0.5), 2)
    frames[CUT : CUT + length] = 250
    assert cuts(frames) == []


def test_a_moving_square_is_no_cut() -> None:
    frames = np.full((NUM_FRAMES, HEIGHT, WIDTH, 3), 30.0)
    for index in range(NUM_FRAMES):
        frames[index, 30:90, 5 * index : 5 * index + 60] = 220
    assert cuts(frames) == []
    assert cuts(Scene("red", "square", "moving left", "dark").render().astype(float)) == []


def test_a_small_jump_of_the_light_is_no_cut() -> None:
    frames = pan(scene(1, contrast=0.8), 0)
    frames[CUT:] += 14
    assert cuts(frames) == []


def test_what_appears_before_a_background_that_stays_is_no_cut() -> None:
    frames = pan(scene(1), 0)
    frames[CUT:, :, :70] = scene(2)[:, :70]  # two fifths of the picture
    assert cuts(frames) == []


def test_too_few_frames_to_compare_are_no_problem() -> None:
    for num_frames in (1, 2):
        impression = look_at(with_grain(pan(scene(1), 4, num_frames)), np.arange(num_frames))
        assert impression.cuts == () and not impression.is_static and not impression.is_black


def test_the_time_of_a_cut_is_that_of_its_frame() -> None:
    frames = np.concatenate([pan(scene(1), 1, 4), pan(scene(2), 1, 4)])
    assert look_at(with_grain(frames), 7 + np.arange(8) / 8).cuts == (7.5,)


def test_black_is_no_light_in_all_frames() -> None:
    def is_black(frames: np.ndarray) -> bool:
        return look_at(with_grain(frames), np.arange(len(frames))).is_black

    black = np.full((8, HEIGHT, WIDTH, 3), 3.0)
    assert is_black(black)
    one_lit = black.copy()
    one_lit[4] = scene(1)[:, :WIDTH]
    assert not is_black(one_lit)
    stars = black.copy()
    stars[:, 20:40, 20:40] = 120
    assert not is_black(stars)
    assert not is_black(black + 20)


def test_static_is_no_movement_anywhere() -> None:
    def is_static(frames: np.ndarray) -> bool:
        return look_at(with_grain(frames), np.arange(len(frames))).is_static

    still = np.repeat(scene(1)[None, :, :WIDTH], 8, axis=0)
    # Grain is averaged over cells, of which these small frames have few pixels; real ones have 100.
    still = still.repeat(4, axis=1).repeat(4, axis=2)
    assert is_static(still)
    moving = still.copy()
    for index in range(8):
        moving[index, 100:112, 20 * index : 20 * index + 12] += 60
    assert not is_static(moving)
    assert not is_static(still * np.linspace(1, 0.8, 8)[:, None, None, None])

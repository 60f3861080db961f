"""The demo's world: what a caption says is what is seen."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from cogvideox_factory.data.video import read_timeline
from cogvideox_factory.demo.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    NATIVE_SIZE,
    PROMPTS,
    ROUND,
    SHAPES,
    STYLES,
    Pose,
    Scene,
    all_scenes,
    distance_to,
    render_clips,
)


def covered(scene: Scene) -> np.ndarray:
    """Where the shape is: pixels nearer to its colour than to the background, (frames, height, width)."""
    frames = scene.render(NATIVE_SIZE).astype(float)
    to_shape, to_background = (
        np.abs(frames - np.array(colour)).sum(-1) for colour in (COLOURS[scene.colour], BACKGROUNDS[scene.background])
    )
    return to_shape < to_background


def middle(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(0)


@pytest.mark.parametrize(
    ("motion", "down", "right"),
    [("moving left", 0, -1), ("moving right", 0, 1), ("moving up", -1, 0), ("moving down", 1, 0)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_goes_where_its_caption_says(shape: str, motion: str, down: int, right: int) -> None:
    mask = covered(Scene("red", shape, motion, "light"))
    travelled = middle(mask[-1]) - middle(mask[0])
    away = np.array([down, right]) * np.array([0.5 * 64, 0.5 * 96])
    assert np.allclose(travelled, away, atol=3)  # tips may leave the picture


@pytest.mark.parametrize("shape", SHAPES)
def test_growing_shrinking_and_turning_are_seen_in_place(shape: str) -> None:
    grows = covered(Scene("blue", shape, "growing", "grey")).sum((1, 2))
    shrinks = covered(Scene("blue", shape, "shrinking", "grey")).sum((1, 2))
    assert (np.diff(grows) >= 0).all() and grows[-1] > 5 * grows[0]
    assert np.array_equal(shrinks, grows[::-1])
    turns = covered(Scene("blue", shape, "turning", "grey"))
    assert np.ptp(turns.sum((1, 2))) < 0.15 * turns[0].sum()
    assert (turns[0] == turns[4]).all() == (shape in ROUND)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_distance_is_negative_inside_and_one_away_is_one_further(shape: str) -> None:
    still = distance_to(shape, Pose(), 64, 64)
    assert still[0, 0] > 0 > still.min()
    slope = np.hypot(*np.gradient(still))
    assert np.quantile(slope, 0.9) < 1.2  # nowhere does it change faster than one goes


def test_every_scene_has_a_caption_of_its_own() -> None:
    scenes = all_scenes()
    captions = {scene.caption for scene in scenes}
    everything = itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    assert len(captions) == len(scenes) == sum(not (m == "turning" and s in ROUND) for _, s, m, _ in everything)
    assert Scene("red", "star", "turning", "light").caption == "a red star turning on a light background"


def test_a_style_is_the_same_scene_in_another_look() -> None:
    scene = Scene("green", "ring", "moving down", "brown")
    looks = {style: scene.render(NATIVE_SIZE, style).astype(int) for style in STYLES}
    assert np.abs(looks["flat"] - looks["neon"]).mean() > 50
    brightest = [middle(looks["neon"][index].sum(-1) > 300) for index in (0, -1)]
    shape = covered(scene)
    assert np.allclose(brightest, [middle(shape[0]), middle(shape[-1])], atol=1.5)


def test_a_part_of_a_scene_is_what_the_whole_has_there() -> None:
    scene = Scene("pink", "cross", "moving left", "dark")
    assert np.array_equal(scene.render(part=range(3, 7)), scene.render()[3:7])


def test_clips_are_written_with_their_lists(tmp_path: Path) -> None:
    scenes = all_scenes()[:2]
    render_clips(tmp_path, scenes, NATIVE_SIZE, "neon")
    names = (tmp_path / "videos.txt").read_text().splitlines()
    assert (tmp_path / "prompts.txt").read_text().splitlines() == [scene.caption for scene in scenes]
    timelines = [read_timeline(tmp_path / name) for name in names]
    assert [(len(t.times), t.height, t.width) for t in timelines] == [NATIVE_SIZE] * 2


def test_the_small_data_set_has_a_dozen_different_captions() -> None:
    assert len(set(PROMPTS)) == 12

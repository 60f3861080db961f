"""Renders a small data set: one coloured shape that moves over a plain background, and a caption that says so."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from cogvideox_factory.data.video import write_video

NUM_FRAMES, HEIGHT, WIDTH, FPS = 25, 96, 144, 8
COLOURS = {"red": (220, 50, 47), "yellow": (240, 200, 40), "blue": (50, 110, 230), "green": (60, 170, 80)}
SHAPES = ("square", "circle", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
BACKGROUND = (24, 26, 32)


def _caption(colour: str, shape: str, direction: str) -> str:
    return f"a {colour} {shape} moving {direction} on a dark background"


def _scenes() -> list[tuple[str, str, str]]:
    """A dozen scenes: every colour with every shape, and directions in turn."""
    pairs = itertools.product(COLOURS, SHAPES)
    return [(*pair, direction) for pair, direction in zip(pairs, itertools.cycle(DIRECTIONS), strict=False)]


PROMPTS = [_caption(*scene) for scene in _scenes()]


def render_clips(folder: Path) -> None:
    """Write videos/*.mp4, videos.txt and prompts.txt."""
    names = []
    for number, scene in enumerate(_scenes()):
        names.append(f"videos/{number:02}-{'-'.join(scene)}.mp4")
        write_video(folder / names[-1], render(*scene), FPS)
    (folder / "videos.txt").write_text("\n".join(names) + "\n")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


def render(colour: str, shape: str, direction: str) -> np.ndarray:
    """Frames of a scene, uint8 of shape (frames, height, width, 3)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    frames = np.empty((NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    down, right = DIRECTIONS[direction]
    for index in range(NUM_FRAMES):
        progress = index / (NUM_FRAMES - 1) - 0.5
        y = rows - HEIGHT / 2 - down * progress * HEIGHT * 0.7
        x = columns - WIDTH / 2 - right * progress * WIDTH * 0.7
        coverage = np.clip(0.5 - _distance(shape, y, x, HEIGHT * 0.2), 0, 1)[..., None]  # soft edge of a pixel
        frames[index] = np.round(coverage * COLOURS[colour] + (1 - coverage) * np.array(BACKGROUND))
    return frames


def _distance(shape: str, y: np.ndarray, x: np.ndarray, size: float) -> np.ndarray:
    """Signed distance in pixels to the shape's edge, negative inside."""
    if shape == "circle":
        return np.hypot(y, x) - size
    if shape == "square":
        return np.maximum(abs(y), abs(x)) - size
    assert shape == "triangle", shape
    return np.maximum(y - size, abs(x) * 0.87 - (y + size) * 0.5)

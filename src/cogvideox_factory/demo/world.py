"""Renders the demo's small world: one coloured shape that moves over a plain background, and a caption that says so."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogvideox_factory.data.video import write_video

NUM_FRAMES, HEIGHT, WIDTH, FPS = 25, 96, 144, 8
NATIVE_SIZE = (17, 64, 96)  # of the tiny model

COLOURS = {
    "red": (220, 50, 47),
    "yellow": (240, 200, 40),
    "blue": (50, 110, 230),
    "green": (60, 170, 80),
    "orange": (240, 130, 30),
    "pink": (240, 130, 180),
    "purple": (140, 70, 190),
    "cyan": (60, 200, 210),
}
BACKGROUNDS = {"dark": (24, 26, 32), "light": (232, 228, 220), "brown": (110, 76, 50), "grey": (120, 122, 128)}
RADIUS, TRAVEL = 0.26, 0.25  # of the picture's height; of its height or width, either side of the middle

Size = tuple[int, int, int]
Array = np.ndarray


@dataclass(frozen=True)
class Pose:
    """Where a shape is: offset from the middle as a share of the picture, turn in radians, radius in RADIUS."""

    down: float = 0.0
    right: float = 0.0
    turn: float = 0.0
    scale: float = 1.0


# From progress, -0.5 at the first frame and 0.5 at the last.
MOTIONS: dict[str, Callable[[float], Pose]] = {
    "moving left": lambda progress: Pose(right=-2 * TRAVEL * progress),
    "moving right": lambda progress: Pose(right=2 * TRAVEL * progress),
    "moving up": lambda progress: Pose(down=-2 * TRAVEL * progress),
    "moving down": lambda progress: Pose(down=2 * TRAVEL * progress),
    "growing": lambda progress: Pose(scale=1.0 + progress),
    "shrinking": lambda progress: Pose(scale=1.0 - progress),
    "turning": lambda progress: Pose(turn=np.pi * (progress + 0.5)),
}


def _star(y: Array, x: Array) -> Array:
    """A star of five points: the nearest of ten edges, by folding the plane onto one half of a point."""
    angle = np.arctan2(x, -y)
    folded = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(y, x)
    py, px = radius * np.cos(folded), radius * np.sin(folded)
    tip, notch = np.array([1.15, 0.0]), 0.5 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = notch - tip
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    side = (py - tip[0]) * normal[0] + (px - tip[1]) * normal[1]
    return -side


def _box(y: Array, x: Array, half_height: float, half_width: float) -> Array:
    return np.maximum(abs(y) - half_height, abs(x) - half_width)


# Signed distance to the edge of a shape of radius 1, negative inside.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "square": lambda y, x: _box(y, x, 0.9, 0.9),
    "circle": lambda y, x: np.hypot(y, x) - 1,
    "triangle": lambda y, x: np.maximum(y - 0.8, abs(x) * 0.87 - (y + 1.1) * 0.5),
    "star": _star,
    "cross": lambda y, x: np.minimum(_box(y, x, 1.05, 0.4), _box(y, x, 0.4, 1.05)),
    "ring": lambda y, x: abs(np.hypot(y, x) - 0.8) - 0.28,
}
ROUND = ("circle", "ring")  # which nobody sees turning

# --- styles: from the distance to the edge in 64ths of the picture's height, (height, width), and the colours of shape
# and background, (3,), to pixels from 0 to 255, (height, width, 3) ---


def flat(distance: Array, colour: Array, background: Array) -> Array:
    """Filled with one colour; the edge is as soft as a pixel of a picture 64 pixels high."""
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    return coverage * colour + (1 - coverage) * background


def neon(distance: Array, colour: Array, background: Array) -> Array:
    """At night: nothing of the background is seen, and of the shape its edge, as a tube of light."""
    away = abs(distance)[..., None]
    tube = np.clip(2.6 - away, 0, 1)
    glow = np.exp(-np.maximum(away - 2, 0) / 4)
    night = np.array([10.0, 8.0, 22.0])
    return night + (1 - tube) * glow * 0.75 * colour + tube * (0.55 * colour + 0.45 * 255 - night)


STYLES = {"flat": flat, "neon": neon}


@dataclass(frozen=True)
class Scene:
    """What a clip shows; its caption says all of it."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion} on a {self.background} background"

    @property
    def name(self) -> str:
        return "-".join(dataclasses.astuple(self)).replace(" ", "-")

    def render(
        self, size: Size = (NUM_FRAMES, HEIGHT, WIDTH), style: str = "flat", part: Sequence[int] | None = None
    ) -> Array:
        """Frames, all or those of a part, as uint8 of shape (frames, height, width, 3)."""
        frames, height, width = size
        part = range(frames) if part is None else part
        pictures = np.empty((len(part), height, width, 3), dtype=np.uint8)
        colour, background = np.array(COLOURS[self.colour], float), np.array(BACKGROUNDS[self.background], float)
        for index, picture in zip(part, pictures, strict=True):
            pose = MOTIONS[self.motion](index / (frames - 1) - 0.5)
            distance = distance_to(self.shape, pose, height, width)
            picture[:] = np.clip(np.round(STYLES[style](distance, colour, background)), 0, 255)
        return pictures


def distance_to(shape: str, pose: Pose, height: int, width: int) -> Array:
    """Distance of each pixel to the edge of the shape, in 64ths of the height; of shape (height, width)."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    y = rows / height - 0.5 - pose.down
    x = (columns - width / 2) / height - pose.right * width / height
    radius = RADIUS * pose.scale
    cosine, sine = np.cos(pose.turn), np.sin(pose.turn)
    return SHAPES[shape]((cosine * y - sine * x) / radius, (sine * y + cosine * x) / radius) * radius * 64


def all_scenes() -> list[Scene]:
    """Every scene of this world, in a fixed order."""
    scenes = itertools.starmap(Scene, itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS))
    return [scene for scene in scenes if not (scene.motion == "turning" and scene.shape in ROUND)]


def _dozen() -> list[Scene]:
    """Four colours with three shapes each, and directions in turn."""
    pairs = itertools.product(itertools.islice(COLOURS, 4), itertools.islice(SHAPES, 3))
    motions = itertools.cycle(itertools.islice(MOTIONS, 4))
    return [Scene(*pair, motion, "dark") for pair, motion in zip(pairs, motions, strict=False)]


SCENES = _dozen()
PROMPTS = [scene.caption for scene in SCENES]


def render_clips(
    folder: Path, scenes: Iterable[Scene] = SCENES, size: Size = (NUM_FRAMES, HEIGHT, WIDTH), style: str = "flat"
) -> None:
    """Write videos/*.mp4, videos.txt and prompts.txt."""
    scenes = list(scenes)
    names = [f"videos/{number:02}-{scene.name}.mp4" for number, scene in enumerate(scenes)]
    for name, scene in zip(names, scenes, strict=True):
        write_video(folder / name, scene.render(size, style), FPS)
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "prompts.txt").write_text("".join(f"{scene.caption}\n" for scene in scenes))

"""Looks at frames for what a person would see at a glance: that they are black, that nothing moves, that a scene ends.

Cuts are found by the difference between successive frames, measured so that movement counts little. Rejected: OpenCV
and scene detection libraries, a heavy dependency for one sum over small grey pictures; and a fixed threshold on plain
differences, which takes every fast pan for a cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

# Frames, as grey pictures of about so many cells in the shorter direction; light is 0 … 255.
GREY_CELLS = 48
BLACK_MEAN, BLACK_SPREAD = 10.0, 5.0
STATIC_RANGE = 6.0  # what compression and grain leave of a still picture, once averaged over a cell

# Tuned on the 1928 animation of the original's example set and on generated clips of a galloping horse and a train.
HELD_DIFFERENCE = 0.5  # of frames that stand twice, as animation and low rates have them
CUT_DIFFERENCE = 5.0
CUT_RATIO = 4.0  # to the median difference around it
CUT_SHARE = 0.55  # of the cells that are not black before and after
CUT_NEIGHBOURS = 4
FLASH_FRAMES = 2


@dataclass(frozen=True)
class Impression:
    """What successive frames look like."""

    is_black: bool
    is_static: bool
    cuts: tuple[float, ...]  # when a new scene begins


def look_at(frames: np.ndarray, times: np.ndarray) -> Impression:
    """Impression of RGB frames, uint8 of shape (frames, height, width, 3), that are shown at these times."""
    grey = to_grey(frames)
    return Impression(is_black(grey), is_static(grey), tuple(float(times[index]) for index in find_cuts(grey)))


def to_grey(frames: np.ndarray) -> np.ndarray:
    """Small grey pictures of RGB frames, float32 of shape (frames, rows, columns)."""
    cell = max(1, min(frames.shape[1:3]) // GREY_CELLS)
    small = (Image.fromarray(np.ascontiguousarray(frame)).convert("L").reduce(cell) for frame in frames)
    return np.stack([np.asarray(picture, np.float32) for picture in small])


def is_black(grey: np.ndarray) -> bool:
    """Whether nearly no light is in any frame."""
    return bool((grey.mean((1, 2)) < BLACK_MEAN).all() and (grey.std((1, 2)) < BLACK_SPREAD).all())


def is_static(grey: np.ndarray) -> bool:
    """Whether no cell of the picture ever changes."""
    return len(grey) > 1 and float(np.ptp(grey, axis=0).max()) < STATIC_RANGE


def find_cuts(grey: np.ndarray) -> list[int]:
    """Numbers of the frames that a new scene begins with; not 0."""
    if len(grey) < 2:
        return []
    reach = _reach(grey)
    difference = np.array([_difference(grey, reach, index, index + 1) for index in range(len(grey) - 1)])
    moving = [index for index in range(len(grey) - 1) if abs(grey[index + 1] - grey[index]).mean() > HELD_DIFFERENCE]
    cuts: list[int] = []
    for position, index in enumerate(moving):
        before = moving[max(0, position - CUT_NEIGHBOURS) : position]
        around = difference[before + moving[position + 1 : position + 1 + CUT_NEIGHBOURS]]
        usual = float(np.median(around)) if len(around) else 0.0
        if difference[index] < max(CUT_DIFFERENCE, CUT_RATIO * usual):
            continue
        if _changed_share(grey[index], grey[index + 1]) < CUT_SHARE or _is_flash(grey, reach, difference, index):
            continue
        if cuts and index + 1 - cuts[-1] <= FLASH_FRAMES:  # a cut that takes a frame or two, as a short dissolve
            continue
        cuts.append(index + 1)
    return cuts


def _reach(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Darkest and lightest cell within two cells of each: what may come here by movement from a frame to the next."""
    padded = np.pad(grey, ((0, 0), (2, 2), (2, 2)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    return around.min((3, 4)), around.max((3, 4))


def _difference(grey: np.ndarray, reach: tuple[np.ndarray, np.ndarray], first: int, second: int) -> float:
    """Mean light by which cells lie outside of what movement explains, both ways."""
    darkest, lightest = reach

    def beyond(one: int, other: int) -> float:
        outside = np.maximum(darkest[other] - grey[one], grey[one] - lightest[other])
        return float(np.maximum(outside, 0).mean())

    return (beyond(first, second) + beyond(second, first)) / 2


def _changed_share(before: np.ndarray, after: np.ndarray) -> float:
    """Share of cells that changed, of those that are not black in both frames, as bars beside a picture are."""
    is_lit = np.maximum(before, after) > 16
    return float((abs(after - before)[is_lit] > 10).mean()) if is_lit.any() else 0.0


def _is_flash(grey: np.ndarray, reach: tuple[np.ndarray, np.ndarray], difference: np.ndarray, index: int) -> bool:
    """Whether the old scene is back, or the new one was there before, within a few frames."""
    befores = range(max(0, index - FLASH_FRAMES), index + 1)
    afters = range(index + 1, min(len(grey), index + 2 + FLASH_FRAMES))
    nearest = min(_difference(grey, reach, before, after) for before in befores for after in afters)
    return nearest < difference[index] / 2

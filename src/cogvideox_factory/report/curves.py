"""Curves over the optimizer steps, drawn as SVG: lines stretch to any width, texts keep their size.

Rejected: a plotting library (a slow import for a few line charts, which then ignore phones and dark mode).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cogvideox_factory.report.markup import number, text
from cogvideox_factory.report.reading import Entries, finite

Points = list[tuple[float, float]]  # (step, value)

SLOW = 5  # times the median: a step that is slower (compiling, a disk that woke up) would flatten a chart


@dataclass(frozen=True)
class Curve:
    """A curve of a chart; `style` are classes of page.css, which give it its colour."""

    points: Points
    style: str = ""
    is_noisy: bool = False  # the line is the running mean
    has_dots: bool = False  # a dot a point, besides the line


def points_of(entries: Entries, key: str) -> Points:
    """What can be drawn of a value over the steps."""
    pairs = [(finite(entry.get("step")), finite(entry.get(key))) for entry in entries]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def without_slow(seconds: Points) -> Points:
    """The steps that took no more than SLOW times the median."""
    limit = SLOW * statistics.median([value for _, value in seconds] or [0])
    return [point for point in seconds if point[1] <= limit]


def chart(key: str, title: str, curves: Sequence[Curve], remark: str = "", from_zero: bool = False) -> str:
    """Curves on the same axes; without any point, only the caption. `key` is the class of the figure."""
    small = f" <small>{text(remark)}</small>" if remark else ""
    caption = f"<figcaption>{text(title)}{small}</figcaption>"
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return f"<figure>{caption}</figure>\n"

    drawn = [point for curve in curves for point in curve.points]
    last_step = max(1.0, *(step for step, _ in drawn))
    values = [value for _, value in drawn]
    ticks = _round_ticks(0 if from_zero else min(values), max(values))

    def across(step: float) -> str:
        return f"{100 * step / last_step:.2f}"

    def down(value: float) -> str:
        return f"{100 * (ticks[-1] - value) / (ticks[-1] - ticks[0]):.2f}"

    def places(points: Points) -> list[str]:
        return [f"{across(step)} {down(value)}" for step, value in _thinned(points)]

    def paths(curve: Curve) -> str:
        line = "M" + "L".join(places(_smoothed(curve.points) if curve.is_noisy else curve.points))
        # A line of one point is none, so that is a dot.
        dots = places(curve.points) if curve.has_dots or len(curve.points) == 1 else []
        drawing = "".join(f"M{place}h.01" for place in dots)
        own = f" {curve.style}" if curve.style else ""
        return f'<path class="dots{own}" d="{drawing}"/><path class="line{own}" d="{line}"/>'

    axes = [
        f'<line x2="100%" y1="{down(tick)}%" y2="{down(tick)}%"/>'
        f'<text y="{down(tick)}%" dx="-8" dy=".32em" text-anchor="end">{number(tick)}</text>'
        for tick in ticks
    ] + [
        f'<text x="{across(tick)}%" y="100%" dy="1.7em" text-anchor="middle">{tick:,.0f}</text>'
        for tick in _round_ticks(0, last_step)
        if tick <= last_step and tick.is_integer()
    ]
    return f"""<figure class="chart {key}">{caption}
<svg role="img" aria-label="{text(title)} by step">{"".join(axes)}
<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">
{"".join(map(paths, curves))}</svg></svg></figure>
"""


def _round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about five of them, that enclose the range."""
    size = max(abs(low), abs(high), 1e-30)
    if high - low < 1e-3 * size:  # a flat line is drawn in the middle
        low, high = low - size, high + size
    wanted = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= 0.999 * wanted)
    return [step * index for index in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _smoothed(points: Points) -> Points:
    """Running mean with exponential weights, taken forwards and then backwards, so that it does not lag behind."""
    keep = 1 - 1 / max(3, len(points) / 40)
    for _ in range(2):
        total = weight = 0.0
        means = []
        for step, value in points:
            total, weight = keep * total + value, keep * weight + 1
            means.append((step, total / weight))
        points = means[::-1]
    return points


def _thinned(points: Points) -> Points:
    """A thousand points at the most: the lowest and highest of each stretch, so that no spike is lost."""
    length = math.ceil(len(points) / 500)
    stretches = [points[start : start + length] for start in range(0, len(points), length)]
    ordered = [sorted(stretch, key=lambda point: point[1]) for stretch in stretches]
    return [point for stretch in ordered for point in sorted({stretch[0], stretch[-1]})]

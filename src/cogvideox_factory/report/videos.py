"""Videos in a page: the same prompt at several steps or of several runs, as one player that holds them in step.

Each row is an <article class="sample">; page.js makes it a player, and without scripts its videos just play.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from cogvideox_factory.report.markup import quiet, section, text
from cogvideox_factory.report.reading import SampleKey, VideosByStep

MAX_BETWEEN = 6  # videos of a film strip, besides the first and the last
MAX_PLAYERS = 60  # a browser refuses to show many more videos in one page (Chromium: 75)
CONTROLS = (  # shown by the script
    '<div class="controls" hidden><button type="button">Pause</button>'
    '<input type="range" min="0" max="1000" value="0" aria-label="Place in the videos"/></div>'
)


def samples_section(title: str, samples: Sequence[str], left_out: int) -> str:
    """A section of samples, whose heading has the button that plays them all, and how many there was no room for."""
    button = ' <button id="play" type="button" hidden>Pause all</button>' if len(samples) > 1 else ""
    remark = [quiet(f"Prompts left out here: {left_out}")] if left_out else []
    return section(title + button, *samples, *remark)


def sample(key: SampleKey, *parts: str) -> str:
    prompt, seed, _ = key
    return (
        f'<article class="sample">\n<p>{text(prompt)} <small>seed&nbsp;{text(seed)}</small></p>\n'
        f"{''.join(parts)}</article>"
    )


def sample_by_step(key: SampleKey, videos: VideosByStep, num_samples: int) -> str:
    """The model before the training beside its latest video, and what came between as a film strip.

    `num_samples` is how many of these the page has.
    """
    latest = max(videos)
    between = [step for step in sorted(videos) if 0 < step < latest]
    shown = _evenly(between, max(0, min(MAX_BETWEEN, MAX_PLAYERS // num_samples - 4)))
    left_out = len(between) - len(shown)
    remark = f"<p><small>Steps left out here, in the folder validation: {left_out}</small></p>" if left_out else ""
    before = _figure(videos[0], "Before training") if 0 in videos else _missing("from before the training")
    after = _figure(videos[latest], step_label(latest)) if latest else _missing("from the training yet")
    # page.js puts the first and the last of all into the strip as well, so the file need not hold them twice.
    frames = "".join(_figure(videos[step], step_label(step)) for step in shown)
    strip = f'<div class="strip">{frames}</div>\n' if shown else ""
    return sample(key, f'<div class="pair">{before}{after}</div>\n', CONTROLS, strip, remark)


def sample_by_run(key: SampleKey, latest: Sequence[tuple[str, str, bytes | None]]) -> str:
    """A prompt as several runs show it: of each a label, the classes of its label, its latest video if any."""
    figures = [
        _missing(f"of {label}") if video is None else _figure(video, label, style) for label, style, video in latest
    ]
    return sample(key, f'<div class="row">{"".join(figures)}</div>\n', CONTROLS)


def step_label(step: int) -> str:
    return f"Step {step:,}" if step else "Before training"


def _evenly(steps: list[int], count: int) -> list[int]:
    """`count` of the steps, as evenly spread as they allow, or all where there are fewer."""
    if len(steps) <= count:
        return steps
    return [steps[(2 * index + 1) * len(steps) // (2 * count)] for index in range(count)]


def _figure(video: bytes, label: str, style: str = "") -> str:
    source = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
    key = f'<span class="key {style}"></span>' if style else ""
    return (
        f'\n<figure><video src="{source}" autoplay loop muted playsinline></video>'
        f"<figcaption>{key}{text(label)}</figcaption></figure>"
    )


def _missing(what: str) -> str:
    return f'\n<figure class="missing">No video {text(what)}.</figure>'

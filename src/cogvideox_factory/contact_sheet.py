"""Draws contact sheets: rows of frames with their captions, as one PNG to glance at and one HTML file to search in.

It knows of thumbnails and texts only, not of data sets. The HTML opens offline and holds its frames, so that one file
can be mailed. Rejected: matplotlib (seconds to import, and it resamples the frames that the sheet is to show).
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAMES_A_ROW = 8
THUMBNAIL_SIDE = 192  # pixels of the longer side

MARGIN, GAP, ROW_GAP = 24, 6, 34
SHEET_WIDTH = 2 * MARGIN + FRAMES_A_ROW * THUMBNAIL_SIDE + (FRAMES_A_ROW - 1) * GAP
HEADING_SIZE, TEXT_SIZE, SMALL_SIZE = 24, 15, 13
CAPTION_LINES = 6  # of the PNG; the HTML holds captions whole
PAPER, INK, QUIET, RULE, WARNING, WARNING_PAPER = "#fcfcfb", "#1d2126", "#646b75", "#e3e4e6", "#a4480f", "#fbeee3"

# Each text is drawn in the first of these that has all of its characters; Pillow's own font has Latin ones only.
FONT_FILES = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "NotoSansSC-Regular.ttf"),
    *("SourceHanSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Medium.ttc", "Arial Unicode.ttf"),
    *("msyh.ttc", "simsun.ttc", "malgun.ttf"),
)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Frame:
    """A thumbnail and when the frame is shown."""

    seconds: float
    image: np.ndarray  # uint8, (height, width, 3), as `make_thumbnail` gives it


@dataclass(frozen=True)
class Badge:
    """A problem of a row: a word or two, and a sentence."""

    label: str
    detail: str


@dataclass(frozen=True)
class Row:
    """Some seconds of a clip."""

    source: str
    details: str
    caption: str
    badges: tuple[Badge, ...]
    frames: tuple[Frame, ...]  # of one size


@dataclass(frozen=True)
class Sheet:
    """All that a sheet shows."""

    title: str
    summary: str
    rows: Sequence[Row]
    skipped: Sequence[tuple[str, str]]  # clips that have no row, and why


def choose_frames(num_frames: int) -> list[int]:
    """Which frames a row shows: the first, the last, and what lies evenly between them."""
    return sorted({round(position) for position in np.linspace(0, num_frames - 1, FRAMES_A_ROW)})


def make_thumbnail(image: np.ndarray) -> np.ndarray:
    """A frame at the size of the sheet, its shape kept; a small one as it is."""
    height, width = image.shape[:2]
    scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
    if scale == 1:
        return np.array(image)  # a copy, so that the frames that it was cut from can go
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3))


# The PNG. Each row is drawn on a strip of its own, so that nothing has to know heights in advance.


def draw_png(sheet: Sheet) -> bytes:
    """The sheet as one picture."""
    strips = [_heading_strip(sheet), *(_row_strip(row) for row in sheet.rows)]
    page = Image.new("RGB", (SHEET_WIDTH, sum(strip.height for strip in strips)), PAPER)
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    content = io.BytesIO()
    page.save(content, "PNG")
    return content.getvalue()


def _heading_strip(sheet: Sheet) -> Image.Image:
    strip = _Strip()
    strip.write(sheet.title, HEADING_SIZE, INK, max_lines=1)
    strip.write(sheet.summary, TEXT_SIZE, QUIET)
    strip.top += ROW_GAP // 2
    return strip.finish()


def _row_strip(row: Row) -> Image.Image:
    strip = _Strip()
    strip.canvas.line((MARGIN, 0, SHEET_WIDTH - MARGIN, 0), RULE)
    strip.top = ROW_GAP // 2
    strip.write(row.source, TEXT_SIZE, INK, max_lines=1)
    strip.write(row.details, SMALL_SIZE, QUIET, max_lines=1)
    strip.write_badges([badge.label for badge in row.badges])
    strip.top += GAP
    left = MARGIN
    for frame in row.frames:
        strip.put_frame(frame, left)
        left += frame.image.shape[1] + GAP
    strip.top += row.frames[0].image.shape[0] + 2
    strip.top += SMALL_SIZE + 2 * GAP  # the time stamps
    strip.write(row.caption, TEXT_SIZE, INK, max_lines=CAPTION_LINES)
    strip.top += ROW_GAP // 2
    return strip.finish()


class _Strip:
    """A part of the page that is filled from its top; `finish` cuts off what is left."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (SHEET_WIDTH, 1000), PAPER)
        self.canvas = ImageDraw.Draw(self.image)
        self.top = MARGIN

    def write(self, text: str, size: int, colour: str, max_lines: int = 3) -> None:
        text = _printable(text)
        font = _font_for(text, size)
        for line in _wrap(text, font.getlength, SHEET_WIDTH - 2 * MARGIN, max_lines):
            self.canvas.text((MARGIN, self.top), line, colour, font)
            self.top += round(size * 1.4)

    def write_badges(self, labels: Sequence[str]) -> None:
        if not labels:
            return
        self.top += 4
        left, height = float(MARGIN), SMALL_SIZE + 10
        for label in labels:
            font = _font_for(label, SMALL_SIZE)
            width = font.getlength(label) + 18
            if left + width > SHEET_WIDTH - MARGIN:
                left, self.top = MARGIN, self.top + height + 4
            box = (left, self.top, left + width, self.top + height)
            self.canvas.rounded_rectangle(box, height / 2, WARNING_PAPER, WARNING)
            self.canvas.text((left + 9, self.top + height / 2), label, WARNING, font, anchor="lm")
            left += width + GAP
        self.top += height

    def put_frame(self, frame: Frame, left: int) -> None:
        self.image.paste(Image.fromarray(frame.image), (left, self.top))
        stamp = f"{frame.seconds:.2f} s"
        place = (left, self.top + frame.image.shape[0] + 3)
        self.canvas.text(place, stamp, QUIET, _font_for(stamp, SMALL_SIZE))

    def finish(self) -> Image.Image:
        return self.image.crop((0, 0, SHEET_WIDTH, self.top))


def _printable(text: str) -> str:
    """One line without control characters and halves of characters, which fonts and terminals choke on."""
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))


def _wrap(text: str, length: Callable[[str], float], width: float, max_lines: int) -> list[str]:
    """Lines no longer than `width`, broken between words, or anywhere in Chinese and in overlong words."""
    pieces = re.findall(r"[^\s\u2e80-\uffef]{1,40}\s*|\S\s*", text)
    lines = [""]
    for piece in pieces:
        if length((lines[-1] + piece).rstrip()) <= width or not lines[-1]:
            lines[-1] += piece
        elif len(lines) < max_lines:
            lines.append(piece)
        else:
            while length(lines[-1] + "…") > width:
                lines[-1] = lines[-1][:-1]
            lines[-1] = lines[-1].rstrip() + "…"
            break
    return [line.rstrip() for line in lines if line]


@functools.cache
def _fonts(size: int) -> tuple[Font, ...]:
    found: list[Font] = []
    for name in FONT_FILES:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return (*found, ImageFont.load_default(size))


@functools.cache
def _can_draw(font: Font, character: str) -> bool:
    missing = bytes(font.getmask("\U0010ffff"))  # no character: what a font draws for those that it lacks
    return character.isspace() or bytes(font.getmask(character)) != missing


def _font_for(text: str, size: int) -> Font:
    """The font that lacks the fewest characters of a text."""
    characters = set(text)
    return max(_fonts(size), key=lambda font: sum(_can_draw(font, character) for character in characters))


# The HTML. Every text passes through _text on its way into the page.


def draw_html(sheet: Sheet) -> str:
    """The sheet as one HTML file."""
    skipped = "".join(f"<tr><td>{_text(source)}</td><td>{_text(why)}</td></tr>\n" for source, why in sheet.skipped)
    table = f'<section id="skipped"><h2>Skipped clips</h2>\n<table>\n{skipped}</table></section>' if skipped else ""
    # With this policy the browser itself refuses to fetch or to run anything.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(sheet.title)} · CogVideoX Factory</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="quiet">CogVideoX Factory · contact sheet</p>
<h1>{_text(sheet.title)}</h1>
<p>{_text(sheet.summary)}</p>
</header>
<main>
{"".join(map(_article, sheet.rows))}{table}
</main>
</body>
</html>
"""


def _article(row: Row) -> str:
    figures = "".join(
        f'<figure><img src="{_data_uri(frame.image)}" width="{frame.image.shape[1]}" height="{frame.image.shape[0]}" '
        f'alt=""><figcaption>{frame.seconds:.2f} s</figcaption></figure>\n'
        for frame in row.frames
    )
    problems = "".join(f"<li><b>{_text(badge.label)}</b> {_text(badge.detail)}</li>\n" for badge in row.badges)
    return (
        f'<article>\n<h2>{_text(row.source)} <small>{_text(row.details)}</small></h2>\n<div class="strip">\n{figures}'
        f"</div>\n<p>{_text(row.caption)}</p>\n{f'<ul>{problems}</ul>' if problems else ''}</article>\n"
    )


def _data_uri(image: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _text(value: str) -> str:
    return escape(_printable(value))


STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1d2126; --quiet: #646b75; --rule: #e3e4e6;
  --warning: #a4480f; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --ink: #e5e7ea; --quiet: #979ea9;
  --rule: #2c3036; --warning: #f0a06a; } }
* { box-sizing: border-box; margin: 0; }
body { max-width: 104rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin-bottom: .5rem; }
h2 { font-size: 1rem; margin-bottom: .6rem; }
article, section { margin-top: 1.5rem; padding-top: 1.25rem; border-top: 1px solid var(--rule); }
small, .quiet, figcaption { color: var(--quiet); font-size: .85rem; font-weight: 400; }
.strip { display: grid; grid-template-columns: repeat(8, minmax(0, max-content)); gap: .4rem; }
img { display: block; max-width: 100%; height: auto; border-radius: 3px; }
article p { max-width: 70rem; margin-top: .5rem; }
ul { margin-top: .5rem; padding: 0; list-style: none; color: var(--warning); font-size: .9rem; }
b { display: inline-block; padding: 0 .6rem; margin-right: .4rem; border: 1px solid; border-radius: 1rem;
  font-weight: 500; }
table { border-collapse: collapse; font-size: .9rem; }
td { padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
@media (max-width: 48rem) { .strip { grid-template-columns: repeat(4, minmax(0, max-content)); } }
"""

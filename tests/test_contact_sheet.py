"""Contact sheets of plain coloured frames: their places, sizes and texts."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from cogvideox_factory import contact_sheet
from cogvideox_factory.contact_sheet import Badge, Frame, Row, Sheet, choose_frames, draw_html, draw_png, make_thumbnail

WARNING = (0xA4, 0x48, 0x0F)


def plain(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def row(caption: str = "a caption", badges: tuple[Badge, ...] = (), source: str = "a.mp4") -> Row:
    frames = tuple(Frame(number / 8, plain(60, 90, (0, 255 - 20 * number, 0))) for number in range(8))
    return Row(source, "9x60x90", caption, badges, frames)


def page_of(*rows: Row) -> np.ndarray:
    with Image.open(io.BytesIO(draw_png(Sheet("title", "summary", rows, [])))) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(
    ("num_frames", "expected"), [(1, [0]), (2, [0, 1]), (8, list(range(8))), (49, [0, 7, 14, 21, 27, 34, 41, 48])]
)
def test_frames_of_a_row_hold_the_first_and_the_last(num_frames: int, expected: list[int]) -> None:
    assert choose_frames(num_frames) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 720), (128, 192)), ((720, 480), (192, 128)), ((64, 96), (64, 96)), ((2, 2000), (1, 192))],
)
def test_thumbnails_keep_their_shape_and_small_frames_their_size(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    thumbnail = make_thumbnail(plain(*size, (10, 200, 30)))
    assert thumbnail.shape == (*expected, 3) and thumbnail.dtype == np.uint8
    assert (abs(thumbnail.astype(int) - (10, 200, 30)) <= 1).all()


def test_a_thumbnail_is_a_copy_and_holds_the_frame_upright() -> None:
    frames = np.zeros((3, 64, 96, 3), np.uint8)
    frames[:, :32, :48, 0] = 200  # red in the top left corner
    thumbnail = make_thumbnail(frames[0, :, ::-1])  # mirrored, as a view
    assert not np.shares_memory(thumbnail, frames)
    assert thumbnail[10, 80, 0] == 200 and thumbnail[10, 10, 0] == 0 and thumbnail[50, 80, 0] == 0
    large = make_thumbnail(frames[0].repeat(8, 0).repeat(8, 1))
    assert large.shape == (128, 192, 3) and large[10, 10, 0] > 195 and large[10, 180, 0] < 5 and large[110, 10, 0] < 5


def test_frames_stand_side_by_side_in_their_order() -> None:
    page = page_of(row(), row())
    tops = set()
    for number in range(8):
        rows, columns = np.nonzero((page == (0, 255 - 20 * number, 0)).all(-1))
        assert len(rows) == 2 * 60 * 90  # each pixel of both rows, unchanged
        left = contact_sheet.MARGIN + number * (90 + contact_sheet.GAP)
        assert (columns.min(), columns.max()) == (left, left + 89)
        tops.add((int(rows.min()), int(rows.max())))
    assert len(tops) == 1


def test_every_text_is_drawn_and_badges_in_their_colour() -> None:
    bare = page_of(row(caption="", source="a"))
    assert not (bare == WARNING).all(-1).any()
    assert page_of(row(caption="words", source="a")).shape[0] > bare.shape[0]
    badged = page_of(row(caption="", source="a", badges=(Badge("black", "no light"),)))
    assert (badged == WARNING).all(-1).sum() > 100
    many = page_of(row(caption="", source="a", badges=tuple(Badge(f"problem {index}", "") for index in range(30))))
    assert many.shape[0] > badged.shape[0]  # on lines of their own
    assert not np.array_equal(page_of(row(source="b")), page_of(row(source="c")))


@pytest.mark.parametrize("caption", ["word " * 60, "w" * 300, "一只狗在海滩上" * 40], ids=["words", "word", "Chinese"])
def test_captions_are_wrapped_inside_the_margins(caption: str) -> None:
    page = page_of(row(caption=caption, source=caption))
    assert page.shape[0] > page_of(row(caption="short")).shape[0]
    paper = page[0, 0]
    assert (page[:, : contact_sheet.MARGIN - 2] == paper).all() and (
        page[:, -contact_sheet.MARGIN + 2 :] == paper
    ).all()


def test_an_endless_caption_ends_with_an_ellipsis() -> None:
    lines = contact_sheet._wrap("word " * 100, len, 20, 3)
    assert len(lines) == 3 and lines[0] == "word word word word" and lines[2].endswith("…")
    assert all(len(line) <= 20 for line in lines)
    assert contact_sheet._wrap("狗" * 30, len, 20, 3) == ["狗" * 20, "狗" * 10]
    assert page_of(row(caption="word " * 5000)).shape == page_of(row(caption="word " * 9000)).shape


@pytest.mark.parametrize("fonts", [("no such font.ttf",), contact_sheet.FONT_FILES], ids=["no font", "fonts"])
def test_any_text_is_drawn_with_whatever_fonts_there_are(
    monkeypatch: pytest.MonkeyPatch, fonts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(contact_sheet, "FONT_FILES", fonts)
    contact_sheet._fonts.cache_clear()
    try:
        plain_text = page_of(row(caption="a dog"))
        for caption in ("一只狗 a dog", "🐕 dog", "\udcff \x00 dog", "كلب", "a\u0301\u200d"):
            page = page_of(row(caption=caption))
            assert page.shape[1] == plain_text.shape[1] and not np.array_equal(page, plain_text)
    finally:
        contact_sheet._fonts.cache_clear()


def test_a_text_gets_a_font_that_has_its_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Limited:
        """A font of a few letters: all others look like a box."""

        def __init__(self, known: str):
            self.known = known

        def getmask(self, text: str) -> bytes:
            return text.encode() if text in self.known else b"box"

    latin, chinese = Limited("abc"), Limited("ab狗")
    monkeypatch.setattr(contact_sheet, "_fonts", lambda size: (latin, chinese))
    for text, font in (("abc", latin), ("a 狗", chinese), ("?", latin)):
        assert contact_sheet._font_for(text, 12) is font


def test_the_page_holds_the_frames_in_their_order() -> None:
    page = draw_html(
        Sheet("title", "summary", [row(badges=(Badge("black", "no <light>"),))], [("gone", "no such file")])
    )
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r'base64,(.*?)"', page)]
    greens = [int(np.asarray(image)[..., 1].mean().round()) for image in images]
    assert np.allclose(greens, [255 - 20 * number for number in range(8)], atol=3)
    assert all(image.size == (90, 60) for image in images)
    assert "<b>black</b> no &lt;light&gt;" in page and "<td>gone</td><td>no such file</td>" in page
    assert "Skipped" not in draw_html(Sheet("title", "summary", [], []))

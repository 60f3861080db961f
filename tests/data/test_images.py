"""Pictures are read upright and never stretched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvideox_factory.config import UserError
from cogvideox_factory.data.images import fit_image, read_image


def halves(width: int, height: int) -> Image.Image:
    """Left half black, right half white."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def test_a_picture_turned_by_its_camera_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    halves(40, 20).save(tmp_path / "a.png", exif=exif)
    image = read_image(str(tmp_path / "a.png"), "--image")
    assert image.size == (20, 40)
    assert np.asarray(image)[:18].max() == 0 and np.asarray(image)[22:].min() == 255  # black, then white below


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    halves(16, 16).convert(mode).save(path)
    assert read_image(str(path), "--image").mode == "RGB"


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    for name in ("text.png", "cut.png", ".", "none.png"):
        with pytest.raises(UserError, match="--image "):
            read_image(str(tmp_path / name), "--image")


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    image = Image.effect_noise((48, 32), 50)
    assert fit_image(image, 32, 48) is image


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (30, 30), (7, 300)])
def test_another_shape_is_cropped_around_its_centre_and_not_stretched(size: tuple[int, int]) -> None:
    """A circle around the centre stays a circle."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    radius = min(size) * 0.3
    inside = np.hypot(rows - (height - 1) / 2, columns - (width - 1) / 2) < radius
    fitted = fit_image(Image.fromarray(inside.astype(np.uint8) * 255), 64, 64)
    assert fitted.size == (64, 64)
    white = np.asarray(fitted) > 127
    rows, columns = np.nonzero(white)
    tolerance = 64 / min(size) + 1  # of a pixel of the source, which scaling enlarges
    assert abs(np.ptp(rows) - np.ptp(columns)) <= tolerance
    assert abs(np.ptp(rows) + 1 - 2 * 0.3 * 64) <= 2 * tolerance
    assert abs(rows.mean() - 31.5) <= tolerance and abs(columns.mean() - 31.5) <= tolerance

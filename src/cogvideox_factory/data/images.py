"""The pictures that image-to-video models start from: read, and cut to the size of a video."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from cogvideox_factory.config import UserError


def read_image(source: str, flag: str) -> Image.Image:
    """The picture that an option names, upright and in RGB. Raises UserError where it cannot be read."""
    try:
        with Image.open(Path(source).expanduser()) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{flag} {source}: no such file") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{flag} {source}: cannot be read as an image ({error})") from error


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """A picture scaled to cover the size and cropped around its centre, as clips are; never stretched."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)

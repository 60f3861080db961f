"""The pictures that image-to-video models start from: read, and cut to the size of a video."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

from cogvideox_factory.config import UserError
from cogvideox_factory.data.web_images import fetch_image


def is_address(source: str) -> bool:
    """Whether a picture comes from the web."""
    return source.lower().startswith(("http://", "https://"))


def read_image(source: str, flag: str, *, allow_private_addresses: bool = False) -> Image.Image:
    """The picture that an option names, a file or an http(s) address, upright and in RGB.

    Raises UserError where it cannot be read.
    """
    if is_address(source):
        try:
            content = io.BytesIO(fetch_image(source, allow_private=allow_private_addresses))
        except UserError as error:
            raise UserError(f"{flag} {error}") from error
    try:
        with Image.open(content if is_address(source) else Path(source).expanduser()) as image:
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

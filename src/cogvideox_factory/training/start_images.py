"""The pictures that validation videos of an image-to-video model start from: which, and their copies.

They are found once, before the training, and kept, so that a resumed run shows the same ones. The first frame of a
clip is decoded from its latents. Rejected: to read it from the clip; where only a prepared set is given, there is none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from cogvideox_factory.config import UserError, ValidationOptions
from cogvideox_factory.data.files import hash_of, hash_of_bytes
from cogvideox_factory.data.images import fit_image, read_image
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.encoders import decode_first_frame, load_vae
from cogvideox_factory.model.family import Checkpoint

FIRST_FRAME = "first_frame"


def split(text: str | None, separator: str) -> list[str]:
    """Parts of an option that are not empty."""
    return [part.strip() for part in (text or "").split(separator) if part.strip()]


def sources_of(options: ValidationOptions, prompts: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    """Where the picture of each prompt comes from; nothing for text-to-video.

    Raises UserError where the model takes no images, or where there are neither one nor as many as prompts.
    """
    given = split(options.validation_images, options.validation_prompt_separator)
    if given and not checkpoint.is_image_to_video:
        raise UserError(f"--validation_images {given[0]}: {checkpoint.name} is a text-to-video model, it takes none")
    if not checkpoint.is_image_to_video or not prompts:
        return []
    given = given or [FIRST_FRAME]
    if len(given) not in (1, len(prompts)):
        raise UserError(
            f"--validation_images: {len(given)} images for {len(prompts)} prompts; give one for all, or one a prompt, "
            f"with {options.validation_prompt_separator} between them"
        )
    return given * len(prompts) if len(given) == 1 else given


class StartImages:
    """The pictures of a run's validation, one a prompt."""

    def __init__(self, folder: Path, sources: Sequence[str], prompts: Sequence[str], height: int, width: int):
        """Files are read at once, so that a wrong name is said before hours of encoding."""
        self.folder, self.sources, self.prompts = folder, sources, prompts
        self.height, self.width = height, width
        self._given = {
            source: fit_image(read_image(source, "--validation_images"), height, width)
            for source in dict.fromkeys(sources)
            if source != FIRST_FRAME
        }

    def keep(
        self, checkpoint: Checkpoint, prepared: PreparedSet, entries: Sequence[Entry], device: torch.device
    ) -> list[str]:
        """Name of each prompt's picture in the folder, a PNG of the videos' size."""
        names = []
        for number, source in enumerate(self.sources):
            if source != FIRST_FRAME:
                names.append(self._write(hash_of_bytes(self._given[source].tobytes()), self._given[source]))
                continue
            latents_file = self._clip_for(number, entries).files["latents"][0]
            name = hash_of(latents_file, self.height, self.width)
            if (self.folder / f"{name}.png").is_file():
                names.append(f"{name}.png")
            else:
                image = _first_frame(checkpoint, prepared.read_tensors(latents_file)["mean"], device)
                names.append(self._write(name, fit_image(image, self.height, self.width)))
        return names

    def _clip_for(self, number: int, entries: Sequence[Entry]) -> Entry:
        """The clip whose caption a prompt is, else the clip of the prompt's number."""
        same = (entry for entry in entries if entry.caption == self.prompts[number])
        return next(same, entries[number % len(entries)])

    def _write(self, name: str, image: Image.Image) -> str:
        path = self.folder / f"{name}.png"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f".{name}.part"
            image.save(part, "PNG")
            os.replace(part, path)
        return path.name


def _first_frame(checkpoint: Checkpoint, raw_latents: torch.Tensor, device: torch.device) -> Image.Image:
    """The first frame of a clip as the VAE gives it back, from raw latents of shape (C, F, H, W)."""
    vae = load_vae(checkpoint, raw_latents.dtype).to(device)
    return Image.fromarray(decode_first_frame(vae, raw_latents.to(device)))

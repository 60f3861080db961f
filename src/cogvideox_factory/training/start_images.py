"""The pictures that validation videos of an image-to-video model start from: which, and their copies.

They are found once, before the training, and kept, so that a resumed run shows the same ones. The first frame of a
clip is decoded from its own latents. Rejected: to read it from the clip; where only a prepared set is given, there is
none. And to take it from the video's latents; the first of them stand for several frames where a clip has 8k of them.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from cogvideox_factory.config import UserError, ValidationOptions
from cogvideox_factory.data.files import hash_of, hash_of_bytes, write_durably
from cogvideox_factory.data.images import is_address, read_image
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.encoders import decode_image, load_vae, spare_memory
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.redaction import gives_access, redacted

logger = logging.getLogger(__name__)

FIRST_FRAME = "first_frame"
FOLDER = "validation/images"  # within a run
SOURCES = "sources.json"  # of the folder: the copy of each file


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


def with_absolute_images(options: ValidationOptions) -> ValidationOptions:
    """With absolute paths of files, so that the run can be repeated from anywhere."""

    def absolute(source: str) -> str:
        if source == FIRST_FRAME or is_address(source):
            return source
        path = str(Path(os.path.expanduser(source)).absolute())
        return source if options.validation_prompt_separator in path else path  # which would be split there

    return _with_images(options, absolute)


def with_kept_images(run: Path, options: ValidationOptions) -> ValidationOptions:
    """For config.yaml, which is to repeat the run and gets around: an address that gives access to whoever reads it
    becomes the path of the run's own copy of the picture."""
    folder, separator = (run / FOLDER).absolute(), options.validation_prompt_separator

    def kept(source: str) -> str:
        if not is_address(source) or not gives_access(source):
            return source
        path = folder / _name_of_address(source)
        return str(path) if path.is_file() and separator not in str(path) else redacted(source)

    return _with_images(options, kept)


def with_redacted_images(options: ValidationOptions) -> ValidationOptions:
    """For others to see: a signed address gives access to whoever reads it."""
    return _with_images(options, lambda source: redacted(source) if is_address(source) else source)


def _with_images(options: ValidationOptions, change: Callable[[str], str]) -> ValidationOptions:
    if not options.validation_images:
        return options
    separator = options.validation_prompt_separator
    images = separator.join(map(change, split(options.validation_images, separator)))
    return dataclasses.replace(options, validation_images=images)


def open_start_images(run: Path, options: ValidationOptions, checkpoint: Checkpoint) -> StartImages | None:
    """The pictures of a run's validation; None where its videos start from none. Raises UserError as its parts do."""
    prompts = split(options.validation_prompt, options.validation_prompt_separator)
    sources = sources_of(options, prompts, checkpoint)
    return StartImages(run / FOLDER, sources, prompts, options.allow_private_addresses) if sources else None


class StartImages:
    """The pictures that a run's validation videos start from, one a prompt, as they are: a video cuts them to its
    size."""

    def __init__(self, folder: Path, sources: Sequence[str], prompts: Sequence[str], allow_private: bool = False):
        """Files and addresses are read at once, so that a wrong one is said before hours of encoding.

        What an address gave at the first start of a run is kept: the run goes on with it, whatever becomes of it. So
        it does with a file that is gone by then; one with another content is another picture.
        """
        self.folder, self.sources, self.prompts = folder, sources, prompts
        self._names = {
            source: self._keep(source, allow_private) for source in dict.fromkeys(sources) if source != FIRST_FRAME
        }

    def names(
        self,
        checkpoint: Checkpoint,
        prepared: PreparedSet,
        entries: Sequence[Entry],
        device: torch.device,
        *,
        use_tiling: bool = False,
    ) -> list[str]:
        """File of each prompt's picture in the folder; first frames are decoded, tile by tile where that is asked for,
        if they are not there yet."""
        names = []
        for number, source in enumerate(self.sources):
            if source != FIRST_FRAME:
                names.append(self._names[source])
                continue
            file = self._clip_for(number, entries).files["images"][0]
            names.append(f"{hash_of(file)}.png")
            if not (self.folder / names[-1]).is_file():
                first = prepared.read_tensors(file)["first"]
                self._write(names[-1], _first_frame(checkpoint, first, device, use_tiling=use_tiling))
        return names

    def _keep(self, source: str, allow_private: bool) -> str:
        """Copy a picture into the folder, unless it is one from the web that is there, and give the copy's name."""
        name = _name_of_address(source)
        if is_address(source) and (self.folder / name).is_file():
            return name
        if Path(source).parent == self.folder.absolute() and Path(source).is_file():
            return Path(source).name  # it is such a copy, which the config.yaml of this run names
        kept = {} if is_address(source) else self._kept_files()
        if source in kept and not Path(source).expanduser().exists() and (self.folder / kept[source]).is_file():
            logger.warning("--validation_images %s: is gone, the run goes on with its copy", source)
            return kept[source]
        image = read_image(source, "--validation_images", allow_private_addresses=allow_private)
        if is_address(source):
            self._write(name, image)
            return name
        name = f"{hash_of(image.size, hash_of_bytes(image.tobytes()))}.png"
        self._write(name, image)
        write_durably(self.folder / SOURCES, json.dumps({**kept, source: name}).encode())
        return name

    def _kept_files(self) -> dict[str, str]:
        """Name of the copy of each file that the run was given."""
        try:
            content = json.loads((self.folder / SOURCES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _clip_for(self, number: int, entries: Sequence[Entry]) -> Entry:
        """The clip whose caption a prompt is, else the clip of the prompt's number."""
        same = (entry for entry in entries if entry.caption == self.prompts[number])
        return next(same, entries[number % len(entries)])

    def _write(self, name: str, image: Image.Image) -> None:
        content = io.BytesIO()
        image.save(content, "PNG")
        write_durably(self.folder / name, content.getvalue())


def _name_of_address(source: str) -> str:
    """Name of the copy of what an address gave."""
    return f"{hash_of(source)}.png"


def first_frame_decoder(checkpoint: Checkpoint, dtype: torch.dtype, *, use_tiling: bool, load=None):
    """The half of the VAE that first frames are decoded with; planning has a `load` of its own, without weights."""
    vae = (load or load_vae)(checkpoint, dtype)
    vae.encoder = None
    spare_memory(vae, checkpoint, use_slicing=False, use_tiling=use_tiling)
    return vae


def _first_frame(
    checkpoint: Checkpoint, raw_latents: torch.Tensor, device: torch.device, *, use_tiling: bool
) -> Image.Image:
    """The first frame of a clip as the VAE gives it back, from its raw latents of shape (C, H, W)."""
    vae = first_frame_decoder(checkpoint, raw_latents.dtype, use_tiling=use_tiling).to(device)
    return Image.fromarray(decode_image(vae, raw_latents.to(device)))

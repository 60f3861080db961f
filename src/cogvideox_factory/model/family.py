"""What a checkpoint is, read from its own config files.

Nothing about a model is decided by its name or typed in where its configs say it. Rejected: a class a model, whose
differences are numbers in a file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cogvideox_factory.config import ConditioningOptions, ModelOptions, UserError

logger = logging.getLogger(__name__)
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
KNOWN_LIBRARIES = ("diffusers", "transformers", None)  # None: of an optional part that is not there
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The configs of CogVideoX 1.5 give the largest grid of positions (300 × 300 latents), not the size it was trained at,
# and no config gives a rate. These come from the model cards.
NATIVE_SIZE_1_5 = (768, 1360)
NATIVE_FPS_1_0, NATIVE_FPS_1_5 = 8.0, 16.0

# Of a model on the Hub: what says how it is built, without the weights.
FILES_WITHOUT_WEIGHTS = ["model_index.json", "*/*.json", "tokenizer/*"]


@dataclass(frozen=True)
class Checkpoint:
    """A CogVideoX pipeline on disk. The mappings are its config files."""

    name: str  # as the user wrote it
    folder: Path
    variant: str | None
    pipeline: Mapping[str, Any]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]

    @property
    def is_local(self) -> bool:
        """Whether the user named a folder, not a model on the Hub."""
        return Path(self.name).expanduser().is_dir()

    @property
    def is_image_to_video(self) -> bool:
        """Image-to-video models take the latents of the image beside those of the video."""
        return self.transformer["in_channels"] == 2 * self.vae["latent_channels"]

    @property
    def task(self) -> str:
        return "image-to-video" if self.is_image_to_video else "text-to-video"

    @property
    def pipeline_class(self):
        """The stock diffusers pipeline that runs this checkpoint."""
        from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

        return CogVideoXImageToVideoPipeline if self.is_image_to_video else CogVideoXPipeline

    @property
    def has_learned_positions(self) -> bool:
        """Whether positions were learned for the native size only, as those of CogVideoX-5b-I2V."""
        return bool(self.transformer.get("use_learned_positional_embeddings"))

    @property
    def spatial_factor(self) -> int:
        """Pixels of height or width in one latent."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def size_divisor(self) -> int:
        """Height and width in pixels must be multiples of this: one patch of latents."""
        return self.spatial_factor * self.transformer["patch_size"]

    @property
    def temporal_factor(self) -> int:
        """Frames of video in one latent frame."""
        return int(self.vae["temporal_compression_ratio"])

    @property
    def frame_batch(self) -> int:
        """Frames that the VAE encodes at a time; clips have a multiple of this, or one more."""
        return 2 * self.temporal_factor

    @property
    def latent_frame_multiple(self) -> int:
        """Latent frames in a patch (patch_size_t of CogVideoX 1.5)."""
        return self.transformer.get("patch_size_t") or 1

    @property
    def native_size(self) -> tuple[int, int, int]:
        """Frames, height and width that the model was made for."""
        frames = self.transformer["sample_frames"]
        if self.transformer.get("patch_size_t"):
            return (frames, *NATIVE_SIZE_1_5)
        height, width = self.transformer["sample_height"], self.transformer["sample_width"]
        return frames, height * self.spatial_factor, width * self.spatial_factor

    @property
    def native_fps(self) -> float:
        return NATIVE_FPS_1_5 if self.transformer.get("patch_size_t") else NATIVE_FPS_1_0

    @property
    def max_text_tokens(self) -> int:
        return self.transformer["max_text_seq_length"]

    @property
    def scaling_factor(self) -> float:
        """Latents are the VAE's raw latents times this."""
        return self.vae["scaling_factor"]

    @property
    def image_scaling_factor(self) -> float:
        """Latents of the image that a video starts from are its raw latents times this.

        CogVideoX 1.5 was trained with another scale for them than for videos, which its VAE's config says.
        """
        return 1 / self.scaling_factor if self.vae.get("invert_scale_latents") else self.scaling_factor

    @functools.cached_property
    def weights_dtype(self) -> torch.dtype:
        """Type of the transformer's weights as stored."""
        file = next((path for path in self._files("transformer") if path.suffix == ".safetensors"), None)
        if file is None:  # configs alone; diffusers writes no type into its own, transformers does
            path = self.folder / "text_encoder" / "config.json"
            config = _read_json(path, self.name) if path.is_file() else {}
            return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
        with safe_open(file, "pt") as tensors:
            name = next(iter(tensors.keys()))
            return tensors.get_tensor(name).dtype

    def dtype_for(self, choice: str | None, device: torch.device) -> torch.dtype:
        """The type an option asks for: by default the checkpoint's own on a GPU, fp32 on a CPU."""
        if choice is not None:
            return torch.float32 if choice == "no" else DTYPES[choice]
        return self.weights_dtype if device.type == "cuda" else torch.float32

    def fingerprint(self, component: str) -> str:
        """Identity of a component's content: names, sizes and samples of its files.

        Three samples of 64 KiB a file tell two sets of weights apart without reading the gigabytes of a T5.
        """
        digest = hashlib.sha256()
        for path in self._files(component):
            size = path.stat().st_size
            digest.update(f"{path.name}/{size}/".encode())
            with path.open("rb") as file:
                for start in (0, max(size // 2 - 32768, 0), max(size - 65536, 0)):
                    file.seek(start)
                    digest.update(file.read(65536))
        return digest.hexdigest()[:32]

    def _files(self, component: str) -> list[Path]:
        """Files of a component without the weights of variants that are not used (NAME.VARIANT[-SHARD].SUFFIX)."""

        def is_used(path: Path) -> bool:
            if path.suffix not in (".safetensors", ".bin"):
                return path.is_file() and not path.name.startswith(".")
            variant = path.name.split(".")[1].split("-")[0] if path.name.count(".") > 1 else None
            return variant == self.variant

        return [path for path in sorted((self.folder / component).rglob("*")) if is_used(path)]


def open_checkpoint(options: ModelOptions, *, with_weights: bool = True) -> Checkpoint:
    """The checkpoint that the options name, downloaded from the Hub if it is no folder.

    Without weights only configs and tokenizer are downloaded: megabytes instead of gigabytes.
    Raises UserError where it cannot be found or is no CogVideoX pipeline.
    """
    name = options.pretrained_model_name_or_path
    assert name is not None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name, options, with_weights)
    pipeline = _read_json(folder / "model_index.json", name)
    if not str(pipeline.get("_class_name", "")).startswith("CogVideoX"):
        raise UserError(
            f"--pretrained_model_name_or_path {name}: is a {pipeline.get('_class_name')}, not a CogVideoX pipeline"
        )
    # Else diffusers looks for a module of that name beside the weights, which would be code of whoever made them.
    foreign = [part for part, of in pipeline.items() if isinstance(of, list) and of and of[0] not in KNOWN_LIBRARIES]
    if foreign:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: {foreign[0]} is of {pipeline[foreign[0]][0]}, and code that "
            "comes with a model is not run; save the model with classes of diffusers and transformers"
        )
    missing = [component for component in COMPONENTS if not (folder / component).is_dir()]
    if not missing and not (folder / "text_encoder" / "config.json").is_file():
        missing = ["text_encoder/config.json"]
    if missing:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: the pipeline lacks {', '.join(missing)}; download the whole "
            "model, or save it with save_pretrained"
        )
    return Checkpoint(
        name=name,
        folder=folder,
        variant=options.variant,
        pipeline=pipeline,
        transformer=_read_json(folder / "transformer" / "config.json", name),
        vae=_read_json(folder / "vae" / "config.json", name),
    )


def with_conditioning(checkpoint: Checkpoint, options: ConditioningOptions) -> Checkpoint:
    """A checkpoint as the options change it: its mappings then say what its models are made to do when loaded."""
    transformer, vae = dict(checkpoint.transformer), dict(checkpoint.vae)
    for flag, is_given in (
        ("ignore_learned_positional_embeddings", options.ignore_learned_positional_embeddings),
        ("image_latents_scale", options.image_latents_scale != "checkpoint"),
    ):
        if is_given and not checkpoint.is_image_to_video:
            raise UserError(f"--{flag}: is for image-to-video models; {checkpoint.name} is a text-to-video model")
    if options.ignore_learned_positional_embeddings:
        transformer["use_learned_positional_embeddings"] = False
    if options.image_latents_scale != "checkpoint":
        vae["invert_scale_latents"] = options.image_latents_scale == "divide"
    return dataclasses.replace(checkpoint, transformer=transformer, vae=vae)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a mapping")
        return content
    except (OSError, ValueError) as error:
        reason = "it has no" if isinstance(error, FileNotFoundError) else "unreadable"
        raise UserError(
            f"--pretrained_model_name_or_path {name}: is not a CogVideoX pipeline: {reason} "
            f"{path.relative_to(path.parents[1]) if path.name == 'config.json' else path.name}; "
            "give a folder written by save_pretrained or a name such as THUDM/CogVideoX-5b"
        ) from error


def _download(name: str, options: ModelOptions, with_weights: bool) -> Path:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"--pretrained_model_name_or_path {name}: no such folder")
    from diffusers import DiffusionPipeline
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download

    if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine, of which the processes wait for one download
        size = "up to tens of gigabytes" if with_weights else "its configs, a few megabytes"
        logger.info("download   %s from the Hugging Face Hub, unless its cache here has it: %s", name, size)
    try:
        if not with_weights:
            return Path(
                snapshot_download(
                    name,
                    revision=options.revision,
                    cache_dir=options.cache_dir,
                    allow_patterns=FILES_WITHOUT_WEIGHTS,
                )
            )
        return Path(
            DiffusionPipeline.download(
                name, revision=options.revision, variant=options.variant, cache_dir=options.cache_dir
            )
        )
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"--pretrained_model_name_or_path {name}: no such folder here, and not available from the Hugging Face "
            f"Hub ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

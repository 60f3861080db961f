"""Videos of a run: from the model that trains, and at the end from what it saved."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from cogvideox_factory.config import Train
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.images import read_image
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.data.video import write_video
from cogvideox_factory.memory.set_aside import set_aside, set_model_aside
from cogvideox_factory.model.adapters import exported_model, is_lora
from cogvideox_factory.model.device import free_memory
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.prepare import encode_prompts
from cogvideox_factory.progress import progress_bar
from cogvideox_factory.run_folder import validation_folder
from cogvideox_factory.sampling import (
    Video,
    WhileDecoding,
    as_json,
    generate,
    pipeline_from_disk,
    pipeline_in_memory,
    place,
    resolve_sampling,
    write_video_list,
)
from cogvideox_factory.stopping import StopRequest
from cogvideox_factory.training.start_images import FOLDER, StartImages, split

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def waiting(
    options: Train, transformer, held: Iterable[torch.Tensor] | None, device: torch.device
) -> Iterator[WhileDecoding]:
    """Where the options ask for it, what the training of a LoRA holds besides the model waits on the host meanwhile;
    what is given is to be entered while a video is decoded, when the model itself does.

    Nothing does where `held` is None. A full fine-tuning stays: its states would take several times the model in the
    host's memory, and its steps need far more of the GPU than a video.
    """
    asked = options.sampling.enable_model_cpu_offload or options.memory.resident_blocks is not None
    if held is None or not (asked and is_lora(transformer)):
        yield contextlib.nullcontext
        return
    with set_aside(held, device):
        yield lambda: set_model_aside(transformer, device)


class Validation:
    """The prompts of a run, the images that go with them, and when they are shown.

    Prompts are encoded and images are found once, before the training.
    """

    def __init__(
        self,
        run: Path,
        options: Train,
        checkpoint: Checkpoint,
        bucket: Bucket,
        stop: StopRequest,
        start_images: StartImages | None = None,
    ):
        """`bucket` is the size of the videos where the options give none; `start_images` are for image-to-video."""
        self.run = run
        self.stop = stop
        self.options = options
        self.checkpoint = checkpoint
        self.sampling = resolve_sampling(options.sampling, bucket, checkpoint.size_divisor, checkpoint.temporal_factor)
        prompts = split(options.validation.validation_prompt, options.validation.validation_prompt_separator)
        self.start_images = start_images
        self.videos = [
            Video(f"prompt-{number:02}-video-{index}.mp4", prompt, options.seed + index)
            for number, prompt in enumerate(prompts)
            for index in range(options.validation.num_validation_videos)
        ]
        self.on_written: Callable[[int, Path, Sequence[Video]], None] | None = None  # of a step, its folder, its videos
        self._embeddings = PreparedSet(run / "prepared")
        self._files: dict[str, str] = {}

    def encode_prompts(self, device: torch.device) -> None:
        """Encode what is not there yet, so that the text encoder is not needed again."""
        if self.videos:
            prompts = ["", *(video.prompt for video in self.videos)]
            self._files = encode_prompts(
                self.checkpoint, self.options.encoding, self._embeddings, prompts, device, self.stop
            )

    def keep_images(self, prepared: PreparedSet, entries: Sequence[Entry], device: torch.device) -> None:
        """Put the images that the videos start from into the run, and their names into the videos."""
        if self.start_images:
            names = self.start_images.names(
                *(self.checkpoint, prepared, entries, device), use_tiling=self.options.encoding.use_tiling
            )
            each = self.options.validation.num_validation_videos
            self.videos = [
                replace(video, image=f"{Path(FOLDER).name}/{names[index // each]}")
                for index, video in enumerate(self.videos)
            ]
            free_memory()

    def folder(self, step: int) -> Path:
        return validation_folder(self.run, step)

    def is_done(self, step: int) -> bool:
        """Whether the very videos that are asked for are there."""
        try:
            listed = json.loads((self.folder(step) / "prompts.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return listed == [as_json(video) for video in self.videos]

    def is_due(self, step: int, epoch: int | None) -> bool:
        """Whether videos of this step are asked for and not there yet. `epoch` is one that this step completed."""
        if not self.videos or self.is_done(step):
            return False
        every_steps, every_epochs = (
            self.options.validation.validation_steps,
            self.options.validation.validation_epochs,
        )
        by_steps = every_steps is not None and step % every_steps == 0
        by_epochs = every_epochs is not None and epoch is not None and (epoch + 1) % every_epochs == 0
        return step == 0 or by_steps or by_epochs

    def run_in_memory(
        self,
        step: int,
        transformer,
        scheduler,
        dtype: torch.dtype,
        device: torch.device,
        held: Sequence[torch.Tensor] | None = (),
        *,
        is_shared: bool = False,
    ) -> None:
        """Videos of the model as it is. It comes back in the mode it had, with nothing attached to it.

        `held` is what else the training keeps on the device; None: an engine holds views of that and of the model, and
        none of it may be moved. `is_shared`: every process calls this, as the model takes all of them; the first one
        writes, and no signal cuts it short.
        """
        was_training = transformer.training
        with waiting(self.options, transformer, held, device) as while_decoding:
            pipeline = pipeline_in_memory(
                *(self.checkpoint, transformer, scheduler, self.sampling, dtype, device),
                while_decoding=while_decoding,
            )
            negative = self._embedding("", dtype, device)

            def make(video: Video) -> np.ndarray:
                embeds = self._embedding(video.prompt, dtype, device)
                return self._generate(pipeline, video, prompt_embeds=embeds, negative_prompt_embeds=negative)

            transformer.eval()
            try:
                with self._progress(step, pipeline) as bar:
                    if is_shared:
                        made = [make(video) for video in self.videos]
                        if PartialState().is_main_process:
                            self._write(step, dict(zip(self.videos, made, strict=True)).__getitem__, bar)
                    else:
                        self._write(step, make, bar)
            finally:
                transformer.train(was_training)
                pipeline.vae = None  # before the rest of the training comes back

    def run_from_saved(self, step: int, device: torch.device) -> bool:
        """Videos of what the run saved, all by stock diffusers; whether there were any to make."""
        if not self.videos or self.is_done(step):
            return False
        dtype = self.checkpoint.dtype_for(self.options.training.mixed_precision, device)
        pipeline = pipeline_from_disk(*exported_model(self.run, self.checkpoint), dtype)
        prompts = place(
            *(pipeline, self.checkpoint, self.sampling, device),
            blocks=self.options.memory,
            text_encoder=self.options.encoding,
            prompts=dict.fromkeys(video.prompt for video in self.videos),
            max_sequence_length=self._max_tokens,
        )
        with self._progress(step, pipeline) as bar:
            self._write(step, lambda video: self._generate(pipeline, video, **prompts[video.prompt]), bar)
        return True

    @contextlib.contextmanager
    def _progress(self, step: int, pipeline) -> Iterator[tqdm]:
        """One bar for all videos of a step. It counts denoising steps, as a single video can take minutes."""
        total = len(self.videos) * self.options.sampling.num_inference_steps
        is_silent = not PartialState().is_main_process
        with progress_bar(None, f"Videos of step {step}", "step", total, is_silent=is_silent) as bar:
            pipeline.progress_bar = lambda total: contextlib.nullcontext(bar)  # in place of one that ends with a video
            yield bar

    def _write(self, step: int, make: Callable[[Video], np.ndarray], bar: tqdm) -> None:
        assert self.options.data.fps is not None
        folder = self.folder(step)
        (folder / "prompts.json").unlink(missing_ok=True)
        for video in self.videos:
            if self.stop.requested:
                return  # without prompts.json they are made again when the run goes on
            write_video(folder / video.file, make(video), self.options.data.fps)
        bar.close()  # before what is said of the whole
        write_video_list(folder, self.videos)  # last: its presence says that all are there
        logger.info("videos     %s", folder)
        if self.on_written:
            self.on_written(step, folder, self.videos)

    def _generate(self, pipeline, video: Video, **prompt) -> np.ndarray:
        if video.image:
            prompt["image"] = read_image(str(self.run / "validation" / video.image), "--validation_images")
        return generate(pipeline, self.sampling, video.seed, max_sequence_length=self._max_tokens, **prompt)

    @property
    def _max_tokens(self) -> int:
        return self.options.encoding.max_sequence_length or self.checkpoint.max_text_tokens

    def _embedding(self, prompt: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensors = self._embeddings.read_tensors(self._files[prompt])
        return tensors["prompt_embeds"][None].to(device, dtype)

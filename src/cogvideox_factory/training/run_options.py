"""What becomes of a run's options before it trains: filled in, checked against its folder, written down.

Rejected: filling in defaults where they are used; config.yaml would then not repeat the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cogvideox_factory.config import (
    DataOptions,
    EncodingOptions,
    HeldOutOptions,
    Train,
    UserError,
    ValidationOptions,
    config_text,
)
from cogvideox_factory.data.files import make_output_folder, write_durably
from cogvideox_factory.data.store import PreparedSet
from cogvideox_factory.model.adapters import check_method, check_names, find_export, needs_bf16
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.model.pipeline_folder import is_pipeline
from cogvideox_factory.prepare import check_prepared
from cogvideox_factory.resolve import check_positions, check_text_length, resolve_data_options
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.sampling import resolve_sampling
from cogvideox_factory.training.optimizers import resolve_optimizer_options
from cogvideox_factory.training.start_images import split, with_absolute_images, with_kept_images

logger = logging.getLogger(__name__)


def resolve_options(options: Train, checkpoint: Checkpoint, *, is_gpu: bool | None = None) -> Train:
    """Options as they will be used and written down: what has its default from the checkpoint or from the prepared
    set is filled in, and folders are absolute, so that the run can be repeated and sampled from anywhere.

    `is_gpu` says whether they are for one; by default, whether this machine has one."""
    assert options.output_dir is not None and options.data.data_root is not None
    check_method(options.method, options.lora, options.training.mixed_precision)
    training = options.training
    is_gpu = torch.cuda.is_available() if is_gpu is None else is_gpu
    if training.mixed_precision is None and is_gpu and needs_bf16(options.method, checkpoint):
        training = dataclasses.replace(training, mixed_precision="bf16")
    check_text_length(checkpoint, options.encoding.max_sequence_length)
    data = dataclasses.replace(options.data, data_root=options.data.data_root.absolute())
    encoding = options.encoding
    if options.training.load_tensors:
        settings = check_prepared(checkpoint, PreparedSet(options.data.data_root))
        tell_ignored(options, settings)
        data = DataOptions(data_root=data.data_root, fps=settings["fps"], id_token=settings.get("id_token"))
        encoding = dataclasses.replace(encoding, max_sequence_length=settings["max_sequence_length"])
    else:
        data = dataclasses.replace(data, **resolve_data_options(data, checkpoint))
        # Said before hours of encoding: what the model could not take.
        check_positions(checkpoint, itertools.product(data.frame_buckets, data.height_buckets, data.width_buckets))
        in_root = data.dataset_file and data.data_root and data.data_root / data.dataset_file
        if in_root:
            found = in_root if in_root.is_file() else Path(str(data.dataset_file)).absolute()
            data = dataclasses.replace(data, dataset_file=found)
    # Said before hours of encoding, though they are used after it: names of modules, sizes of the videos.
    check_names(checkpoint, options.method, options.lora)
    sampling = resolve_sampling(
        options.sampling, checkpoint.native_size, checkpoint.size_divisor, checkpoint.temporal_factor
    )
    if options.validation.validation_prompt and (options.sampling.height or options.sampling.width):
        assert sampling.num_frames and sampling.height and sampling.width
        check_positions(checkpoint, [(sampling.num_frames, sampling.height, sampling.width)])
    held_out = resolve_held_out(options.held_out)
    check_prompts(options.validation)
    model = options.model
    if checkpoint.is_local:
        model = dataclasses.replace(model, pretrained_model_name_or_path=str(checkpoint.folder.absolute()))
    return dataclasses.replace(
        options,
        model=model,
        data=data,
        encoding=encoding,
        training=training,
        optimizer=resolve_optimizer_options(options.optimizer),
        validation=with_absolute_images(options.validation),
        held_out=held_out,
        output_dir=options.output_dir.absolute(),
    )


def check_prompts(validation: ValidationOptions) -> None:
    """Raises UserError for a text that holds no prompt; warns of options that have no effect without one."""
    text, separator = (validation.validation_prompt or "").strip(), validation.validation_prompt_separator
    if split(text, separator):
        return
    if text:
        raise UserError(
            f"--validation_prompt {text}: there is no prompt beside the separator {separator}; write one, or leave the "
            "option out"
        )
    names = ("validation_images", "num_validation_videos", "validation_steps", "validation_epochs")
    ignored = [f"--{name}" for name in names if getattr(validation, name) != getattr(ValidationOptions(), name)]
    if ignored:
        logger.warning("%s: without effect, no videos are made without a --validation_prompt", " ".join(ignored))


def resolve_held_out(held_out: HeldOutOptions) -> HeldOutOptions:
    """Raises UserError for options that do not go together."""
    root, fraction, steps = held_out.validation_data_root, held_out.validation_fraction, held_out.validation_loss_steps
    if root and fraction:
        raise UserError(
            f"--validation_fraction {fraction:g} and --validation_data_root {root}: choose one, a share of --data_root "
            "or a second data set"
        )
    if steps and not root and not fraction:
        raise UserError(
            f"--validation_loss_steps {steps}: needs clips that are held out; add --validation_fraction 0.1 or "
            "--validation_data_root"
        )
    return dataclasses.replace(held_out, validation_data_root=root and root.absolute())


def held_out_options(options: Train) -> Train | None:
    """Resolved options as they would be if --validation_data_root were --data_root; None where there is none."""
    root, dataset_file = options.held_out.validation_data_root, options.data.dataset_file
    if root is None:
        return None
    if dataset_file:  # that of the same name in the second set, or none
        found = root / dataset_file.name
        dataset_file = found if found.is_file() else None
    return dataclasses.replace(
        options, data=dataclasses.replace(options.data, data_root=root, dataset_file=dataset_file)
    )


@contextlib.contextmanager
def naming_the_second_set(second_set: Train) -> Iterator[None]:
    """Faults found inside are those of --validation_data_root, though what finds them knows --data_root or the folder
    only."""
    try:
        yield
    except UserError as error:
        message = str(error).replace("--data_root", "--validation_data_root")
        if "--validation_data_root" not in message:
            message = f"--validation_data_root {second_set.data.data_root}: {message}"
        raise UserError(message) from error


def tell_ignored(options: Train, settings: Mapping[str, Any]) -> None:
    """Warn of options that shape a prepared set and are given where one is only read."""
    encoding, default = (
        {"use_tiling": group.use_tiling, "max_sequence_length": group.max_sequence_length}
        for group in (options.encoding, EncodingOptions())
    )
    asked = {**dataclasses.asdict(options.data), **encoding}
    defaults = {**dataclasses.asdict(DataOptions()), **default}
    ignored = [
        f"--{name}"
        for name, value in asked.items()
        if name not in ("data_root", "strict") and value not in (defaults[name], settings.get(name))
    ]
    if ignored:
        logger.warning(
            "%s: without effect here, the set given with --load_tensors is trained on as it was prepared",
            " ".join(ignored),
        )


def write_config(options: Train) -> None:
    """Write config.yaml of a run, from its resolved options."""
    assert options.output_dir is not None
    write_durably(options.output_dir / "config.yaml", config_text(as_written_down(options)).encode())


def as_written_down(options: Train) -> Train:
    """Resolved options for config.yaml: to repeat a run is not to go on from what it went on from, and whoever reads
    the file gets no access to what the run had access to."""
    assert options.output_dir is not None
    return dataclasses.replace(
        options,
        training=dataclasses.replace(options.training, resume_from_checkpoint=None),
        validation=with_kept_images(options.output_dir, options.validation),
    )


def claim_run_folder(run: Path, options: Train, base: Path) -> None:
    """Make the run's folder, or take it over to go on. `base` is where the base model lies.

    Raises UserError where the folder holds a model or another run, where what it holds would be trained anew, or where
    it is no use.
    """
    is_run = (run / "config.yaml").exists()
    if run.resolve() == base.resolve() or (is_pipeline(run) and not is_run):
        raise UserError(f"--output_dir {run}: holds a model, which the run would replace; choose another folder")
    if is_run and find_export(run) and not list_checkpoints(run):
        raise UserError(
            f"--output_dir {run}: holds the result of a run and no checkpoint to go on from; choose another folder, so "
            "that the result is not replaced"
        )
    if is_run and not options.training.resume_from_checkpoint:
        raise UserError(
            f"--output_dir {run}: holds a run already; add --resume_from_checkpoint latest to go on with it, or "
            "choose another folder"
        )
    make_output_folder(run)

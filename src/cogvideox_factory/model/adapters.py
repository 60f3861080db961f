"""The trained part of the model, a LoRA or its own weights: attach it, give its parameters, save and load it.

Which of the two is known here and nowhere else: a transformer with an adapter trains a LoRA, one without trains its
own weights.

A LoRA's file is the one that stock `CogVideoXPipeline.load_lora_weights` reads. Its scale is multiplied into its
weights and its metadata says alpha = rank, so that strength 1.0 is what training saw for every reader: those that
follow the metadata, and those that know of none. Rejected: alpha in the metadata alone, which the latter ignore.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cogvideox_factory import __version__
from cogvideox_factory.config import LoraOptions, MethodOptions, ModelOptions, UserError, nearest
from cogvideox_factory.model.family import Checkpoint, open_checkpoint
from cogvideox_factory.model.full import load_weights, train_modules
from cogvideox_factory.model.pipeline_folder import INDEX, is_pipeline, save_pipeline

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
TRAINED_FILE = "trainable.safetensors"  # of a checkpoint: the trained weights as they are
AVERAGE_FILE = "ema.safetensors"  # of a checkpoint: their moving average


def check_method(method: MethodOptions, lora: LoraOptions, mixed_precision: str | None) -> None:
    """Raises UserError for options of training that do not go together."""
    if method.training_type == "lora":
        if method.trainable_modules:
            raise UserError(
                f"--trainable_modules {' '.join(method.trainable_modules)}: needs --training_type sft; the layers that "
                "get a LoRA are chosen by --target_modules"
            )
        return
    if mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16: too narrow for --training_type sft; take bf16 or no")
    defaults = dataclasses.asdict(LoraOptions())
    ignored = [f"--{name}" for name, value in dataclasses.asdict(lora).items() if value != defaults[name]]
    if ignored:
        logger.warning("%s: without effect, --training_type sft trains no LoRA", " ".join(ignored))


def needs_bf16(method: MethodOptions, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's own type, the default on a GPU, is too narrow to train its weights in."""
    return method.training_type == "sft" and checkpoint.weights_dtype == torch.float16


def attach(transformer, method: MethodOptions, lora: LoraOptions, seed: int, *, keeps_bf16: bool = False) -> None:
    """Make of a frozen transformer one that trains what the options say.

    A LoRA is in fp32, or in bf16 with `keeps_bf16` (the optimizer then rounds stochastically); the transformer's own
    weights are trained in the type that they have. Raises UserError where a module or layer that the options name does
    not exist, or where the transformer's type is not the one that is asked for.
    """
    if method.training_type == "lora":
        attach_lora(transformer, lora, seed)
        if keeps_bf16:
            for parameter in trainable_parameters(transformer).values():
                parameter.data = parameter.data.bfloat16()
        return
    if keeps_bf16 and transformer.dtype != torch.bfloat16:
        raise UserError(
            "--trainable_dtype bf16: with --training_type sft the trained weights are those that compute, which are "
            "fp32 here; add --mixed_precision bf16"
        )
    train_modules(transformer, method.trainable_modules)


def check_names(checkpoint: Checkpoint, method: MethodOptions, lora: LoraOptions) -> None:
    """Raises UserError for layers or modules that the options name and the model has not; no weights are read."""
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer))
    if method.training_type == "lora":
        _check_targets(transformer, lora.target_modules)
    else:
        train_modules(transformer, method.trainable_modules)


def identity_of(method: MethodOptions, lora: LoraOptions) -> dict[str, Any]:
    """What must be the same for a training to go on, by the names of the options."""
    kind = {"--training_type": method.training_type}
    if method.training_type == "sft":
        return {**kind, "--trainable_modules": sorted(method.trainable_modules)}
    return {
        **kind,
        "--rank": lora.rank,
        "--lora_alpha": lora.lora_alpha,
        "--target_modules": sorted(lora.target_modules),
        "--use_rslora": lora.use_rslora,
        "--use_dora": lora.use_dora,
    }


def describe_method(method: MethodOptions, lora: LoraOptions) -> str:
    """What is trained, for a person."""
    if method.training_type == "sft":
        modules = " ".join(method.trainable_modules)
        return f"full fine-tuning of {modules or 'the transformer'}"
    kind = "".join(name for name, is_on in (("rs", lora.use_rslora), ("Do", lora.use_dora)) if is_on)
    kind = {"": "LoRA", "rs": "LoRA (rank-stabilized)", "Do": "DoRA", "rsDo": "DoRA (rank-stabilized)"}[kind]
    return f"{kind}, rank {lora.rank}, alpha {lora.lora_alpha:g}"


def export(transformer, checkpoint: Checkpoint, run: Path) -> None:
    """Write what was trained as others load it: a LoRA's file, or a whole pipeline. Complete or absent."""
    if is_lora(transformer):
        save_lora(transformer, run, checkpoint)
    else:
        save_pipeline(transformer, checkpoint, run)


def find_export(run: Path) -> Path | None:
    """The file by which others load what a run trained; None where it is not written yet."""
    return next((run / name for name in (INDEX, LORA_FILE) if (run / name).is_file()), None)


def has_trained_weights(folder: Path) -> bool:
    """Whether a folder, a run or one of its checkpoints, holds what `load_trained` or a pipeline's loader takes."""
    return find_export(folder) is not None or (folder / TRAINED_FILE).is_file()


def holds_lora(path: Path) -> bool:
    """Whether a LoRA lies at a path, a file or a folder."""
    return path.is_file() or (path / LORA_FILE).is_file()


def exported_model(run: Path, base: Checkpoint) -> tuple[Checkpoint, Path | None]:
    """The model that a run made: the pipeline in its folder as it is, or the base model and where the LoRA lies."""
    if is_pipeline(run):
        return open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(run))), None
    return base, run


def load_trained(pipeline, path: Path, model_name: str) -> None:
    """Put a LoRA, at strength 1.0, or the weights of a checkpoint into a pipeline of the base model.

    `path` is a LoRA's file, or a folder with one or with a checkpoint of full fine-tuning. Raises UserError where it
    belongs to another model.
    """
    if path.is_dir() and not holds_lora(path) and (path / TRAINED_FILE).is_file():
        average = path / AVERAGE_FILE
        load_weights(average if average.is_file() else path / TRAINED_FILE, pipeline.transformer, model_name)
        return
    file = find_lora(path)
    check_lora_fits(file, pipeline.transformer, model_name)
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--lora {path}: does not fit {model_name}: {reason}") from error


def is_lora(transformer) -> bool:
    """Whether a LoRA is attached."""
    return bool(getattr(transformer, "peft_config", None))


def attach_lora(transformer, options: LoraOptions, seed: int) -> None:
    """Put LoRA layers, in fp32, on the transformer's target modules.

    Raises UserError where one of them is no linear layer; peft would leave it out in silence.
    """
    from peft import LoraConfig

    _check_targets(transformer, options.target_modules)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.lora_alpha,
        target_modules=list(options.target_modules),
        init_lora_weights=True,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )
    with torch.random.fork_rng():  # the adapter's first weights depend on the seed and on nothing that ran before
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    for parameter in trainable_parameters(transformer).values():
        parameter.data = parameter.data.float()


def trainable_parameters(transformer) -> dict[str, torch.nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: value for name, value in transformer.named_parameters() if value.requires_grad}


class LoraContent(NamedTuple):
    """A LoRA as diffusers reads it: weights by name, fp32, with its scale in them, and the file's metadata."""

    weights: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]


def save_lora(transformer, folder: Path, base: Checkpoint | None = None) -> Path:
    """Write the LoRA as diffusers reads it; the file is complete or absent."""
    return write_lora(lora_content(transformer, base), folder)


def lora_content(transformer, base: Checkpoint | None = None) -> LoraContent:
    """The LoRA as others load it. Weights may be those that are trained, not copies of them."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict

    config = transformer.peft_config["default"]
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    weights = {name: value.float().contiguous().cpu() for name, value in get_peft_model_state_dict(transformer).items()}
    # The product is exact where the scale is a power of two. DoRA's magnitudes are of the scaled sum, and stay.
    weights = {name: value * scale if ".lora_B." in name else value for name, value in weights.items()}
    described = {**config.to_dict(), "lora_alpha": config.r, "use_rslora": False}
    described["target_modules"] = sorted(config.target_modules)
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in described.items()}),
        "cogvideox_factory_version": __version__,
        **({"base_model": base.name if not base.is_local else base.folder.name} if base else {}),
    }
    return LoraContent(weights, metadata)


def write_lora(lora: LoraContent, folder: Path) -> Path:
    """Write a LoRA's file, complete or absent."""
    from diffusers import CogVideoXPipeline

    def save(tensors: Mapping[str, torch.Tensor], path: str) -> None:
        save_file(dict(tensors), path, metadata=dict(lora.metadata))

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as part:
        CogVideoXPipeline.save_lora_weights(
            part, transformer_lora_layers=dict(lora.weights), weight_name=LORA_FILE, save_function=save
        )
        with (Path(part) / LORA_FILE).open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(Path(part) / LORA_FILE, folder / LORA_FILE)
    return folder / LORA_FILE


def find_lora(path: Path) -> Path:
    """The LoRA file at a path given by a user, a file or a folder. Raises UserError where there is none."""
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no LoRA there ({LORA_FILE} in a folder, or a .safetensors file)")
    return file


def check_lora_fits(file: Path, transformer, model_name: str) -> None:
    """Raises UserError where a LoRA file belongs to another model.

    diffusers leaves out in silence what has no place in the model, and then the LoRA does nothing, or half of it.
    """
    try:
        with safe_open(file, "pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"--lora {file}: cannot be read as a safetensors file ({error})") from error
    layers = {f"transformer.{name}": module for name, module in transformer.named_modules()}
    for name, shape in shapes.items():
        layer, _, part = name.partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            if not part:
                raise UserError(f"--lora {file}: is no LoRA: it holds {name}")
            continue  # biases and what other tools add: diffusers decides
        weight = getattr(layers.get(layer), "weight", None)
        size = None if weight is None else weight.shape[1 if part.startswith("A") else 0]
        if size != shape[1 if part.startswith("A") else 0]:
            raise UserError(
                f"--lora {file}: does not fit {model_name}: {name} is {shape}, "
                + ("and the model has no such layer" if weight is None else f"and the layer is {list(weight.shape)}")
            )


def _check_targets(transformer, targets: tuple[str, ...]) -> None:
    """Raises UserError for a target that is the end of no linear layer's name."""
    layers = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    wrong = [target for target in targets if not any(name == target or name.endswith(f".{target}") for name in layers)]
    if wrong:
        endings = sorted({_ending(name) for name in layers})
        raise UserError(
            f"--target_modules {' '.join(wrong)}: no linear layer of the transformer has such a name"
            f"{nearest(wrong[0], endings)}; their names end in {', '.join(endings)}"
        )


def _ending(name: str) -> str:
    """The last part of a layer's name, or the last two where the last is only a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]

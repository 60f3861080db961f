"""The trained part of the model: attach a LoRA, save it with its metadata, give its parameters.

The file is the one that stock `CogVideoXPipeline.load_lora_weights` reads; rank and alpha travel in its metadata, so
that strength 1.0 there is what training saw.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cogvideox_factory.config import LoraOptions, UserError, nearest

LORA_FILE = "pytorch_lora_weights.safetensors"


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
    )
    with torch.random.fork_rng():  # the adapter's first weights depend on the seed and on nothing that ran before
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    for parameter in trainable_parameters(transformer).values():
        parameter.data = parameter.data.float()


def trainable_parameters(transformer) -> dict[str, torch.nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: value for name, value in transformer.named_parameters() if value.requires_grad}


def save_lora(transformer, folder: Path) -> Path:
    """Write the LoRA as diffusers reads it; the file is complete or absent."""
    from diffusers import CogVideoXPipeline
    from peft.utils import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.float().contiguous().cpu() for name, value in get_peft_model_state_dict(transformer).items()}
    metadata = transformer.peft_config["default"].to_dict()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as part:
        CogVideoXPipeline.save_lora_weights(
            part,
            transformer_lora_layers=weights,
            weight_name=LORA_FILE,
            transformer_lora_adapter_metadata={**metadata, "target_modules": sorted(metadata["target_modules"])},
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

"""Full fine-tuning: which of the transformer's own weights are trained, and putting them back into a base model."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cogvideox_factory.config import UserError


def train_modules(transformer, patterns: Sequence[str]) -> None:
    """Let the weights of the modules that the patterns name be trained; all where there are none.

    A pattern is a module's name, some of its dot-separated parts, or either with the wildcards of `fnmatch`. What lies
    within a module is trained with it. Raises UserError for a pattern that matches nothing with weights.
    """
    if not patterns:
        transformer.requires_grad_(True)
        return
    modules = {name: module for name, module in transformer.named_modules() if name}
    for pattern in patterns:
        # Nothing is added by a part of what is matched; what has no weights of its own, such as dropout, is no match.
        matched = [
            module
            for name, module in modules.items()
            if _matches(name, pattern) and next(module.parameters(), None) is not None
        ]
        if not matched:
            raise UserError(
                f"--trainable_modules {pattern}: no module of the transformer with weights has such a name"
                f"{_proposal(pattern, list(modules))}"
            )
        for module in matched:
            module.requires_grad_(True)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a module by whole parts of its name: block.1 is in block.1.ff and not in block.10."""
    return any(fnmatch.fnmatchcase(name, form) for form in (pattern, f"*.{pattern}"))


def _proposal(pattern: str, names: list[str]) -> str:
    """The end of a sentence with names close to a mistyped one, or else with all parts that names consist of."""
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    close = difflib.get_close_matches(pattern, [*parts, *names], n=3, cutoff=0.6)
    if close:
        return f"; the nearest are {', '.join(close)}"
    return f"; their names are made of {', '.join(parts)}"


def load_weights(file: Path, transformer, model_name: str) -> None:
    """Put the weights of a file in the place of the transformer's own, in the transformer's type.

    Raises UserError where the file cannot be read or holds what the transformer has no place for.
    """
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as a safetensors file ({error})") from error
    parameters = dict(transformer.named_parameters())
    for name, value in weights.items():
        if name not in parameters or parameters[name].shape != value.shape:
            here = list(parameters[name].shape) if name in parameters else "not there"
            raise UserError(f"{file}: does not fit {model_name}: {name} is {list(value.shape)}, in the model {here}")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)

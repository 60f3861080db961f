"""Nested values that hold tensors, as named plain tensors beside JSON, and back to the bit.

Optimizers keep more than a tensor a weight: bitsandbytes nests dictionaries, torchao's states are tensor subclasses.
Rejected: `torch.save`, which pickles; and whatever classes a file names: only those of `SUBCLASSES` are ever built.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

# Tensor subclasses that are taken apart and put together again: where their class is.
SUBCLASSES = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}


def flatten(tree: Any, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors of a tree where they are, by names that begin with `name`, and the rest as JSON takes it.

    A tensor that stands in several places is stored once, and stands in all of them again. Raises TypeError for a
    value of a kind that is not known here.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}  # of the tensors seen, by identity

    def visit(value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            if id(value) not in names:
                while path in tensors:  # keys may hold dots themselves
                    path += "~"
                names[id(value)] = path
                tensors[path] = value.detach()
            return {"tensor": names[id(value)]}
        if isinstance(value, torch.Tensor):
            class_name = type(value).__name__
            if class_name not in SUBCLASSES:
                raise TypeError(f"{path}: tensors of {type(value)} cannot be saved")
            parts, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
            inner = {part: getattr(value, part) for part in parts}
            return {"subclass": class_name, "parts": visit(inner, path), "context": visit(context, path)}
        if isinstance(value, Mapping):  # as pairs: JSON would turn numbers that are keys into texts
            return {"mapping": [[key, visit(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, (list, tuple)):
            items = [visit(item, f"{path}.{index}") for index, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        raise TypeError(f"{path}: a {type(value)} cannot be saved")

    return tensors, visit(tree, name)


def unflatten(tensors: Mapping[str, torch.Tensor], rest: Any) -> Any:
    """The tree that `flatten` took apart. Raises KeyError, TypeError or ValueError where it is damaged."""
    if rest is None or isinstance(rest, (bool, int, float, str)):
        return rest
    if isinstance(rest, list):
        return [unflatten(tensors, item) for item in rest]
    if "subclass" in rest:
        class_name = rest["subclass"]
        subclass = getattr(importlib.import_module(SUBCLASSES[class_name]), class_name)
        parts = unflatten(tensors, rest["parts"])
        return subclass.__tensor_unflatten__(parts, unflatten(tensors, rest["context"]), None, None)
    ((kind, value),) = rest.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {key: unflatten(tensors, item) for key, item in value}
    if kind == "size":
        return torch.Size(value)
    if kind == "tuple":
        return tuple(unflatten(tensors, item) for item in value)
    if kind == "dtype":
        dtype = getattr(torch, value)
        if isinstance(dtype, torch.dtype):
            return dtype
    raise ValueError(f"{kind} {value!r} is not known")

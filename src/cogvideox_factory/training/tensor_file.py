"""Writes a safetensors file tensor by tensor, and hashes it on the way.

The file is the one that safetensors' own `save_file` writes, byte for byte. That one needs all tensors on the host at
once, which is twice the states of a full fine-tuning, and its file would have to be read again to be hashed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# The format's names of types. Tensors are stored in this order, the widest first, so that each is aligned.
NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write tensors of any device, of which one at a time is on the host, and flush the file; its SHA-256 in hex.

    Raises TypeError for a type of numbers that is not known here, and OSError as writing does.
    """
    for name, value in tensors.items():
        if value.dtype not in NAMES:
            raise TypeError(f"{name}: numbers of {value.dtype} cannot be saved")
    order = list(NAMES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for content in itertools.chain([_header(tensors, names)], (_bytes_of(tensors[name]) for name in names)):
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(tensors: Mapping[str, torch.Tensor], names: list[str]) -> bytes:
    """Length, then JSON of types, shapes and places, filled up with spaces to a multiple of eight."""
    header, start = {}, 0
    for name in names:
        value = tensors[name]
        end = start + value.numel() * value.element_size()
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> Any:
    """Its numbers as a buffer of bytes, without a copy where they are on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

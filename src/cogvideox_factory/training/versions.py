"""What a run is made with, noted in its folder: the first question when two runs with the same options differ."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import torch

from cogvideox_factory import __version__
from cogvideox_factory.data.files import write_durably

FILE = "versions.json"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")  # those that the numbers come from


def write_versions(run: Path, device: torch.device) -> None:
    """Write versions.json into the run's folder: name → version, and the device. A resumed run notes its latest."""
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    noted = {"cogvideox-factory": __version__, "python": platform.python_version(), **libraries, "device": card}
    write_durably(run / FILE, (json.dumps(noted, indent=2) + "\n").encode())

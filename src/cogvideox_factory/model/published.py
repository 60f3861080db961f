"""The five published models by name, without their weights: their config files are kept with the program.

Only planning takes them: whatever computes with a model needs its weights, and then has its own configs beside them.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

OWNERS = ("THUDM", "zai-org")  # the same models under the earlier and the present name of their owner
NAMES = ("CogVideoX-2b", "CogVideoX-5b", "CogVideoX-5b-I2V", "CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V")
FILES = {
    "model_index": "model_index.json",
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "text_encoder": "text_encoder/config.json",
}


def is_published(name: str) -> bool:
    """Whether a name on the Hub is one of the five."""
    owner, _, model = name.partition("/")
    return owner in OWNERS and model in NAMES


def read_configs(name: str) -> dict[str, dict[str, Any]]:
    """The config of each component of a model, with or without its owner in the name."""
    file = files("cogvideox_factory.model") / "published" / f"{name.rpartition('/')[2]}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def write_configs(name: str, folder: Path) -> None:
    """A pipeline's folder as the Hub has it, without weights and tokenizer."""
    for component, config in read_configs(name).items():
        path = folder / FILES[component]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "tokenizer").mkdir()

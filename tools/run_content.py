"""What `prepare` and `train` leave behind, to be compared with what another run left, byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import yaml
from forked_runs import Lost

TIMES_OF_A_STEP = ("step_seconds", "data_seconds", "memory_gib", "seconds")


def content_of(path: Path) -> Any:
    """Bytes of a file; of tensors those of each by its name, since safetensors writes its header in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (str(value.dtype), value.shape, value.numpy().tobytes()) for name, value in tensors.items()}
        return {"metadata": file.metadata(), **found}


def content_of_prepared(folder: Path) -> dict[str, Any]:
    """All that training reads, and what became of the clips. Unfinished files of a killed process are not read."""
    files = {
        path.relative_to(folder).as_posix(): content_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    report = json.loads(files.pop("report.json"))
    return {**files, "report.json": [report.get(name) for name in ("clips", "skipped")]}


def content_of_run(folder: Path, num_steps: int) -> dict[str, Any]:
    """What was trained, all that it would go on from, and what was written down, without the times it took."""
    found: dict[str, Any] = {
        name: content_of(folder / name) for name in ("pytorch_lora_weights.safetensors", "README.md")
    }
    for name in ("metrics.jsonl", "validation_loss.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        found[name] = [{key: value for key, value in line.items() if key not in TIMES_OF_A_STEP} for line in lines]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    found["config.yaml"] = {name: value for name, value in config.items() if name not in ("output_dir", "data_root")}
    last = folder / "checkpoints" / f"step-{num_steps:08}"
    found |= {f"{last.name}/{path.name}": content_of(path) for path in sorted(last.iterdir())}
    for name, promised in json.loads(found.pop(f"{last.name}/manifest.json"))["files"].items():
        if hashlib.sha256((last / name).read_bytes()).hexdigest() != promised["sha256"]:
            raise Lost(f"ends with a manifest that {name} does not match")
    return found


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    differing = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    for index, name in enumerate(differing):
        one, other = found.get(name), expected.get(name)
        if isinstance(one, dict) and isinstance(other, dict):  # then say what in it
            parts = [part for part in sorted(one.keys() | other.keys()) if one.get(part) != other.get(part)]
            differing[index] = f"{name} ({', '.join(parts[:3])})"
    if differing:
        raise Lost(f"ends with other content of {', '.join(differing)}")

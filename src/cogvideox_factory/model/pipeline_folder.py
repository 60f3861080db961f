"""A complete pipeline on disk: a fine-tuned transformer beside the base model's other parts.

Weights of the other parts are hard links to the base's files, which cost no space (the T5 of the published models has
10 GB), and copies where the file system has none. Everything else is copied: a config is edited by hand, and with a
link the base would be edited too. Rejected: symbolic links, which break when the folder or the base is moved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cogvideox_factory.model.family import Checkpoint

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin")


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a complete pipeline."""
    return (folder / INDEX).is_file()


def save_pipeline(transformer, checkpoint: Checkpoint, folder: Path) -> None:
    """Write what stock `from_pretrained(folder)` loads: the transformer, in its type, and the base's other parts.

    The pipeline is complete or absent: all parts are written under another name and flushed before any gets its own,
    and the file without which there is no pipeline comes last.
    """
    index = {name: value for name, value in checkpoint.pipeline.items() if not name.startswith("_name")}
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pipeline-") as unfinished:
        for part in parts:
            target = Path(unfinished) / part
            if part == "transformer":
                transformer.save_pretrained(target)
            elif (checkpoint.folder / part).is_dir():
                _take_over(checkpoint.folder / part, target, checkpoint.variant)
        vae_config = Path(unfinished) / "vae" / "config.json"
        if json.loads(vae_config.read_text(encoding="utf-8")) != checkpoint.vae:  # options can change how images scale
            vae_config.write_text(json.dumps(checkpoint.vae, indent=2), encoding="utf-8")
        (Path(unfinished) / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        _flush(Path(unfinished))
        (folder / INDEX).unlink(missing_ok=True)  # an earlier pipeline ends here, before its parts are replaced
        for part in sorted(path.name for path in Path(unfinished).iterdir() if path.name != INDEX):
            shutil.rmtree(folder / part, ignore_errors=True)
            os.replace(Path(unfinished) / part, folder / part)
        os.replace(Path(unfinished) / INDEX, folder / INDEX)


def _take_over(source: Path, target: Path, variant: str | None) -> None:
    """The files of a part, under the names that `from_pretrained` looks for without a variant."""
    for file, name in _files(source, variant):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        content = file.resolve()  # the Hub's cache holds links to files that are named by their hash
        if name.endswith(".index.json"):  # names the shards
            place.write_text(_without_variant(content.read_text(encoding="utf-8"), variant), encoding="utf-8")
        elif place.suffix in WEIGHTS:
            try:
                os.link(content, place)
            except OSError:  # another file system, or one without links
                shutil.copyfile(content, place)
        else:
            shutil.copyfile(content, place)


def _files(source: Path, variant: str | None) -> Iterator[tuple[Path, str]]:
    """Files of a part and their new names; weights are those of the variant, or the plain ones where there are none."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    weights = {path for path in files if path.suffix in WEIGHTS or re.search(r"\.index\.([\w.]+\.)?json$", path.name)}
    chosen = variant if any(_variant_of(path.name) == variant for path in weights) else None
    for path in files:
        if path not in weights or _variant_of(path.name) == chosen:
            yield path, str(path.relative_to(source).with_name(_without_variant(path.name, chosen)))


def _variant_of(name: str) -> str | None:
    """fp16 of model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and model.safetensors.index.fp16.json."""
    found = re.search(r"\.index\.(\w+)\.json$", name) or re.search(r"^[^.]+\.(\w+)(?:-\d+-of-\d+)?\.\w+$", name)
    return found[1] if found else None


def _without_variant(text: str, variant: str | None) -> str:
    return re.sub(rf"\.{re.escape(variant)}(?=[-.])", "", text) if variant else text


def _flush(folder: Path) -> None:
    """Make all files in a folder last through a power cut before they get their names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

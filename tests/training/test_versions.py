"""versions.json of a run."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import diffusers
import torch

from cogvideox_factory import __version__
from cogvideox_factory.training.versions import write_versions


def test_versions_are_those_of_the_modules_themselves(tmp_path: Path) -> None:
    write_versions(tmp_path, torch.device("cpu"))
    noted = json.loads((tmp_path / "versions.json").read_text())
    assert noted["cogvideox-factory"] == __version__ and noted["python"] == platform.python_version()
    assert noted["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert noted["diffusers"] == diffusers.__version__
    assert noted["device"] == "cpu"

"""The notebook, cell by cell, on a tiny model: its lines for the shell in-process, its Python as it stands."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Cli = Callable[..., tuple[int, str, str]]
NOTEBOOK = Path(__file__).parent.parent / "examples/your_clips.ipynb"
SMALL = {  # what a command is given besides, so that it is done in seconds and without a GPU
    "inspect": "--frame_buckets 17 --height_buckets 64 --width_buckets 96",
    "train": "--frame_buckets 17 --height_buckets 64 --width_buckets 96 --rank 4 --lora_alpha 4 --max_train_steps 1 "
    "--gpu_memory 24 --num_inference_steps 1 --report_to none",
    "sample": "--num_inference_steps 1",
}


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_cells_run_in_order(
    tiny_model: Path, few_clips: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    display = ModuleType("IPython.display")
    for name in ("Image", "Video", "HTML"):
        setattr(display, name, lambda what, **options: shown.append(what))
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    (tmp_path / "examples").mkdir()
    (tmp_path / "requirements.txt").touch()
    monkeypatch.chdir(tmp_path / "examples")  # where Jupyter starts
    names: dict[str, str] = {}
    commands = []
    for cell in code_cells():
        cell = "\n".join(line for line in cell.splitlines() if not line.startswith("%pip"))
        if cell.startswith("!"):
            program, command, *arguments = shlex.split(cell[1:].format_map(names))
            assert program == "cogvideox-factory"
            code, _, messages = cli(command, *arguments, *SMALL[command].split())
            assert code == 0, messages
            commands.append(command)
            continue
        cell = cell.replace("pipe.enable_model_cpu_offload()\n", "").replace("torch.float16", "torch.float32")  # GPU
        cell = cell.replace("num_frames=49", "num_frames=17, height=64, width=96, num_inference_steps=1")
        exec(compile(cell, NOTEBOOK.name, "exec"), names)
        if "MODEL" in cell and "CLIPS" in cell:
            names |= {"MODEL": str(tiny_model), "CLIPS": str(few_clips)}
    assert commands == ["inspect", "train", "sample"]
    picture, page, *videos = shown
    assert Path(picture).is_file() and "<iframe" in page
    assert videos == ["runs/sample.mp4", "runs/diffusers.mp4"] and all(Path(path).stat().st_size for path in videos)


def test_it_holds_no_output_and_its_links_lead_somewhere() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
    text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)

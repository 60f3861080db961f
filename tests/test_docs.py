"""What the documents tell people to type can be typed, and what they point to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/results/README.md"])


def commands_of(page: Path) -> list[str]:
    """Commands of this program in the page's blocks of shell code, each on one line."""
    blocks = "\n".join(re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE))
    lines = re.sub(r"\\\n\s*", " ", blocks).splitlines()
    return [line.strip() for line in lines if re.search(r"cogvideox-factory |-m cogvideox_factory ", line)]


COMMANDS_SHOWN = [(page, command) for page in PAGES for command in commands_of(page)]
IDS = [f"{page.stem}-{number}" for number, (page, _) in enumerate(COMMANDS_SHOWN)]


def test_commands_are_found() -> None:
    pages = {page.name for page, _ in COMMANDS_SHOWN}
    assert {"README.md", "README_zh.md", "dataset.md", "memory.md", "planning.md", "training.md"} <= pages


@pytest.mark.parametrize(
    ("page", "command"),
    COMMANDS_SHOWN,
    ids=[f"{page.stem}-{number}" for number, (page, _) in enumerate(COMMANDS_SHOWN)],
)
def test_a_command_that_is_shown_can_be_typed(
    page: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every flag exists, and takes the value that it is given. Dots stand for what the text leaves open."""
    monkeypatch.chdir(tmp_path)
    _, typed = re.split(r"cogvideox-factory |-m cogvideox_factory ", command, maxsplit=1)
    typed = re.split(r" (?:\||&&|>|;) |' &$", typed)[0]
    name, *arguments = (word for word in shlex.split(typed, comments=True) if word != "…")
    if "--config" in arguments:  # a run's own, which there is none of here
        file = Path(arguments[arguments.index("--config") + 1])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("pretrained_model_name_or_path: model\ndata_root: data\noutput_dir: run\n")
    if name == "train" and "--config" not in arguments:
        for flag in ("--pretrained_model_name_or_path", "--data_root", "--output_dir"):
            arguments += [] if flag in arguments or "…" not in command else [flag, "given"]
    parse_command(COMMANDS[name], name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target

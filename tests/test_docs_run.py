"""What the documents show is run: every line of shell code, with a tiny model and small clips for the real ones.

A line is given to bash with stand-ins for the programs that it calls. Those of this program only write down what they
were called with, which is then done in-process; so quotes, variables and whole scripts mean what they mean in a shell.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from cogvideox_factory.cli import main
from cogvideox_factory.config import COMMANDS, option_values

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

MODELS = {  # what a document names: the tiny model that takes its place
    "THUDM/CogVideoX-2b": "2b",
    "THUDM/CogVideoX-5b": "5b",
    "THUDM/CogVideoX-5b-I2V": "5b-I2V",
    "THUDM/CogVideoX1.5-5B": "1.5-5B",
    "THUDM/CogVideoX1.5-5B-I2V": "1.5-5B-I2V",
    "models/random-2b": "2b",
}
SMALL = {  # values that take the place of those that a line, or its recipe, gives
    **{"frame_buckets": "17", "height_buckets": "64", "width_buckets": "96"},
    **{"num_frames": "17", "height": "64", "width": "96"},
    **{"rank": "4", "lora_alpha": "4", "step": "1"},
    "validation_fraction": "0.5",  # of few clips, less can be none
}
STAND_INS = {  # programs that are not run, and why
    "pip": "installs from a registry",
    "hf": "downloads from the Hub",
    "make": "installs from a registry first; its targets are the program and the tests",
    "python": "a tool that writes weights of real size; tests/tools run the tools",
    "scontrol": "needs Slurm",
}
LEFT_OUT = {  # options that are not run, and why
    "--push_to_hub": "there is no Hub here; tests/training/test_hub.py uploads to one of its own",
}


def lines_of(text: str) -> Iterator[str]:
    """Lines of a page's shell code, each with those that continue it; a script is one. And commands within sentences
    that can be typed as they are."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        lines = [block] if block.startswith("#!") else re.sub(r"\\\n\s*", "", block).splitlines()
        yield from (line.strip() for line in lines if line.strip())
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for code in re.findall(r"`((?:cogvideox-factory|accelerate launch|train|sample|report) [^`]+)`", sentences):
        if "…" not in code and re.search(r" (runs|data)/", code):  # others name options, or leave something open
            program = "cogvideox-factory " if code.split()[0] in COMMANDS else ""
            yield program + " ".join(code.split())


def lines_shown() -> dict[str, str]:
    """Lines of all pages with what names them in a test; what several pages show is run once."""
    named: dict[str, str] = {}
    for page in PAGES:
        for number, line in enumerate(lines_of(page.read_text())):
            line = re.sub(r"\s+#(?!!).*", "", line) if "\n" not in line else line
            line = line.replace(" …", "")  # what the text leaves open
            command = re.search(r"cogvideox[-_]factory (\w+)|[\w/]+\.(?:sh|py)|\w+", line)
            named.setdefault(line, f"{page.stem}-{number}-{command[1] or command[0] if command else ''}")
    return named


LINES = lines_shown()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, few_clips: Path) -> Path:
    """A run of a LoRA of one step, with a video."""
    run = tmp_path_factory.mktemp("documents") / "run"
    flags = ("--rank", "4", "--max_train_steps", "1", "--num_inference_steps", "1", "--validation_prompt", "a circle")
    paths = ("--pretrained_model_name_or_path", tiny_model, "--data_root", few_clips, "--output_dir", run)
    assert main(["train", *map(str, paths), *flags]) == 0
    return run


@pytest.fixture(scope="module")
def more_clips(first_clips: Callable[[int], Path]) -> Path:
    """Eight clips, of which some can be held out."""
    return first_clips(8)


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_model: Path,
    few_clips: Path,
    more_clips: Path,
    finished_run: Path,
    prepared_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder that lines are typed in: what the documents take to be there is there, small."""
    folder = tmp_path / "place"
    for path in (*ROOT.glob("*.sh"), ROOT / "accelerate_configs", ROOT / "recipes", ROOT / "tools"):
        link(folder / path.name, path)
    link(folder / "data/steamboat", few_clips)
    for name in re.findall(r"data/[\w-]+", "\n".join(LINES)):
        link(folder / name, prepared_folder if name.endswith("-prepared") else more_clips)
    link(folder / "runs/demo/clips", few_clips)
    link(folder / "runs/demo/model", tiny_model)
    link(folder / "runs/demo/prepared", prepared_folder)
    for name in ("steamboat", "style", "rank-16", "rank-64"):
        run = shutil.copytree(finished_run, folder / "runs" / name)
        config = run / "config.yaml"
        config.write_text(config.read_text().replace(str(finished_run), f"runs/{name}"))
    monkeypatch.chdir(folder)
    return folder


def link(name: Path, target: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    if not name.exists():
        name.symlink_to(target)


@pytest.fixture
def calls_of(tmp_path: Path) -> Callable[[str], list[list[str]]]:
    """Give a line to bash: the programs that it calls, each with its arguments."""
    programs, given = tmp_path / "bin", tmp_path / "given"
    programs.mkdir()
    record = f"#!/bin/sh\nprintf '%s\\0' \"${{0##*/}}\" \"$@\" >> '{given}'\nprintf '\\036' >> '{given}'\n"
    texts = dict.fromkeys((*STAND_INS, "cogvideox-factory", "accelerate"), record)
    texts["srun"] = '#!/bin/sh\nexec "$@"\n'
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def calls(line: str) -> list[list[str]]:
        environment = {"PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin", "RANK_OF_THIS_MACHINE": "0"}
        done = subprocess.run(["bash", "-e", "-c", line], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        calls = given.read_text().split("\036")[:-1] if given.exists() else []
        return [call.split("\0")[:-1] for call in calls]

    return calls


def without_launcher(arguments: Sequence[str]) -> list[str]:
    """Arguments of this program from those of accelerate, whose own are read by its own parser."""
    from accelerate.commands.launch import launch_command_parser

    launched = launch_command_parser().parse_args(arguments[1:])
    assert arguments[0] == "launch" and launched.module and launched.training_script == "cogvideox_factory"
    assert launched.config_file is None or Path(launched.config_file).is_file()
    return launched.training_script_args


def made_small(arguments: Sequence[str], member: Callable[[str], Path]) -> list[str]:
    """Arguments with the tiny model of the same kind, and with sizes that it takes."""
    command, *flags = (word for word in arguments if word not in LEFT_OUT)
    small = [command, *(str(member(MODELS[word])) if word in MODELS else word for word in flags)]
    shown = {word[2:] for word in flags if word.startswith("--")}
    config = Path(flags[flags.index("--config") + 1]) if "config" in shown else None
    if config and config.parent.name == "recipes":  # a run's own config.yaml is small already
        recipe = yaml.safe_load(config.read_text())
        shown |= set(recipe) & set(option_values(COMMANDS[command]()))
        small += ["--pretrained_model_name_or_path", str(member(MODELS[recipe["pretrained_model_name_or_path"]]))]
    small += [word for name, value in SMALL.items() if name in shown for word in (f"--{name}", value)]
    goes_on = "resume_from_checkpoint" in shown and config is not None  # the run that is there; else a new one
    if command == "train":
        small += ["--max_train_steps", "2" if goes_on else "1", "--report_to", "none"]
        small += ["--gpu_memory", "24"] if "fit" in shown and "gpu_memory" not in shown else []
    if command in ("train", "sample"):
        small += ["--num_inference_steps", "1"]
    if "output_dir" in shown and not goes_on:
        folder = Path(flags[flags.index("--output_dir") + 1])
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)
    return small


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES, ids=LINES.values())
def test_what_is_shown_runs(
    line: str, place: Path, calls_of: Callable[[str], list[list[str]]], member: Callable[[str], Path], cli: Cli
) -> None:
    for program, *arguments in calls_of(line):
        if program in STAND_INS:
            continue
        if program == "accelerate":
            arguments = without_launcher(arguments)
        arguments = made_small(arguments, member)
        code, _, messages = cli(*arguments)
        assert code == 0, f"{line}\n{shlex.join(arguments)}\n{messages}"
        if arguments[0] == "train":
            steps = (Path(last_value(arguments, "--output_dir") or "runs/steamboat") / "metrics.jsonl").read_text()
            assert len(steps.splitlines()) == int(last_value(arguments, "--max_train_steps") or 0)
        elif arguments[0] == "sample":
            assert Path(last_value(arguments, "--output") or "").is_file()


def last_value(arguments: Sequence[str], flag: str) -> str | None:
    return next((value for name, value in reversed(list(pairwise(arguments))) if name == flag), None)


def test_what_is_not_run_is_shown_somewhere() -> None:
    text = "\n".join(LINES)
    for name in STAND_INS:
        assert re.search(rf"(?:^|[(;&|] ?|then ){name} ", text, re.MULTILINE), name
    assert all(f" {option}" in text for option in LEFT_OUT)


def test_each_recipe_is_shown_with_the_model_of_its_name() -> None:
    """So each is run; its options are checked by the parser then."""
    recipes = sorted(ROOT.glob("recipes/*.yaml"))
    assert len(recipes) > 10
    for path in recipes:
        assert any(f"train --config recipes/{path.name} " in line for line in LINES), path.name
        recipe = yaml.safe_load(path.read_text())
        _, member, method = re.fullmatch(r"(\w+?)-(.+)-(lora|sft)", path.stem).groups()  # type: ignore[union-attr]
        assert MODELS[recipe["pretrained_model_name_or_path"]].lower() == member
        assert recipe.get("training_type", "lora") == method
        assert f"recipes/{path.name} " in path.read_text().splitlines()[1]


def test_lines_are_found() -> None:
    """Each command of the program, each way to call it."""
    text = "\n".join(LINES)
    for name in ("inspect", "prepare", "plan", "train", "sample", "report"):
        assert f"cogvideox-factory {name} " in text, name
    assert "accelerate launch " in text and "./train_text_to_video_lora.sh" in text and "#SBATCH" in text

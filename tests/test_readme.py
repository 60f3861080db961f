"""What README and the scripts tell people to do, done on the tiny model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path

import av
import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.config import COMMANDS, Demo, option_values
from cogvideox_factory.demo import STYLE, lesson
from cogvideox_factory.demo.world import NATIVE_SIZE, render_clips

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README_zh.md")
DATASET_GUIDE = "docs/dataset.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prepared_folder: Path) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("readme") / "run"
    model = ("--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder, "--load_tensors")
    assert main([*map(str, ("train", *model, "--output_dir", folder)), "--max_train_steps", "2"]) == 0
    return folder


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prepared_folder: Path) -> Path:
    """A run of full fine-tuning of one step."""
    folder = tmp_path_factory.mktemp("readme-sft") / "run"
    model = ("--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder, "--load_tensors")
    flags = ("--training_type", "sft", "--max_train_steps", "1")
    assert main([*map(str, ("train", *model, "--output_dir", folder)), *flags]) == 0
    return folder


def without_comments(code: str) -> str:
    return re.sub(r" *#.*", "", code)


@pytest.mark.parametrize("number", [0, 1], ids=["lora", "sft"])
def test_the_diffusers_snippets_run(
    number: int, run: Path, fine_tuned: Path, tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    snippets, in_chinese = (
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL) for name in READMES
    )
    assert len(snippets) == 2
    assert [without_comments(text) for text in in_chinese] == [without_comments(text) for text in snippets]
    snippet = snippets[number]
    paths = ({"THUDM/CogVideoX-5b": tiny_model, "runs/steamboat": run}, {"runs/steamboat-sft": fine_tuned})[number]
    for text, replacement in (
        *((f'"{name}"', f'"{path}"') for name, path in paths.items()),
        ("pipe.enable_model_cpu_offload()\n", ""),  # needs a GPU
        ("num_frames=49", "num_frames=17, num_inference_steps=2"),
        ("height=480", "height=64"),
        ("width=720", "width=96"),
    ):
        assert text in snippet
        snippet = snippet.replace(text, replacement)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    with av.open(str(tmp_path / "mouse.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 17


@pytest.mark.parametrize(
    "file", [*READMES, DATASET_GUIDE, "docs/training.md", "docs/recipes.md", *(path.name for path in ROOT.glob("*.sh"))]
)
def test_every_option_that_is_named_exists(file: str) -> None:
    known = {name for command in COMMANDS.values() for name in option_values(command())}
    known |= {
        "member",
        "config",
        "help",
        "logdir",
        "repo-type",
        "local-dir",
        "config_file",
        "model_id",
        "num_processes",
        "signal",  # of Slurm
        "signals-to-handle",  # of torchrun
        "shutdown-timeout",
        "rounds",  # of a tool
    }
    text = (ROOT / file).read_text()
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    assert named and not named - known


def test_the_readmes_name_the_same_options_and_files() -> None:
    english, chinese = (
        set(
            re.findall(
                r"--[a-z_]+|[\w/]+\.(?:py|sh|html|mp4|txt|yaml|jsonl?|safetensors|png)", (ROOT / name).read_text()
            )
        )
        for name in READMES
    )
    assert english == chinese


@pytest.fixture
def run_script(cli: Cli, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run a script with these variables, and the one command that it calls in-process: exit code, standard error."""
    program, given = tmp_path / "bin/cogvideox-factory", tmp_path / "given"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> '{given}'\n")
    program.chmod(0o755)

    def call(name: str, variables: Mapping[str, object], *flags: str) -> tuple[int, str]:
        given.unlink(missing_ok=True)
        environment = {**os.environ, **{key: str(value) for key, value in variables.items()}}
        environment["PATH"] = f"{program.parent}{os.pathsep}{environment['PATH']}"
        subprocess.run([str(ROOT / name), *flags], env=environment, check=True, timeout=60)
        code, _, messages = cli(*given.read_text().split("\0")[:-1])
        return code, messages

    return call


def test_the_scripts_call_what_is_installed() -> None:
    (entry,) = entry_points(group="console_scripts", name="cogvideox-factory")
    assert entry.load() is main


def test_the_scripts_run_as_they_are_when_their_variables_point_to_small_input(
    run_script: Callable[..., tuple[int, str]], tiny_model: Path, few_clips: Path, tmp_path: Path
) -> None:
    sizes = {"FRAMES": "17", "HEIGHTS": "64", "WIDTHS": "96", "MODEL": tiny_model}
    prepare = {**sizes, "DATA_ROOT": few_clips, "OUTPUT_DIR": tmp_path / "prepared"}
    code, messages = run_script("prepare_dataset.sh", prepare)
    assert code == 0, messages
    train = {**sizes, "DATA_ROOT": tmp_path / "prepared", "OUTPUT_DIR": tmp_path / "run"}
    train |= {"STEPS": "2", "LORA_RANK": "4", "INFERENCE_STEPS": "2"}
    code, messages = run_script("train_text_to_video_lora.sh", train, "--load_tensors")
    assert code == 0, messages
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").exists() and (tmp_path / "run/report.html").exists()
    code, messages = run_script("train_text_to_video_lora.sh", train, "--load_tensors")
    assert code == 0 and "finished" in messages
    whole = {**train, "OUTPUT_DIR": tmp_path / "sft"}
    code, messages = run_script("train_text_to_video_sft.sh", whole, "--load_tensors")
    assert code == 0, messages
    assert (tmp_path / "sft/model_index.json").exists() and (tmp_path / "sft/report.html").exists()


@pytest.mark.parametrize(
    ("script", "result"),
    [("lora", "pytorch_lora_weights.safetensors"), pytest.param("sft", "model_index.json", marks=pytest.mark.slow)],
)
def test_the_scripts_for_image_to_video_run(
    run_script: Callable[..., tuple[int, str]],
    script: str,
    result: str,
    member: Callable[[str], Path],
    few_clips: Path,
    tmp_path: Path,
) -> None:
    sizes = {"FRAMES": "17", "HEIGHTS": "64", "WIDTHS": "96", "STEPS": "1", "LORA_RANK": "4", "INFERENCE_STEPS": "1"}
    train = {**sizes, "MODEL": member("5b-I2V"), "DATA_ROOT": few_clips, "OUTPUT_DIR": tmp_path / "run"}
    code, messages = run_script(f"train_image_to_video_{script}.sh", train, "--num_image_draws", "1")
    assert code == 0, messages
    assert (tmp_path / "run" / result).exists()
    assert list((tmp_path / "run/validation/images").glob("*.png"))


@pytest.mark.slow
def test_the_path_that_guides_name_prepares(tiny_model: Path, few_clips: Path, tmp_path: Path) -> None:
    flags = ["--model_id", tiny_model, "--data_root", few_clips, "--output_dir", tmp_path / "out"]
    flags += ["--caption_column", "prompts.txt", "--video_column", "videos.txt", "--max_sequence_length", "226"]
    flags += ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "17", "--target_fps", "8"]
    flags += ["--batch_size", "1", "--dtype", "fp32", "--save_latents_and_embeddings", "--max_num_frames", "17"]
    command = [sys.executable, str(ROOT / "training/prepare_dataset.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out/index.jsonl").read_text().splitlines()) == 2


def test_the_commands_of_the_guide_to_data_sets_give_what_it_shows(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    text = (ROOT / DATASET_GUIDE).read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/model").symlink_to(tiny_model)
    render_clips(tmp_path / "runs/demo/clips", lesson(Demo().seed), NATIVE_SIZE, STYLE)
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = [line for line in blocks.splitlines() if line.startswith("cogvideox-factory ")]
    shown = {}
    for command in commands:
        _, name, *arguments = shlex.split(command)
        code, shown[name], messages = cli(name, *arguments)
        assert code == 0, messages
    assert list(shown) == ["inspect", "prepare", "train"]
    (table,) = re.findall(r"```\n(bucket .*?)```", text, re.DOTALL)
    assert table in shown["inspect"]
    assert len((tmp_path / "runs/trained/metrics.jsonl").read_text().splitlines()) == 10
    listed = re.findall(r"^  (\w[\w.]*)/? ", text[text.index("runs/demo/prepared/\n") :].split("```")[0], re.MULTILINE)
    missing = {name for name in listed if not (tmp_path / "runs/demo/prepared" / name).exists()}
    assert missing == {"images"}  # only image-to-video models have them


@pytest.mark.parametrize("name", READMES)
def test_the_map_of_the_source_leaves_nothing_out(name: str) -> None:
    source = ROOT / "src/cogvideox_factory"
    tree = re.findall(r"```\n(src/cogvideox_factory/.*?)```", (ROOT / name).read_text(), re.DOTALL)[0]
    shown = set(re.findall(r"\b\w+(?:\.py|/)", tree))
    there = {f"{path.name}/" for path in source.iterdir() if (path / "__init__.py").exists()}
    there |= {path.name for path in source.glob("*.py") if not path.name.startswith("__")}
    assert there and there <= shown, there - shown

"""The page with a command for each card is what was found, and its commands are commands."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import Train, with_values
from cogvideox_factory.planning.texts import flags_of

MAKER = Path(__file__).parents[1] / "docs/make_cards.py"
FOUND = MAKER.with_name("cards.json")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cards", MAKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_and_picture_are_made_from_what_was_found(maker: ModuleType) -> None:
    found = json.loads(maker.DATA.read_text())
    assert maker.PAGE.read_text() == maker.page(found), "run docs/make_cards.py"
    assert maker.PICTURE.read_text() == maker.picture(found), "run docs/make_cards.py"


def test_every_command_is_one_and_fits(maker: ModuleType) -> None:
    found = json.loads(maker.DATA.read_text())
    fitting = [(key, card, row) for key, rows in found.items() for card, row in rows.items() if row["fits"]]
    assert fitting
    for key, card, row in fitting:
        member, method = key.split()
        flags = ("--model_id", member, "--data_root", "x", "--output_dir", "x", "--training_type", method)
        parse_command(Train, "train", (*flags, *row["flags"].split()))
        assert max(phase["peak_gib"] for phase in row["phases"]) + 1.2 <= float(card)
        assert max(phase["host_gib"] for phase in row["phases"]) + 2 <= maker.CARDS[int(card)]


ALL_FLAGS = sorted(
    {
        f"--training_type {key.split()[1]} {row['flags']}"
        for key, rows in json.loads(FOUND.read_text()).items()
        for row in rows.values()
        if row["fits"]
    }
)
NEED_A_GPU = {"--use_cpu_offload_optimizer", "--offload_gradients"}  # refused without one; the second needs the first


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ALL_FLAGS)))
def test_every_command_trains(
    number: int, tiny_model: Path, prepared_folder: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    """The options of a card go together, in the training and for its videos, on a CPU and a tiny model at least."""
    flags = [flag for flag in ALL_FLAGS[number].split() if flag not in NEED_A_GPU]
    paths = (
        "--model_id",
        tiny_model,
        "--data_root",
        prepared_folder,
        "--load_tensors",
        "--output_dir",
        tmp_path / "run",
    )
    few = ("--max_train_steps", "1", "--num_inference_steps", "1", "--validation_prompt", "a circle")
    code, _, messages = cli("train", *paths, *few, "--report_to", "none", *flags)
    assert code == 0, f"{ALL_FLAGS[number]}\n{messages}"
    assert list((tmp_path / "run/validation").glob("step-00000001/*.mp4"))


def test_flags_are_written_as_they_are_read() -> None:
    values = {"gradient_checkpointing": True, "resident_blocks": 3, "quantize_base": "nf4"}
    needed = ("--model_id", "x", "--data_root", "x", "--output_dir", "x")
    plain = parse_command(Train, "train", needed)
    assert parse_command(Train, "train", (*needed, *flags_of(values).split())) == with_values(plain, values)

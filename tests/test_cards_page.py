"""The page with a command for each card is what was found, and its commands are commands."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import Train, with_values
from cogvideox_factory.planning.texts import flags_of

MAKER = Path(__file__).parents[1] / "docs/make_cards.py"


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


def test_flags_are_written_as_they_are_read() -> None:
    values = {"gradient_checkpointing": True, "resident_blocks": 3, "quantize_base": "nf4"}
    needed = ("--model_id", "x", "--data_root", "x", "--output_dir", "x")
    plain = parse_command(Train, "train", needed)
    assert parse_command(Train, "train", (*needed, *flags_of(values).split())) == with_values(plain, values)

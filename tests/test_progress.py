"""Bars on a terminal and lines elsewhere, as they reach standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from cogvideox_factory import messages, progress
from cogvideox_factory.progress import progress_bar, show_bars_of_diffusers


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    messages.configure()
    yield
    messages.configure()


def walk(**options) -> None:
    for _ in progress_bar(range(3), "Encoding clips", "clip", **options):
        pass


def test_where_nobody_watches_a_stage_is_told_in_whole_lines(capfd: pytest.CaptureFixture[str]) -> None:
    walk()
    (line,) = capfd.readouterr().err.splitlines()  # it took less than ten seconds: its end alone
    assert line.startswith("Encoding clips  3/3 [00:00<00:00, ") and line.endswith("clip/s]")
    assert "\r" not in line
    walk(is_silent=True)
    assert capfd.readouterr().err == ""


def test_a_line_as_often_as_the_time_between_them_says(capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with progress_bar(None, "Training", "step", 5, done=2) as bar:
        for step in (3, 4, 5):
            bar.set_postfix(loss=f"{1 / step:.2f}", refresh=False)
            bar.update()
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [f"Training  {step}/5" for step in (3, 4, 5)]
    assert [line.rpartition(" ")[2] for line in lines] == ["loss=0.33]", "loss=0.25]", "loss=0.20]"]


def test_for_programs_the_figures_stand_apart(capfd: pytest.CaptureFixture[str]) -> None:
    messages.configure(form="json")
    walk()
    line = json.loads(capfd.readouterr().err)
    assert line["progress"] == {"stage": "Encoding clips", "done": 3, "total": 3, "seconds_left": 0.0}


def test_on_a_terminal_a_bar_is_drawn_and_at_other_levels_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.utils import logging as of_diffusers

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    walk()
    shown = capfd.readouterr().err
    assert "\r" in shown and "100%|" in shown
    show_bars_of_diffusers()
    assert of_diffusers.is_progress_bar_enabled()
    messages.configure("warning")
    walk()
    assert capfd.readouterr().err == ""
    show_bars_of_diffusers()
    assert not of_diffusers.is_progress_bar_enabled()

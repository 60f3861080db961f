"""The page that compares runs, read back as the page of one run is."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import (
    HOSTILE,
    MEASURED,
    Node,
    TreeBuilder,
    add_metrics,
    add_prepared,
    add_videos,
    make_run,
    numbers_of,
    video_bytes,
)

from cogvideox_factory.config import UserError
from cogvideox_factory.report import write_comparison


def page_of(*runs: Path) -> Node:
    builder = TreeBuilder()
    builder.feed(write_comparison(runs).read_text("utf-8"))
    builder.close()
    assert [node.tag for node in builder.open] == ["document"], "an element is never closed"
    return builder.open[0]


def chart(page: Node, key: str) -> Node:
    (figure,) = page.section("Training").all("figure", key)
    return figure


def table_of(node: Node) -> dict[str, list[str]]:
    """First cell → the others."""
    return {first: others for first, *others in node.table_rows()}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of other lengths and ranks."""
    short, long = make_run(tmp_path / "short", rank=4), make_run(tmp_path / "long", rank=64)
    add_metrics(short, [1.0, 1.0])
    add_metrics(long, [0.5] * 4, lr=2e-4)
    return short, long


def test_curves_are_drawn_on_the_same_axes_in_a_colour_a_run(runs: tuple[Path, Path]) -> None:
    page = page_of(*runs)
    figure = chart(page, "loss")
    short, long = figure.all("path", "line")
    assert short.classes[1:] == ["line", "run-1"] and long.classes[1:] == ["line", "run-2"]
    # Step 2 of 4, at the top; its last step is in the middle of the chart.
    assert numbers_of(short) == [(25, 0), (50, 0)]
    assert numbers_of(long) == [(25, 100), (50, 100), (75, 100), (100, 100)]
    rates = [numbers_of(path)[-1] for path in chart(page, "lr").all("path", "line")]
    assert rates == [(50, 100), (100, 0)]
    assert len(chart(page, "grad_norm").all("path", "line")) == 2
    assert len(chart(page, "step_seconds").all("path", "line")) == 2
    legend = page.section("Training").all("ul", "legend")[0].all("li")
    assert [(item.text, item.all("span")[0].classes[-1]) for item in legend] == [("short", "run-1"), ("long", "run-2")]
    style = page.all("style")[0].text
    assert all(f"--run-{number}: #" in style and f".run-{number} {{" in style for number in range(1, 9))


def test_held_out_losses_are_on_the_axes_too(runs: tuple[Path, Path]) -> None:
    assert not page_of(*runs).all("path", "held-out")
    (runs[1] / "validation_loss.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 4, "loss": 1.0}\n')
    page = page_of(*runs)
    assert [path.classes[1:] for path in chart(page, "loss").all("path", "held-out")] == [
        ["dots", "held-out", "run-2"],
        ["line", "held-out", "run-2"],
    ]
    assert numbers_of(chart(page, "loss").all("path", "held-out")[1])[0] == (0, 0)
    assert "held-out" in page.section("Training").text
    assert table_of(page.all("header")[0])["Held-out loss"] == ["–", "1, best 1 at step 4"]


def test_figures_of_the_runs_stand_side_by_side(runs: tuple[Path, Path]) -> None:
    page = page_of(*runs)
    assert page.all("h1")[0].text == "short · long"
    figures = table_of(page.all("header")[0])
    assert figures["Method"] == ["LoRA, rank 4", "LoRA, rank 64"]
    assert figures["Steps"] == ["2 of 200", "4 of 200"] and figures["Last loss"] == ["1", "0.5"]


def test_only_options_that_differ_are_shown_and_no_secret(tmp_path: Path) -> None:
    common = {"hub_token": "hf_secret", "name": None}
    first = make_run(tmp_path / "a", **{**common, "output_dir": "a", "seed": 1})
    second = make_run(tmp_path / "b", **{**common, "output_dir": "b", "hub_token": "hf_other", "rank": 8})
    third = make_run(tmp_path / "c", **{**common, "output_dir": "c", "images": "https://a.example/b.png?sig=0a1b"})
    (third / "versions.json").write_text('{"torch": "2.13"}')
    page = page_of(first, second, third)
    assert table_of(page.section("What differs")) == {
        "rank": ["64", "8", "64"],
        "seed": ["1", "–", "–"],
        "images": ["–", "–", "https://a.example/b.png?…"],
        "torch, version": ["–", "–", "2.13"],
    }
    assert not re.search("hf_secret|hf_other|0a1b", (first / "comparison.html").read_text("utf-8"))


def test_the_same_options_are_said_to_be_the_same(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert "the same" in page.section("What differs").text
    assert "No step" in page.section("Training").text and "No videos yet" in page.section("Their last").text
    assert "None." in page.section("Problems").text and "Nothing has been" in page.section("Memory").text


def test_last_videos_stand_side_by_side_by_prompt(runs: tuple[Path, Path]) -> None:
    short, long = runs
    add_videos(short, 0, ("a", 1, b"old"))
    add_videos(short, 2, ("a", 1, b"short a"))
    add_videos(long, 4, ("b", 1, b"long b"), ("a", 1, b"long a"))
    add_videos(long, 3, ("only here", 1, b"early"))
    both, *alone = page_of(*runs).section("Their last").all("article", "sample")
    assert both.all("p")[0].text.startswith("a ")
    assert [video_bytes(figure) for figure in both.all("figure")] == [b"short a", b"long a"]
    assert [figure.text for figure in both.all("figure")] == ["short · Step 2", "long · Step 4"]
    assert len(both.all("div", "controls")) == 1
    assert {sample.all("figure")[0].text for sample in alone} == {"No video of short."}
    assert {video_bytes(sample.all("figure")[1]) for sample in alone} == {b"long b", b"early"}


def test_more_prompts_than_a_browser_plays_are_counted(runs: tuple[Path, Path]) -> None:
    for run in runs:
        add_videos(run, 2, *((f"prompt {n}", 1, b"x") for n in range(32)))
    section = page_of(*runs).section("Their last")
    assert len(section.all("video")) == 60 and "Prompts left out here: 2" in section.text


def test_memory_and_problems_of_each_run(runs: tuple[Path, Path]) -> None:
    short, long = runs
    (short / "memory.json").write_text(json.dumps({"unit": "GiB", "measured": MEASURED, "planned": None}))
    planned = {"memory_before_validation": 19.0}
    (long / "memory.json").write_text(json.dumps({"measured": MEASURED, "planned": planned}))
    add_prepared(long / "prepared", [[49, 480, 720]], [{"path": "a.mp4", "reason": "broken"}])
    (long / "skipped_steps.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    (short / "validation_loss.jsonl").write_text("damaged\n")
    page = page_of(*runs)
    assert table_of(page.section("Memory")) == {
        "Before the first step, measured": ["5.00 GiB", "5.00 GiB"],
        "Peak of training, measured": ["20.00 GiB", "20.00 GiB"],
        "Peak of training, planned": ["–", "19.00 GiB"],
    }
    problems = page.section("Problems")
    assert table_of(problems) == {"Skipped clips": ["0", "1"], "Skipped steps": ["0", "2"]}
    (note,) = problems.all("p", "note")
    assert note.text.startswith("short: ") and "validation_loss.jsonl" in note.text


def test_a_run_without_numbers_is_a_row_like_any_other(runs: tuple[Path, Path]) -> None:
    add_metrics(runs[0], [math.nan] * 2, grad_norm=None, step_seconds=None)
    page = page_of(*runs)
    assert [path.classes[-1] for path in chart(page, "loss").all("path", "line")] == ["run-2"]
    assert table_of(page.all("header")[0])["Last loss"] == ["nan", "0.5"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a/run"), make_run(tmp_path / "b/run"))
    assert page.all("h1")[0].text == "a/run · b/run"


def test_texts_are_escaped_and_the_policy_is_that_of_a_report(tmp_path: Path) -> None:
    hostile: dict[str, Any] = {"version": HOSTILE, HOSTILE: HOSTILE}
    run = make_run(tmp_path / "<b>'run\"", **hostile)
    add_metrics(run, [1.0])
    add_videos(run, 1, (HOSTILE, 1, b"one"))
    (run / "versions.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "memory.json").write_text(json.dumps({"unit": HOSTILE, "measured": MEASURED}))
    (run / "skipped_steps.jsonl").write_text("{}\n")
    page = page_of(run, make_run(tmp_path / "plain"))
    assert len(page.all("script")) == 1 and page.all("b") == []
    assert page.all("h1")[0].text == "<b>'run\" · plain"
    assert table_of(page.section("What differs"))[HOSTILE] == [HOSTILE, "–"]
    assert HOSTILE in page.section("Their last").text and HOSTILE in page.section("Memory").text
    (policy,) = [meta.attributes["content"] or "" for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert policy.startswith("default-src 'none'; media-src data:; ") and "script-src 'sha256-" in policy


def test_where_it_is_written(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert write_comparison(runs) == runs[0] / "comparison.html"
    assert write_comparison(runs, tmp_path / "new/page.html").is_file()


def test_what_cannot_be_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--run names .*short.* twice"):
        write_comparison([runs[0], runs[1], runs[0].parent / "long/../short"])
    with pytest.raises(UserError, match="--run names 9 runs"):
        write_comparison([tmp_path / str(number) for number in range(9)])
    with pytest.raises(UserError, match="gone is not a folder"):
        write_comparison([runs[0], tmp_path / "gone"])
    assert not (runs[0] / "comparison.html").exists()

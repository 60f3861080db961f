"""report.html of small run folders, read back with the standard library's HTML parser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml

from cogvideox_factory import report
from cogvideox_factory.config import UserError
from cogvideox_factory.report import write_report

HOSTILE = '<script>alert("it\'s")</script>&amp;'
VOID_TAGS = {"meta"}
CONFIG = {
    "version": "0.1.0",
    "pretrained_model_name_or_path": "THUDM/CogVideoX-5b",
    "rank": 64,
    "max_train_steps": 200,
    "load_tensors": False,
    "validation_prompt": "a boat",
    "frame_buckets": [49],
    "revision": None,
}


@dataclass
class Node:
    """An element: its texts and children in `children`, in order."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    def all(self, tag: str, css_class: str = "") -> list[Node]:
        nodes = [child for child in self.children if isinstance(child, Node)]
        found = [node for node in nodes if node.tag == tag and css_class in node.classes]
        return [*found, *(inner for node in nodes for inner in node.all(tag, css_class))]

    @property
    def classes(self) -> list[str]:
        return ["", *(self.attributes.get("class") or "").split()]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def section(self, title: str) -> Node:
        return next(node for node in self.all("section") if node.all("h2")[0].text.startswith(title))

    def table_rows(self) -> list[list[str]]:
        return [[cell.text for cell in row.all("td")] for row in self.all("tr") if row.all("td")]


class TreeBuilder(HTMLParser):
    """Builds the tree of a page and fails where it is not well-formed."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("document")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute stands twice in <{tag}>"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID_TAGS:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def page_of(run: Path) -> Node:
    builder = TreeBuilder()
    builder.feed(write_report(run).read_text("utf-8"))
    builder.close()
    assert [node.tag for node in builder.open] == ["document"], "an element is never closed"
    return builder.open[0]


def make_run(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **config}, sort_keys=False))
    return folder


def add_metrics(run: Path, losses: list[float], **changes: Any) -> None:
    lines = [
        {"step": step, "epoch": 0, "loss": loss, "lr": 1e-4, "grad_norm": 0.5, "step_seconds": 2.0}
        | {"data_seconds": 0.001, "samples_seen": 4 * step, "memory_gib": 1.2}
        | changes
        for step, loss in enumerate(losses, 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def add_videos(run: Path, step: int, *videos: tuple[str, int, bytes]) -> Path:
    folder = run / "validation" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    entries = []
    for index, (prompt, seed, content) in enumerate(videos):
        file = f"prompt-{index:02d}-video-0.mp4"
        entries.append({"file": file, "prompt": prompt, "seed": seed})
        (folder / file).write_bytes(content)
    (folder / "prompts.json").write_text(json.dumps(entries))
    return folder


def add_prepared(folder: Path, buckets: list[list[int]], skipped: list[dict[str, str]] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"source": f"{n}.mp4", "caption": "", "bucket": b, "files": {}, "key": "k"} for n, b in enumerate(buckets)]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {"clips": len(buckets), "encoded": 2, "reused": 1, "skipped": skipped or []}
    (folder / "report.json").write_text(json.dumps(content))


def video_bytes(figure: Node) -> bytes:
    source = figure.all("video")[0].attributes["src"] or ""
    start = "data:video/mp4;base64,"
    assert source.startswith(start)
    return base64.b64decode(source.removeprefix(start), validate=True)


def numbers_of(path: Node) -> list[tuple[float, float]]:
    """Places (across, down, both in percent) that an SVG path names."""
    places = re.findall(r"[ML](\S+?) (-?[\d.]+)", path.attributes["d"] or "")
    return [(float(across), float(down)) for across, down in places]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "my-run")


# The whole file


def test_report_opens_offline_and_is_well_formed(run: Path) -> None:
    add_metrics(run, [1.0, 0.5])
    add_videos(run, 0, ("a boat", 1, b"zero"))
    add_videos(run, 2, ("a boat", 1, b"two"))
    page = page_of(run)
    text = (run / "report.html").read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|@import|url\(|//[a-z]", text)
    assert {tag for tag in ("link", "img", "iframe", "object", "base") if page.all(tag)} == set()
    sources = [value for node in page.all("script") + page.all("video") if (value := node.attributes.get("src"))]
    assert len(sources) == 2 and all(source.startswith("data:") for source in sources)
    assert page.all("title")[0].text.startswith("my-run")
    assert page.all("h1")[0].text == "my-run"


def test_policy_forbids_the_network_and_admits_only_our_script(run: Path) -> None:
    page = page_of(run)
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    metas = [meta.attributes for meta in page.all("meta")]
    (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.split("; ")[0] == "default-src 'none'"
    assert f"script-src 'sha256-{digest}'" in policy.split("; ")
    assert "media-src data:" in policy.split("; ")


def test_page_fits_phones_and_dark_mode(run: Path) -> None:
    page = page_of(run)
    viewports = [meta.attributes["content"] for meta in page.all("meta") if meta.attributes.get("name") == "viewport"]
    assert viewports == ["width=device-width, initial-scale=1"]
    assert "prefers-color-scheme: dark" in page.all("style")[0].text


def test_every_text_of_the_user_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>'run\"", rank=HOSTILE, version=HOSTILE, **{HOSTILE: [HOSTILE]})
    add_metrics(run, [1.0], samples_seen=HOSTILE)
    folder = add_videos(run, 0, (HOSTILE, 1, b"zero"))
    entries = json.loads((folder / "prompts.json").read_text())
    entries += [{"file": HOSTILE, "prompt": HOSTILE, "seed": HOSTILE}]
    (folder / "prompts.json").write_text(json.dumps(entries))
    memory = {"kind": HOSTILE, "unit": HOSTILE, "measured": {"memory_before_training": 1.0}}
    (run / "memory.json").write_text(json.dumps(memory))
    add_prepared(run / "prepared", [[49, 480, 720]], [{"path": HOSTILE, "reason": HOSTILE}])
    index = json.loads((run / "prepared/index.jsonl").read_text())
    (run / "prepared/index.jsonl").write_text(json.dumps({**index, "bucket": [HOSTILE, HOSTILE, 1]}) + "\n")

    page = page_of(run)
    assert len(page.all("script")) == 1 and page.all("b") == []
    # … and what was escaped reads as it was written.
    assert page.all("h1")[0].text == "<b>'run\""
    assert HOSTILE in page.section("Before").all("article")[0].text
    assert page.section("Problems").table_rows() == [[HOSTILE, HOSTILE]]
    assert any(repr(HOSTILE) in note.text for note in page.section("Problems").all("p", "note"))
    assert HOSTILE in page.section("Memory").text
    assert page.section("Clips").table_rows()[0][0] == "unknown"  # a size is three numbers
    assert HOSTILE in page.all("dl", "facts")[0].text
    assert [HOSTILE, json.dumps([HOSTILE])] in page.section("Configuration").table_rows()


# Where it is written


def test_written_into_the_run_or_where_asked(run: Path, tmp_path: Path) -> None:
    assert write_report(run) == run / "report.html"
    elsewhere = tmp_path / "new" / "folder" / "page.html"
    assert write_report(run, elsewhere) == elsewhere
    assert elsewhere.read_bytes() == (run / "report.html").read_bytes()


def test_what_is_no_page_is_not_written_over(run: Path) -> None:
    weights = run / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"--output .*: give a name that ends in \.html"):
        write_report(run, weights)
    assert weights.read_bytes() == b"weights"


def test_write_is_atomic(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []

    def fail(source: Path, target: Path) -> None:
        replaced.append((Path(source), Path(target), Path(source).read_text("utf-8")))
        raise OSError("the disk is gone")

    (run / "report.html").write_text("the old report")
    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        write_report(run)
    ((source, target, content),) = replaced
    assert source.parent == target.parent == run and content.endswith("</html>\n")
    assert (run / "report.html").read_text() == "the old report"
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "report.html"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.write_text("a file"), "is not a folder"),
        (lambda folder: folder.mkdir(), "holds no run"),
        (lambda folder: make_run(folder) and (folder / "config.yaml").write_text("- a list"), "no mapping"),
        (lambda folder: make_run(folder) and (folder / "config.yaml").write_text("a: [1"), "not valid YAML"),
        (lambda folder: make_run(folder) and (folder / "report.html").mkdir(), "is a folder"),
    ],
)
def test_wrong_input_is_a_user_error(tmp_path: Path, prepare: Callable[[Path], Any], message: str) -> None:
    prepare(tmp_path / "run")
    with pytest.raises(UserError, match=message) as caught:
        write_report(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)


def test_import_stays_fast() -> None:
    check = "import sys, cogvideox_factory.report; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "set()"


# A run that is not there yet


def test_a_run_that_has_only_begun_says_what_is_missing(run: Path) -> None:
    page = page_of(run)
    assert "No videos yet" in page.section("Before").text
    assert "No step" in page.section("Training").text
    assert "Nothing has been measured" in page.section("Memory").text
    assert f"No prepared clips in {run / 'prepared'}" in page.section("Clips").text
    assert "None." in page.section("Problems").text
    assert page.all("svg") == page.all("video") == []


def test_no_validation_prompt_is_no_waiting(tmp_path: Path) -> None:
    section = page_of(make_run(tmp_path / "run", validation_prompt=None)).section("Before")
    assert "no validation prompt" in section.text and section.all("button") == []


def test_truncated_last_line_is_ignored_silently(run: Path) -> None:
    add_metrics(run, [1.0, 0.5])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "epoch": 0, "lo')
    page = page_of(run)
    assert facts(page)["Steps"] == "2 of 200"
    assert "None." in page.section("Problems").text


def test_last_line_counts_without_its_line_break(run: Path) -> None:
    add_metrics(run, [1.0, 0.5])
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().rstrip("\n"))
    assert facts(page_of(run))["Steps"] == "2 of 200"


def test_damaged_files_are_named_and_the_rest_is_shown(run: Path) -> None:
    add_metrics(run, [1.0, 0.5, 0.25])
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    (run / "metrics.jsonl").write_bytes(b"\n".join([lines[0], b"\xff{", *lines[2:]]))
    (run / "memory.json").write_bytes(b'{"kind": "\xff')
    add_prepared(run / "prepared", [[49, 480, 720]])
    (run / "prepared/report.json").write_text("[]")
    folder = add_videos(run, 50, ("a boat", 1, b"fifty"))
    (folder / "prompts.json").write_text("{}")
    page = page_of(run)
    notes = [note.text for note in page.section("Problems").all("p", "note")]
    for path in ("metrics.jsonl", "memory.json", "prepared/report.json", "validation/step-00000050/prompts.json"):
        assert any(note.startswith(str(run / path)) for note in notes), path
    assert facts(page)["Last loss"] == "0.25"
    assert page.section("Clips").table_rows() == [["49", "480 × 720", "1"]]


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("prepared/index.jsonl", {"bucket": 5}, "index.jsonl: damaged values of bucket"),
        ("prepared/index.jsonl", {"bucket": [1, 2]}, "index.jsonl: damaged values of bucket"),
        ("prepared/index.jsonl", {"bucket": [[1], 2, 3]}, "index.jsonl: damaged values of bucket"),
        ("prepared/report.json", {"skipped": ["a"]}, "report.json: damaged values of skipped"),
        ("prepared/report.json", {"skipped": 3}, "report.json: damaged values of skipped"),
        ("skipped_steps.jsonl", {"step": 1, "clips": 5}, "skipped_steps.jsonl: damaged values of clips"),
    ],
)
def test_a_damaged_value_is_named_and_left_out(run: Path, file: str, content: dict[str, Any], named: str) -> None:
    (run / "prepared").mkdir()
    (run / file).write_text(json.dumps(content) + "\n")
    notes = [note.text for note in page_of(run).section("Problems").all("p", "note")]
    assert [note for note in notes if note.startswith(named)], notes


def test_the_last_loss_is_that_of_the_last_step_that_was_not_skipped(run: Path) -> None:
    add_metrics(run, [1.0, 0.5])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": None}) + "\n")
    assert facts(page_of(run))["Last loss"] == "0.5"


def test_a_page_has_no_more_videos_than_a_browser_shows(run: Path) -> None:
    prompts = [(f"boat {number}", 1, b"video") for number in range(40)]
    for step in (0, 50, 100):
        add_videos(run, step, *prompts)
    page = page_of(run)
    assert len(page.all("video")) == 60
    assert "Prompts left out here: 10" in page.section("Before and after").text


# Summary


def facts(page: Node) -> dict[str, str]:
    (summary,) = page.all("dl", "facts")
    return {name.text: value.text for name, value in zip(summary.all("dt"), summary.all("dd"), strict=True)}


def test_summary(run: Path) -> None:
    add_metrics(run, [1.0, 0.75, 0.123456], step_seconds=1500.0)
    assert facts(page_of(run)) == {
        "Model": "THUDM/CogVideoX-5b",
        "Method": "LoRA, rank 64",
        "Steps": "3 of 200",
        "Samples seen": "12",
        "Last loss": "0.1235",
        "Training time": "1:15:00",
        "A step, median": "1500 s",
        "Waiting for data": "0.0% of the time",
        "Version": "0.1.0",
    }


def test_summary_of_full_fine_tuning_by_epochs(tmp_path: Path) -> None:
    shown = facts(page_of(make_run(tmp_path / "run", training_type="sft", max_train_steps=None)))
    assert shown["Method"] == "full fine-tuning"
    assert shown["Steps"] == "0"
    assert shown["Last loss"] == "none yet"


# Curves


def chart(page: Node, key: str) -> Node:
    (figure,) = page.section("Training").all("figure", key)
    return figure


def test_loss_is_drawn_raw_and_smoothed_between_round_ticks(run: Path) -> None:
    add_metrics(run, [0.9 - 0.6 * step / 200 + (0.1 if step % 2 else -0.1) for step in range(1, 201)])
    figure = chart(page_of(run), "loss")
    texts = [text.text for text in figure.all("text")]
    assert texts == ["0.2", "0.4", "0.6", "0.8", "1", "0", "50", "100", "150", "200"]
    dots, line = numbers_of(figure.all("path", "dots")[0]), numbers_of(figure.all("path", "line")[0])
    assert len(dots) == len(line) == 200
    # Step 100 of 200, loss 0.5, on an axis from 0.2 to 1.
    assert dots[99] == pytest.approx((50, 100 * (1 - 0.5) / 0.8), abs=0.01)
    # The saw-tooth of ±12.5 is gone from the line, which follows the slope without a lag.
    assert all(abs(down - 100 * (1 - (0.9 - 0.6 * across / 100)) / 0.8) < 2 for across, down in line[40:160])
    assert figure.all("svg")[0].attributes["aria-label"] == "Loss by step"


def test_the_held_out_loss_is_a_second_curve_in_the_chart_of_the_loss(run: Path) -> None:
    add_metrics(run, [0.8, 0.6, 0.4, 0.4])
    lines = [{"step": step, "loss": loss} for step, loss in ((0, 1.0), (2, 0.5), (3, None), (4, 0.75))]
    (run / "validation_loss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run)
    figure = chart(page, "loss")
    assert [text.text for text in figure.all("text")][:4] == ["0.4", "0.6", "0.8", "1"]  # both curves are on the axis
    line, dots = figure.all("path", "held-out")
    expected = [(0, 0), (50, 100 * 0.5 / 0.6), (100, 100 * 0.25 / 0.6)]
    for path in (line, dots):
        places = [place for place in numbers_of(path) if place != (0.01,)]
        assert [pair[:2] for pair in places] == [pytest.approx(pair, abs=0.01) for pair in expected]
    facts = {item.all("dt")[0].text: item.all("dd")[0].text for item in page.all("dl", "facts")[0].all("div")}
    assert facts["Held-out loss"] == "0.75, best 0.5 at step 2"
    assert "held out" in page.section("Training").text
    assert not chart(page, "lr").all("path", "held-out")


def test_without_held_out_clips_there_is_one_curve(run: Path) -> None:
    add_metrics(run, [0.8, 0.6])
    page = page_of(run)
    assert not page.all("path", "held-out") and "eld-out" not in page.all("header")[0].text
    assert "held out" not in page.section("Training").text


def test_learning_rate_is_drawn_as_it_was(run: Path) -> None:
    add_metrics(run, [1.0] * 4)
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for entry, rate in zip(entries, (0.0, 1e-4, 1e-4, 5e-5), strict=True):
        entry["lr"] = rate
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    figure = chart(page_of(run), "lr")
    assert numbers_of(figure.all("path", "line")[0]) == [(25, 100), (50, 0), (75, 0), (100, 50)]
    assert numbers_of(figure.all("path", "dots")[0]) == []
    assert [text.text for text in figure.all("text")][:3] == ["0", "2e-5", "4e-5"]


@pytest.mark.parametrize(
    ("steps", "ticks"), [([0], ["0", "1"]), ([1], ["0", "1"]), (range(1, 8), ["0", "2", "4", "6"]), ([1, 2000], None)]
)
def test_ticks_of_the_steps_are_whole_and_within_the_run(
    run: Path, steps: Sequence[int], ticks: list[str] | None
) -> None:
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": {step}}}\n' for step in steps))
    texts = chart(page_of(run), "loss").all("text")
    shown = [text.text for text in texts if text.attributes["text-anchor"] == "middle"]
    assert shown == (ticks or ["0", "500", "1,000", "1,500", "2,000"])


def test_constant_learning_rate_is_drawn_in_the_middle(run: Path) -> None:
    add_metrics(run, [1.0] * 2)
    figure = chart(page_of(run), "lr")
    assert numbers_of(figure.all("path", "line")[0]) == [(50, 50), (100, 50)]
    assert [text.text for text in figure.all("text")][:5] == ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]


def test_seconds_a_step_and_how_many_of_them_wait_for_data(run: Path) -> None:
    add_metrics(run, [1.0] * 4, step_seconds=2.0, data_seconds=0.5)
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    entries[0] |= {"step_seconds": 42.0, "data_seconds": 40.0}  # a first step that compiles
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = page_of(run)
    figure = chart(page, "step_seconds")
    step, waiting = figure.all("path", "line")
    assert numbers_of(step) == [(50, 0), (75, 0), (100, 0)]
    assert "waiting" in waiting.classes and numbers_of(waiting) == [(50, 75), (75, 75), (100, 75)]
    assert [text.text for text in figure.all("text")][:5] == ["0", "0.5", "1", "1.5", "2"]
    assert "above 5 times the median: 1, up to 42 s" in figure.all("figcaption")[0].text
    assert facts(page)["Waiting for data"] == f"{100 * 41.5 / 48:.1f}% of the time"
    assert facts(page)["A step, median"] == "2 s"


def test_gradient_norm_has_its_own_chart(run: Path) -> None:
    add_metrics(run, [1.0, 1.0])
    assert [down for _, down in numbers_of(chart(page_of(run), "grad_norm").all("path", "dots")[0])] == [50, 50]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, None, 1e300, "text", True])
def test_a_loss_that_cannot_be_drawn_leaves_a_gap_that_is_told(run: Path, broken: Any) -> None:
    add_metrics(run, [1.0, broken, 0.5])
    figure = chart(page_of(run), "loss")
    assert [across for across, _ in numbers_of(figure.all("path", "dots")[0])] == [33.33, 100]
    assert len(numbers_of(figure.all("path", "line")[0])) == 2
    assert "without a finite value: 1" in figure.all("figcaption")[0].text
    drawing = " ".join(
        str(value) for node in figure.all("path") + figure.all("line") for value in node.attributes.values()
    )
    assert "nan" not in drawing and "inf" not in drawing


def test_only_nan_still_gives_a_page(run: Path) -> None:
    add_metrics(run, [math.nan] * 3, grad_norm=math.nan, step_seconds=math.nan)
    page = page_of(run)
    section = page.section("Training")
    assert section.text.count("without a finite value: 3") == 2
    assert len(section.all("figure", "chart")) == 1  # the learning rate
    assert facts(page)["Last loss"] == "nan"
    assert facts(page)["Training time"] == "0:00:00"


@pytest.mark.parametrize("losses", [[0.5], [0.0, 0.0], [-2.0, -2.0], [1e-29, 2e-29], [1e29, -1e29], [5.0, 5.0 + 1e-12]])
def test_every_range_gets_distinct_ticks_around_its_points(run: Path, losses: list[float]) -> None:
    add_metrics(run, losses)
    figure = chart(page_of(run), "loss")
    ticks = [text.text for text in figure.all("text") if text.attributes.get("text-anchor") == "end"]
    assert 3 <= len(ticks) == len(set(ticks)) <= 12
    places = numbers_of(figure.all("path", "dots")[0])
    assert len(places) == len(losses)
    assert all(0 <= down <= 100 and 0 < across <= 100 for across, down in places)


def test_long_run_stays_small_and_keeps_its_spikes(run: Path) -> None:
    losses = [0.5] * 20_000
    losses[12_345] = 9.0
    add_metrics(run, losses)
    figure = chart(page_of(run), "loss")
    dots = numbers_of(figure.all("path", "dots")[0])
    assert 500 <= len(dots) <= 1000
    assert min(dots, key=lambda place: place[1]) == pytest.approx((100 * 12_346 / 20_000, 10), abs=0.01)
    assert dots == sorted(dots, key=lambda place: place[0])


# Memory

MEASURED = {"memory_before_training": 5.0, "memory_before_validation": 20.0, "memory_after_testing": None}
PHASES = ["Before the first step", "Peak of training", "Peak with validation", "Peak of testing"]


def bars(page: Node) -> list[tuple[str, str]]:
    """(width, text) of each bar."""
    rows = page.section("Memory").all("dd")
    return [(row.all("span", "track")[0].all("span")[0].attributes["style"] or "", row.text) for row in rows]


def test_memory_measured(run: Path) -> None:
    memory = {"kind": "GPU memory allocated", "unit": "GiB", "measured": MEASURED, "planned": None}
    (run / "memory.json").write_text(json.dumps(memory))
    page = page_of(run)
    assert [label.text for label in page.section("Memory").all("dt")] == PHASES
    assert bars(page) == [
        ("width:25.0%", "5.00 GiB measured"),
        ("width:100.0%", "20.00 GiB measured"),
        ("width:0.0%", "not measured"),
        ("width:0.0%", "not measured"),
    ]
    assert "GPU memory allocated" in page.section("Memory").text


def test_memory_planned_stands_beside_measured(run: Path) -> None:
    planned = dict.fromkeys(["memory_before_training", "memory_before_validation"], 40)
    (run / "memory.json").write_text(json.dumps({"unit": "GiB", "measured": MEASURED, "planned": planned}))
    page = page_of(run)
    assert [label.text for label in page.section("Memory").all("dt")] == PHASES
    assert bars(page)[:4] == [
        ("width:12.5%", "5.00 GiB measured"),
        ("width:100.0%", "40.00 GiB planned"),
        ("width:50.0%", "20.00 GiB measured"),
        ("width:100.0%", "40.00 GiB planned"),
    ]


def test_memory_without_any_figure(run: Path) -> None:
    (run / "memory.json").write_text(json.dumps({"measured": {"memory_before_training": None}, "planned": None}))
    assert "Nothing has been measured" in page_of(run).section("Memory").text


# Videos


def tiny_mp4(brightness: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), brightness, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def test_videos_are_paired_by_prompt_and_embedded_unchanged(run: Path) -> None:
    contents = {(prompt, step): tiny_mp4(20 * step + ord(prompt[0])) for prompt in ("a", "b") for step in range(3)}
    # Prompts in another order at each step, so that pairing by position or by file name fails.
    add_videos(run, 0, ("a", 1, contents["a", 0]), ("b", 1, contents["b", 0]))
    add_videos(run, 50, ("b", 1, contents["b", 1]), ("a", 1, contents["a", 1]))
    add_videos(run, 100, ("b", 1, contents["b", 2]), ("a", 1, contents["a", 2]))
    rows = page_of(run).section("Before").all("article", "sample")
    assert [row.all("p")[0].text for row in rows] == ["a seed\N{NO-BREAK SPACE}1", "b seed\N{NO-BREAK SPACE}1"]
    for prompt, row in zip(("a", "b"), rows, strict=True):
        before, after = row.all("div", "pair")[0].all("figure")
        assert video_bytes(before) == contents[prompt, 0]
        assert video_bytes(after) == contents[prompt, 2]
        assert before.text == "Before training" and after.text == "Step 100"
        (between,) = row.all("div", "strip")[0].all("figure")  # the script adds the first and the last
        assert video_bytes(between) == contents[prompt, 1] and between.text == "Step 50"
        with av.open(io.BytesIO(video_bytes(after)), "r") as container:
            assert len(list(container.decode(video=0))) == 3


def test_videos_play_by_themselves_and_are_kept_in_sync(run: Path) -> None:
    add_videos(run, 0, ("a", 1, b"zero"))
    page = page_of(run)
    (video,) = page.all("video")
    assert set(video.attributes) == {"src", "autoplay", "loop", "muted", "playsinline"}
    (sample,) = page.all("article", "sample")
    (controls,) = sample.all("div", "controls")
    assert [child.tag for child in controls.children if isinstance(child, Node)] == ["button", "input"]
    script = page.all("script")[0].text
    # Whether it works is tried in a browser by test_report_in_browser.py; here: script and page name the same things.
    assert 'querySelectorAll(".sample")' in script and 'querySelector(".controls")' in script


def test_a_long_run_shows_some_of_its_steps_evenly_and_says_so(run: Path) -> None:
    for step in range(0, 210, 10):
        add_videos(run, step, ("a", 1, str(step).encode()))
    (sample,) = page_of(run).section("Before").all("article", "sample")
    shown = [video_bytes(figure) for figure in sample.all("figure")]
    assert shown == [b"0", b"200", b"20", b"50", b"80", b"120", b"150", b"180"]
    assert "left out here, in the folder validation: 13" in sample.text


def test_a_page_of_many_prompts_has_no_more_videos_than_a_browser_shows(run: Path) -> None:
    for step in range(5):
        add_videos(run, step, *((f"prompt {n}", 1, b"x") for n in range(12)))
    samples = page_of(run).section("Before").all("article", "sample")
    # The script adds two to each film strip.
    assert len(samples) == 12 and sum(len(sample.all("video")) + 2 for sample in samples) <= 60
    assert all(len(sample.all("div", "strip")[0].all("video")) == 1 for sample in samples)


def test_several_prompts_have_a_button_for_all_of_them(run: Path) -> None:
    add_videos(run, 0, ("a", 1, b"zero"), ("b", 1, b"zero"))
    page = page_of(run)
    (button,) = page.section("Before").all("h2")[0].all("button")
    assert f'getElementById("{button.attributes["id"]}")' in page.all("script")[0].text


def test_same_prompt_twice_makes_two_rows(run: Path) -> None:
    for step in (0, 9):
        add_videos(run, step, *((("a", seed, f"{step} {seed} {n}".encode())) for n, seed in enumerate((1, 2, 2))))
    rows = page_of(run).section("Before").all("article")
    pairs = [[video_bytes(figure) for figure in row.all("figure")] for row in rows]
    assert pairs == [[b"0 1 0", b"9 1 0"], [b"0 2 1", b"9 2 1"], [b"0 2 2", b"9 2 2"]]


def test_half_of_a_pair_is_shown_with_a_remark(run: Path) -> None:
    add_videos(run, 0, ("a", 1, b"zero"))
    add_videos(run, 50, ("b", 1, b"fifty"))
    early, late = page_of(run).section("Before").all("article")
    assert video_bytes(early.all("figure")[0]) == b"zero"
    assert "from the training yet" in early.all("figure")[1].text and not early.all("figure")[1].all("video")
    assert "from before the training" in late.all("figure")[0].text and not late.all("figure")[0].all("video")
    assert video_bytes(late.all("figure")[1]) == b"fifty"
    assert early.all("div", "strip") == late.all("div", "strip") == []


@pytest.mark.parametrize("file", ["../../secret", "{run}/secret", "link.mp4", "gone.mp4", "", "\0", "x" * 5000, None])
def test_file_outside_or_missing_is_left_out_with_a_note(run: Path, file: str | None) -> None:
    (run / "secret").write_bytes(b"a secret")
    folder = add_videos(run, 0, ("a", 1, b"zero"))
    (folder / "link.mp4").symlink_to(run / "secret")
    entries = json.loads((folder / "prompts.json").read_text())
    entries.append({"file": file and file.format(run=run), "prompt": "b", "seed": 1})
    (folder / "prompts.json").write_text(json.dumps(entries))
    page = page_of(run)
    assert [row.all("p")[0].text[0] for row in page.section("Before").all("article")] == ["a"]
    (note,) = page.section("Problems").all("p", "note")
    assert note.text.startswith("validation/step-00000000/prompts.json names ") and "ignored" in note.text
    assert base64.b64encode(b"a secret").decode() not in (run / "report.html").read_text("utf-8")


def test_validation_in_progress_is_told(run: Path) -> None:
    add_videos(run, 0, ("a", 1, b"zero"))
    (run / "validation/step-00000050").mkdir()
    add_videos(run, 100, ("a", 1, b"hundred")).rename(run / "validation/step-00000100.part")
    page = page_of(run)
    unfinished, renamed = page.section("Problems").all("p", "note")
    assert "step-00000050 is not complete" in unfinished.text and "step-00000100.part" in renamed.text
    assert [video_bytes(node) for node in page.all("figure") if node.all("video")] == [b"zero"]
    assert len(page.section("Before").all("article")) == 1


# Clips, problems, configuration


def test_clips_per_bucket_and_skipped_clips(run: Path) -> None:
    buckets = [[17, 480, 720], [49, 480, 720], [49, 480, 720]]
    add_prepared(run / "prepared", buckets, [{"path": "short.mp4", "reason": "3 frames"}])
    page = page_of(run)
    assert page.section("Clips").table_rows() == [["49", "480 × 720", "2"], ["17", "480 × 720", "1"]]
    assert "3 prepared, 2 encoded, 1 reused" in page.section("Clips").text
    assert page.section("Problems").table_rows() == [["short.mp4", "3 frames"]]


def test_prepared_set_of_another_folder(tmp_path: Path) -> None:
    add_prepared(tmp_path / "set", [[9, 64, 96]], [{"path": "a.mp4", "reason": "broken"}])
    run = make_run(tmp_path / "run", load_tensors=True, data_root=str(tmp_path / "set"))
    add_prepared(run / "prepared", [[49, 480, 720]])  # left by an earlier run; not what this one read
    page = page_of(run)
    assert page.section("Clips").table_rows() == [["9", "64 × 96", "1"]]
    assert page.section("Problems").table_rows() == [["a.mp4", "broken"]]


def test_raw_clips_are_prepared_in_the_run(tmp_path: Path) -> None:
    add_prepared(tmp_path / "raw", [[9, 64, 96]])  # some index.jsonl that is not ours
    run = make_run(tmp_path / "run", data_root=str(tmp_path / "raw"))
    add_prepared(run / "prepared", [[49, 480, 720]])
    assert page_of(run).section("Clips").table_rows() == [["49", "480 × 720", "1"]]


def test_captions_with_unusual_line_breaks_stay_one_entry(run: Path) -> None:
    add_prepared(run / "prepared", [[49, 480, 720]])
    entry = {"source": "a.mp4", "caption": "one\u2028two\x85three", "bucket": [49, 480, 720]}
    (run / "prepared/index.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    page = page_of(run)
    assert page.section("Clips").table_rows() == [["49", "480 × 720", "1"]]
    assert "None." in page.section("Problems").text


def test_configuration_is_complete_but_for_secrets(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", hub_token="hf_secret", day=date(2025, 1, 31)))
    (details,) = page.section("Configuration").all("details")
    rows = dict(details.table_rows())
    assert set(rows) == {*CONFIG, "day"} and rows["day"] == '"2025-01-31"'
    assert rows["frame_buckets"] == "[49]" and rows["revision"] == "null" and rows["load_tensors"] == "false"
    assert "hf_secret" not in (tmp_path / "run/report.html").read_text("utf-8")


def test_versions_of_the_libraries_are_told(run: Path) -> None:
    (run / "versions.json").write_text(json.dumps({"torch": "2.13.0", "device": HOSTILE}))
    assert f"Made with torch 2.13.0, device {HOSTILE}." in page_of(run).section("Configuration").text


def test_a_signed_address_is_shown_without_what_gives_access(tmp_path: Path) -> None:
    images = "https://u:pass@a.example/b.png?X-Amz-Signature=0a1b:::https://c.example/d.png"
    page = page_of(make_run(tmp_path / "run", validation_images=images, extra=[images], hidden="hf_secret"))
    rows = dict(page.section("Configuration").table_rows())
    assert rows["validation_images"] == "https://a.example/b.png?…:::https://c.example/d.png"
    assert rows["hidden"] == "hf_…"
    written = (tmp_path / "run/report.html").read_text("utf-8")
    assert not [secret for secret in ("0a1b", "pass@", "hf_secret") if secret in written]


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "</td><script>alert(1)</script>", 'x" onload="y'])
def test_no_caption_or_file_name_becomes_markup(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run", validation_prompt=text)
    add_metrics(run, [1.0])
    add_videos(run, 0, (text, 1, b"zero"))
    add_prepared(run / "prepared", [[49, 480, 720]], [{"path": f"{text}.mp4".replace("/", ""), "reason": text}])
    page = page_of(run)
    assert len(page.all("script")) == 1 and page.all("img") == []
    assert not [node for node in page.all("article") + page.all("td") + page.all("p") if "onload" in node.attributes]
    assert text in page.section("Before").all("article")[0].text
    assert page.section("Problems").table_rows() == [[f"{text}.mp4".replace("/", ""), text]]


def test_name_that_is_not_unicode(run: Path) -> None:
    add_videos(run, 0, ("\ud800", 1, b"zero"))
    assert page_of(run).section("Before").all("article")[0].text.strip().startswith("?")


def test_a_model_folder_is_shown_without_the_path_to_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("pretrained_model_name_or_path: /home/somebody/models/tiny\n")
    page = write_report(tmp_path).read_text()
    summary = page.split("All options")[0]
    assert "models/tiny" in summary and "somebody" not in summary

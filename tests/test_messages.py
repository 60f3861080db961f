"""What reaches standard error, read back as a person and as a program would."""

from __future__ import annotations

import datetime
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cogvideox_factory.report
from cogvideox_factory import messages

Cli = Callable[..., tuple[int, str, str]]
OURS = logging.getLogger("cogvideox_factory.test")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with warnings.catch_warnings():
        yield
        messages.configure()


def test_text_is_the_message_alone_and_levels_below_are_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    messages.configure()
    messages.configure()  # again: no message twice
    OURS.debug("no")
    OURS.info("step %d", 3, extra={"fields": {"metrics": {}}})
    messages.configure("warning")
    OURS.info("no")
    OURS.warning("broken.mp4")
    assert capfd.readouterr().err == "step 3\nbroken.mp4\n"


def test_json_is_an_object_a_line_with_what_the_message_carries(capfd: pytest.CaptureFixture[str]) -> None:
    messages.configure(form="json")
    before = datetime.datetime.now(datetime.UTC)
    OURS.info('two\nlines, "quoted" https://a.example/b?key=hf_x" – ü', extra={"fields": {"metrics": {"loss": 0.5}}})
    logging.getLogger("some.library").warning("theirs")
    warnings.warn("also theirs", UserWarning, stacklevel=1)
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        OURS.exception("failed")
    messages.tell("the end", "error: ")
    shown = capfd.readouterr()
    lines = [json.loads(line) for line in shown.err.splitlines()]
    assert shown.out == "" and shown.err.isascii()
    time = datetime.datetime.fromisoformat(lines[0].pop("time"))
    assert abs(time - before) < datetime.timedelta(minutes=1)
    first = 'two\nlines, "quoted" https://a.example/b?…" – ü'
    assert lines[0] == {"level": "info", "message": first, "metrics": {"loss": 0.5}}
    assert [(line["level"], line["message"]) for line in lines[1:2]] == [("warning", "theirs")]
    assert "also theirs" in lines[2]["message"]
    assert "ZeroDivisionError: by zero" in lines[3]["traceback"]
    assert lines[4]["message"] == "the end" and lines[4]["level"] == "error" and len(lines) == 5


def test_a_command_that_fails_says_so_in_json_too(cli: Cli, tmp_path: Path, monkeypatch) -> None:
    code, _, shown = cli("report", "--run", tmp_path, "--log_format", "json")
    line = json.loads(shown)
    assert code == 2 and line["level"] == "error" and str(tmp_path) in line["message"]

    def fault(*arguments: object) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(cogvideox_factory.report, "write_report", fault)
    code, _, shown = cli("report", "--run", tmp_path, "--log_format", "json")
    assert code == 1 and "KeyError" in json.loads(shown)["traceback"]
    code, _, shown = cli("report", "--run", tmp_path / "none", "--log_level", "loud")
    assert code == 2 and not shown.startswith("{")  # text again


UNKNOWN = (
    "Unrecognized options: --hegiht_buckets, 3\n"
    "Perhaps you meant: --height_buckets [INT [INT ...]] Heights to train on, in pixels. "
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("sample", "--log_format", "json"), [("error", "--prompt is missing. Example: ")]),
        (("trian", "--log_format=json"), [("error", "unknown command trian; did you mean train?")]),
        (("train", "--hegiht_buckets", "3", "--log_format", "json"), [("error", UNKNOWN)]),
        (("train", "--log-format=json", "--rank", "x"), [("error", "Error parsing --rank: invalid literal for int()")]),
        (("train", "--log_format", "json", "--log_level", "loud"), [("error", "invalid choice 'loud' for argument")]),
        (
            ("train", "--log_format", "json", "--use_slicing"),
            [("info", "--use_slicing is no longer needed: "), ("error", "--pretrained_model_name_or_path is missing")],
        ),
        (
            ("train", "--log_format=json", "--use_slicing", "--log_level=warning"),
            [("error", "--pretrained_model_name_or_path is missing")],
        ),
    ],
)
def test_what_is_wrong_with_the_flags_is_told_in_json_too(
    cli: Cli, arguments: tuple[str, ...], expected: list[tuple[str, str]]
) -> None:
    code, output, shown = cli(*arguments)
    lines = [json.loads(line) for line in shown.splitlines()]
    assert code == 2 and not output and len(lines) == len(expected)
    for line, (level, start) in zip(lines, expected, strict=True):
        assert line["level"] == level and line["message"].startswith(start)
        assert not set("│─╭╮╰╯\x1b") & set(line["message"])


def test_a_file_of_options_may_ask_for_json_and_a_flag_for_text_again(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("log_format: json\n")
    flags = ("train", "--config", tmp_path / "recipe.yaml", "--rank", "x")
    assert json.loads(cli(*flags)[2])["message"].startswith("Error parsing --rank")
    assert "│ Error parsing --rank" in cli(*flags, "--log_format", "text")[2]
    assert "│ Error parsing --rank" in cli("train", "--rank", "x")[2]

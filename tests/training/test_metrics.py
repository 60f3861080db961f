"""What is written down while a run goes on, read back as plain JSON."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogvideox_factory.training import metrics
from cogvideox_factory.training.metrics import MemoryMeter, MetricsLog, read_metrics

MAIN: Any = SimpleNamespace(is_main_process=True)
OTHER: Any = SimpleNamespace(is_main_process=False)
GIB = 2**30


def test_a_line_a_step_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, 0, MAIN) as log:
        assert path.read_text() == ""
        log.write(step=1, loss=0.1)
        assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [{"step": 1, "loss": 0.1}]
        log.write(step=2, loss=1 / 3)
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 1 / 3},
    ]


def test_a_resumed_log_drops_lines_after_its_step_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in range(1, 6)))
    with MetricsLog(tmp_path, 3, MAIN) as log:
        log.write(step=4, loss=0.5)
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert lines == [*({"step": step, "loss": step / 7} for step in (1, 2, 3)), {"step": 4, "loss": 0.5}]


def test_another_file_follows_the_same_rules_and_gives_the_lines_that_stand(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 5, "loss": 0.5}\n')
    with MetricsLog(tmp_path, 4, MAIN, "other.jsonl") as log:
        assert log.kept == [{"step": 0, "loss": 1.0}]
        log.write(step=5, loss=0.25)
    assert [line["loss"] for line in read_metrics(tmp_path / "other.jsonl")] == [1.0, 0.25]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_cut_off_by_the_end_of_the_process_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
    with MetricsLog(tmp_path, 9, MAIN) as log:
        log.write(step=2, loss=0.25)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


def test_a_line_with_a_flipped_bit_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step"\xba 2}\n{"step": 3}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 3}]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, 0, OTHER) as log:
        log.write(step=1)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n')
    with MetricsLog(tmp_path, 1, OTHER) as log:
        log.write(step=2, loss=0.1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_reading_what_is_not_there_or_empty_gives_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


class MemoryOf:
    """A process whose resident memory, in bytes, the test sets."""

    rss = 0

    def memory_info(self) -> MemoryOf:
        return self


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> MemoryOf:
    process = MemoryOf()
    monkeypatch.setattr(metrics.psutil, "Process", lambda: process)
    return process


def test_the_peak_is_the_highest_moment_since_the_phase_started(process: MemoryOf, tmp_path: Path) -> None:
    meter = MemoryMeter(torch.device("cpu"), tmp_path / "memory.json")
    process.rss = 8 * GIB
    assert meter.current() == 8.0
    process.rss = 2 * GIB
    assert meter.peak() == 8.0 and meter.current() == 2.0
    meter.start_phase()
    assert meter.peak() == 2.0
    process.rss = 5 * GIB
    meter.current()
    process.rss = 3 * GIB
    assert meter.peak() == 5.0
    process.rss = 6 * GIB
    assert meter.peak() == 6.0  # looked at now, not only before


def test_memory_of_this_process_is_in_gib(tmp_path: Path) -> None:
    import psutil

    meter = MemoryMeter(torch.device("cpu"), tmp_path / "memory.json")
    meter.start_phase()
    assert meter.current() == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.2)
    assert meter.peak() >= meter.current() > 0


def test_the_highest_figure_of_a_phase_is_kept_and_written(tmp_path: Path) -> None:
    meter = MemoryMeter(torch.device("cpu"), tmp_path / "memory.json")
    for value in (1.25, 3.0004, 2.0):
        meter.record("memory_after_validation", value)
    meter.record("memory_before_training", 0.5)
    assert meter.measured == {"memory_after_validation": 3.0, "memory_before_training": 0.5}
    meter.write()
    assert json.loads((tmp_path / "memory.json").read_text()) == {
        "kind": "resident memory of the process",
        "unit": "GiB",
        "measured": {"memory_after_validation": 3.0, "memory_before_training": 0.5},
        "planned": None,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]


def test_what_an_earlier_part_of_the_run_measured_is_kept(tmp_path: Path) -> None:
    first = MemoryMeter(torch.device("cpu"), tmp_path / "memory.json")
    first.record("memory_after_validation", 7.0)
    first.write()
    second = MemoryMeter(torch.device("cpu"), tmp_path / "memory.json")
    second.record("memory_after_validation", 3.0)
    second.write()
    assert json.loads((tmp_path / "memory.json").read_text())["measured"] == {"memory_after_validation": 7.0}


def test_what_an_earlier_part_of_the_run_planned_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    MemoryMeter(torch.device("cpu"), file, {"memory_before_training": 1.0, "memory_after_testing": 4.0}).write()
    MemoryMeter(torch.device("cpu"), file, {"memory_before_training": 2.0}).write()
    MemoryMeter(torch.device("cpu"), file).write()
    assert json.loads(file.read_text())["planned"] == {"memory_before_training": 2.0, "memory_after_testing": 4.0}

"""What the soak makes of what it sees, and that the page shows what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import soak

ROOT = Path(__file__).parents[2]


def samples(growth: float = 0.0, **others: float) -> list[soak.Sample]:
    """A run of 1,000 steps; its memory grows by so much over it, and a checkpoint shows now and then."""
    flat = {"open_files": 9.0, "threads": 4.0, "processes": 0.0, **others}
    return [
        {"step": step, "resident_mib": 500 + growth * step / 1000 + (50 if step % 100 == 0 else 0), **flat}
        for step in range(1, 1001, 3)
    ]


def test_a_flat_run_is_flat_though_it_has_peaks() -> None:
    summary = soak.summary_of(samples())
    assert all(row["is_flat"] for row in summary.values())
    assert summary["resident_mib"]["first_quarter"] == 500 and summary["resident_mib"]["most"] == 550
    assert abs(summary["resident_mib"]["slope_per_1000_steps"]) < 2


def test_growth_is_seen_and_measured() -> None:
    row = soak.summary_of(samples(growth=40))["resident_mib"]
    assert not row["is_flat"] and row["slope_per_1000_steps"] == pytest.approx(40, abs=2)
    leaking = samples()
    for index, sample in enumerate(leaking):
        sample["open_files"] += index // 100  # a file left open now and then
    assert not soak.summary_of(leaking)["open_files"]["is_flat"]


def test_a_process_is_looked_at_as_it_is(tmp_path: Path) -> None:
    process = psutil.Process()
    before = soak.look_at(process)
    with (tmp_path / "file").open("w"):
        assert soak.look_at(process)["open_files"] == before["open_files"] + 1
    assert before["resident_mib"] > 50 and before["threads"] >= 1


def test_the_page_shows_the_figures_of_the_last_run_and_they_are_flat() -> None:
    result, page = (
        json.loads((ROOT / "benchmarks/results/soak.json").read_text()),
        (ROOT / "docs/reliability.md").read_text(),
    )
    assert soak.with_table(page, result) == page
    assert result["steps"] >= 2000 and all(row["is_flat"] for row in result["summary"].values())
    assert {"--checkpointing_steps", "--validation_steps", "--validation_loss_steps"} <= set(result["options"])

"""Reads run folders and writes report.html: one file that opens offline and shows what the training did.

A run may have been killed, or still go on: what is missing is said on the page and is never fatal.

    reading.py      run folder → Run
    facts.py        a run in a few figures
    curves.py       curves as SVG
    videos.py       videos that play in step
    markup.py       pieces of HTML, escaped, and the frame of a page with its security policy
    page.css, page.js   how a page looks, and how its videos are held together
    one_run.py      the page of a run
    comparison.py   the page of several runs

Rejected: a chart script from a CDN (an empty page offline, and someone else learns who reads it).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cogvideox_factory.config import UserError
from cogvideox_factory.report.comparison import MAX_RUNS, page_of_comparison
from cogvideox_factory.report.one_run import page_of_run
from cogvideox_factory.report.reading import read_run


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the report of a run, by default as report.html into its folder; returns the path of the file.

    Raises UserError where there is no run, or where the file cannot be one.
    """
    content = page_of_run(read_run(run))
    return _write(content, output or run / "report.html")


def write_comparison(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page that compares runs, by default as comparison.html into the folder of the first.

    Raises UserError as write_report does, and where a run is named twice or there are too many.
    """
    folders = [run.resolve() for run in runs]
    twice = next((run for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1), None)
    if twice:
        raise UserError(f"--run names {twice} twice; name each run once")
    if len(runs) > MAX_RUNS:
        raise UserError(f"--run names {len(runs)} runs, too many curves for one chart; name {MAX_RUNS} at the most")
    content = page_of_comparison([read_run(run) for run in runs])
    return _write(content, output or runs[0] / "comparison.html")


def _write(page: str, output: Path) -> Path:
    if output.is_dir():
        raise UserError(f"{output} is a folder; name the file to write the report to")
    content = page.encode("utf-8", "replace")  # a file name can hold what UTF-8 cannot
    if output.suffix.lower() not in (".html", ".htm"):  # what else has that name may be weights
        raise UserError(f"--output {output}: give a name that ends in .html")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    return output

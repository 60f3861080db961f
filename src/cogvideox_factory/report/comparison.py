"""The page that compares runs: their figures in a table, their curves on the same axes, their last videos in a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cogvideox_factory.report.curves import SLOW, Curve, chart, points_of, without_slow
from cogvideox_factory.report.facts import MEMORY_PHASES, facts_of, shown_options
from cogvideox_factory.report.markup import note, page, quiet, section, table, text
from cogvideox_factory.report.reading import Run, finite
from cogvideox_factory.report.videos import MAX_PLAYERS, sample_by_run, samples_section, step_label

MAX_RUNS = 8  # colours that can be told apart
OWN_OPTIONS = {"output_dir", "version"}  # differ by nature, or stand among the figures
NONE = "–"


def page_of_comparison(runs: Sequence[Run]) -> str:
    """The whole page; of MAX_RUNS runs at the most, in the order in which they were named."""
    names = _names(runs)
    sections = [
        _samples(runs, names),
        _curves(runs, names),
        _differences(runs, names),
        _memory(runs, names),
        _problems(runs, names),
    ]
    return page("comparison of training runs", " · ".join(names), _summary(runs, names), sections)


def _names(runs: Sequence[Run]) -> list[str]:
    """The last names of the folders, as few as tell them apart."""
    paths = [run.folder.resolve() for run in runs]
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _style(index: int) -> str:
    """The class of page.css that holds the colour of a run."""
    return f"run-{index + 1}"


def _summary(runs: Sequence[Run], names: Sequence[str]) -> str:
    facts = [facts_of(run) for run in runs]
    labels = list(dict.fromkeys(label for of_run in facts for label in of_run))
    return table(["", *names], [[label, *(of_run.get(label, NONE) for of_run in facts)] for label in labels])


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    if not any(run.metrics for run in runs):
        return section("Training", quiet("No step has been finished yet."))
    keys = "".join(
        f'<li><span class="key {_style(index)}"></span>{text(name)}</li>' for index, name in enumerate(names)
    )
    explanation = "A line is the running mean of a run"
    has_held_out = any(points_of(run.held_out, "loss") for run in runs)
    explanation += "; a broken one its loss on held-out clips, with a dot a measurement." if has_held_out else "."
    held_out = [
        Curve(points_of(run.held_out, "loss"), f"held-out {_style(index)}", has_dots=True)
        for index, run in enumerate(runs)
    ]
    loss = chart("loss", "Loss", [*_lines(runs, "loss"), *held_out])
    seconds = [dataclasses.replace(line, points=without_slow(line.points)) for line in _lines(runs, "step_seconds")]
    small = [
        chart("lr", "Learning rate", _lines(runs, "lr", is_noisy=False)),
        chart("grad_norm", "Gradient norm", _lines(runs, "grad_norm")),
        chart("step_seconds", "Seconds a step", seconds, f"up to {SLOW} times the median", from_zero=True),
    ]
    legend = f'<ul class="legend">{keys}</ul>'
    return section("Training", quiet(explanation), legend, loss, f'<div class="charts">{"".join(small)}</div>')


def _lines(runs: Sequence[Run], key: str, is_noisy: bool = True) -> list[Curve]:
    return [Curve(points_of(run.metrics, key), _style(index), is_noisy) for index, run in enumerate(runs)]


def _samples(runs: Sequence[Run], names: Sequence[str]) -> str:
    title = "Their last videos"
    keys = list(dict.fromkeys(key for run in runs for key in run.samples))
    # What most runs show stands first; a page has room for so many videos.
    keys.sort(key=lambda key: -sum(key in run.samples for run in runs))
    shown = keys[: max(1, MAX_PLAYERS // len(runs))]
    samples = []
    for key in shown:
        latest: list[tuple[str, str, bytes | None]] = []
        for index, (run, name) in enumerate(zip(runs, names, strict=True)):
            videos = run.samples.get(key)
            label = f"{name} · {step_label(max(videos))}" if videos else name
            latest.append((label, _style(index), videos[max(videos)] if videos else None))
        samples.append(sample_by_run(key, latest))
    if not samples:
        return section(title, quiet("No videos yet."))
    return samples_section(title, samples, len(keys) - len(shown))


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    options = [shown_options(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for of_run in options for name in of_run):
        values = [of_run.get(name, NONE) for of_run in options]
        if len(set(values)) > 1 and name not in OWN_OPTIONS:
            rows.append([name, *values])
    for name in dict.fromkeys(name for run in runs for name in run.versions):
        values = [str(run.versions.get(name, NONE)) for run in runs]
        if len(set(values)) > 1:
            rows.append([f"{name}, version", *values])
    title = "What differs"
    return section(title, table(["Option", *names], rows) if rows else quiet("Nothing: their options are the same."))


def _memory(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for phase, label in MEMORY_PHASES.items():
        for kind in ("measured", "planned"):
            figures = [_memory_figure(run, kind, phase) for run in runs]
            if set(figures) != {NONE}:
                rows.append([f"{label}, {kind}", *figures])
    return section("Memory", table(["", *names], rows) if rows else quiet("Nothing has been measured yet."))


def _memory_figure(run: Run, kind: str, phase: str) -> str:
    figures = run.memory.get(kind)
    figure = finite(figures.get(phase)) if isinstance(figures, dict) else None
    return NONE if figure is None else f"{figure:.2f} {run.memory.get('unit', 'GiB')}"


def _problems(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = [
        [label, *counts]
        for label, counts in (
            ("Skipped clips", [len(run.preparation.get("skipped") or []) for run in runs]),
            ("Skipped steps", [len(run.skipped_steps) for run in runs]),
        )
        if any(counts)
    ]
    parts = [table(["", *names], rows)] if rows else []
    parts += [note(f"{name}: {line}") for run, name in zip(runs, names, strict=True) for line in run.notes]
    return section("Problems", *(parts or [quiet("None.")]))

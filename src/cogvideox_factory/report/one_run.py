"""The page of one run: its videos, curves, memory, clips, problems and options."""

from __future__ import annotations

from collections import Counter

from cogvideox_factory.report.curves import SLOW, Curve, chart, points_of, without_slow
from cogvideox_factory.report.facts import MEMORY_PHASES, facts_of, shown_options
from cogvideox_factory.report.markup import note, number, page, quiet, section, table, text
from cogvideox_factory.report.reading import Run, finite
from cogvideox_factory.report.videos import MAX_PLAYERS, sample_by_step, samples_section


def page_of_run(run: Run) -> str:
    """The whole page."""
    items = "".join(f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>\n" for name, value in facts_of(run).items())
    sections = [_samples(run), _curves(run), _memory(run), _clips(run), _problems(run), _configuration(run)]
    return page("training run", run.folder.resolve().name, f'<dl class="facts">\n{items}</dl>', sections)


def _samples(run: Run) -> str:
    title = "Before and after"
    if not run.samples:
        has_prompt = run.config.get("validation_prompt")
        return section(title, quiet("No videos yet." if has_prompt else "No videos: the run has no validation prompt."))
    shown = list(run.samples.items())[: MAX_PLAYERS // 2]  # of each, before and after
    samples = [sample_by_step(key, videos, len(shown)) for key, videos in shown]
    return samples_section(title, samples, len(run.samples) - len(shown))


def _curves(run: Run) -> str:
    if not run.metrics:
        return section("Training", quiet("No step has been finished yet."))
    held_out = points_of(run.held_out, "loss")
    legend = "A dot is a step, a line the running mean."
    if held_out:
        legend += " The other line is the loss on clips that are held out, at noise levels of its own."
    measured = Curve(held_out, "held-out", has_dots=True)
    charts = [_measured("lr", "Learning rate", run, is_noisy=False), _measured("grad_norm", "Gradient norm", run)]
    charts.append(_seconds(run))
    small = f'<div class="charts">{"".join(charts)}</div>'
    return section("Training", quiet(legend), _measured("loss", "Loss", run, measured), small)


def _measured(key: str, title: str, run: Run, *others: Curve, is_noisy: bool = True) -> str:
    points = points_of(run.metrics, key)
    gaps = len(run.metrics) - len(points)
    remark = f"steps without a finite value: {gaps}" if gaps else ""
    # Without any value of its own there is no chart, whatever else it would show.
    curves = [Curve(points, is_noisy=is_noisy, has_dots=is_noisy), *others] if points else []
    return chart(key, title, curves, remark)


def _seconds(run: Run) -> str:
    """How long a step took, and how much of it was spent waiting for data."""
    points = points_of(run.metrics, "step_seconds")
    if not points:
        return ""
    usual = without_slow(points)
    remark = "the lower line is waiting for data"
    if len(usual) < len(points):
        slowest = number(max(value for _, value in points))
        remark += f"; not drawn, above {SLOW} times the median: {len(points) - len(usual)}, up to {slowest} s"
    drawn = {step for step, _ in usual}
    waiting = [point for point in points_of(run.metrics, "data_seconds") if point[0] in drawn]
    curves = [Curve(usual, is_noisy=True, has_dots=True), Curve(waiting, "waiting", is_noisy=True)]
    return chart("step_seconds", "Seconds a step", curves, remark, from_zero=True)


def _memory(run: Run) -> str:
    kinds = [kind for kind in ("measured", "planned") if isinstance(run.memory.get(kind), dict)]
    figures = {(phase, kind): finite(run.memory[kind].get(phase)) for phase in MEMORY_PHASES for kind in kinds}
    largest = max((figure for figure in figures.values() if figure is not None), default=0)
    if largest <= 0:
        return section("Memory", quiet("Nothing has been measured yet."))
    bars = ""
    for (phase, kind), figure in figures.items():
        label = f"<dt>{MEMORY_PHASES[phase]}</dt>\n" if kind == kinds[0] else ""
        value = f"not {kind}" if figure is None else f"{figure:.2f} {run.memory.get('unit', 'GiB')} {kind}"
        bar = f'<span class="{kind}" style="width:{100 * (figure or 0) / largest:.1f}%"></span>'
        bars += f'{label}<dd><span class="track">{bar}</span>{text(value)}</dd>\n'
    return section("Memory", quiet(run.memory.get("kind", "unknown kind")), f'<dl class="bars">\n{bars}</dl>')


def _clips(run: Run) -> str:
    if not run.clips:
        return section("Clips", quiet(f"No prepared clips in {run.prepared} yet."))
    sizes = Counter(tuple(clip.get("bucket") or ("unknown", "?", "?")) for clip in run.clips)
    rows = [[frames, f"{height} × {width}", count] for (frames, height, width), count in sizes.most_common()]
    counts = [f"{run.preparation[name]} {name}" for name in ("encoded", "reused") if name in run.preparation]
    summary = ", ".join([f"{len(run.clips)} prepared", *counts])
    return section("Clips", quiet(summary), table(["Frames", "Height × width", "Clips"], rows))


def _problems(run: Run) -> str:
    clips = [[clip.get("path"), clip.get("reason")] for clip in run.preparation.get("skipped") or []]
    steps = [
        [*(line.get(key) for key in ("step", "loss", "grad_norm")), ", ".join(map(str, line.get("clips") or []))]
        for line in run.skipped_steps
    ]
    parts = [table(["Skipped clip", "Reason"], clips)] if clips else []
    parts += [table(["Skipped step", "Loss", "Gradient norm", "Clips"], steps)] if steps else []
    parts += map(note, run.notes)
    return section("Problems", *(parts or [quiet("None.")]))


def _configuration(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    options = table(["Option", "Value"], list(shown_options(run).items()))
    details = f"<details><summary>All options</summary>\n{options}</details>"
    return section("Configuration", *([quiet(f"Made with {versions}.")] if versions else []), details)

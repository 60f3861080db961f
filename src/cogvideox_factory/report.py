"""Reads a run folder and writes report.html: one file that opens offline and shows what the training did.

The run may have been killed, or still go on: what is missing is said on the page and is never fatal.

Rejected: a plotting library (a slow import for three line charts, which then ignore phones and dark mode), and
a chart script from a CDN (an empty page offline, and someone else learns who reads it).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

import yaml

from cogvideox_factory.config import UserError
from cogvideox_factory.redaction import without_secrets

Points = list[tuple[float, float]]  # (step, value)
SampleKey = tuple[str, str, int]  # prompt, seed, how many of the same came before it in prompts.json
VideosByStep = dict[int, bytes]  # optimizer step → content of the mp4 file

MEMORY_PHASES = {
    "memory_before_training": "Before the first step",
    "memory_before_validation": "Peak of training",
    "memory_after_validation": "Peak with validation",
    "memory_after_testing": "Peak of testing",
}
SECRET_OPTIONS = {"hub_token"}  # a report is made to be handed around


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the report of a run, by default as report.html into its folder; returns the path of the file."""
    if not run.is_dir():
        raise UserError(f"{run} is not a folder; name the --output_dir of a training run")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} holds no run: there is no config.yaml; name the --output_dir of a training run")
    output = output or run / "report.html"
    if output.is_dir():
        raise UserError(f"{output} is a folder; name the file to write the report to")
    content = _page(run).encode("utf-8", "replace")  # a file name can hold what UTF-8 cannot
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    return output


def _page(run: Path) -> str:
    notes: list[str] = []  # what could not be read; shown among the problems
    config = _read_config(run / "config.yaml")
    metrics = _read_lines(run / "metrics.jsonl", notes)
    held_out = _read_lines(run / "validation_loss.jsonl", notes)
    is_prepared_elsewhere = config.get("load_tensors") is True and config.get("data_root")
    prepared = Path(str(config["data_root"])) if is_prepared_elsewhere else run / "prepared"
    preparation = _read_json(prepared / "report.json", dict, notes) or {}
    name = _text(run.resolve().name)
    sections = [
        _samples_section(_read_samples(run / "validation", notes), config.get("validation_prompt")),
        _curves_section(metrics, held_out),
        _memory_section(_read_json(run / "memory.json", dict, notes) or {}),
        _clips_section(_read_lines(prepared / "index.jsonl", notes), preparation, prepared),
        _problems_section(preparation.get("skipped"), _read_lines(run / "skipped_steps.jsonl", notes), notes),
        _config_section(config),
    ]
    # With this policy the browser itself refuses to fetch anything and to run any script but ours.
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · CogVideoX Factory</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="quiet">CogVideoX Factory · training run</p>
<h1>{name}</h1>
{_summary(config, metrics, held_out)}
</header>
<main>
{"".join(sections)}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


# Reading. A missing file is nothing yet; a damaged one is a note.


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not the config.yaml of a run: it holds no mapping of options")
    return config


def _parse(text: str, kind: type) -> Any:
    """JSON of this kind, else None."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, kind) else None


def _read_json(path: Path, kind: type, notes: list[str]) -> Any:
    if not path.is_file():
        return None
    content = _parse(path.read_text("utf-8", errors="replace"), kind)
    if content is None:
        notes.append(f"{path} is damaged, so what it holds is missing here.")
    return content


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file that holds one a line."""
    if not path.is_file():
        return []
    # A last line without its line break may be half written, so it is no problem when it cannot be read.
    *lines, unfinished = path.read_text("utf-8", errors="replace").split("\n")
    entries = [_parse(line, dict) for line in lines]
    if None in entries:
        notes.append(f"{path}: damaged lines, left out here: {entries.count(None)}.")
    return [entry for entry in [*entries, _parse(unfinished, dict)] if entry is not None]


def _read_samples(folder: Path, notes: list[str]) -> dict[SampleKey, VideosByStep]:
    samples: dict[SampleKey, VideosByStep] = {}
    for step_folder in sorted(folder.glob("step-*")):
        entries = _read_json(step_folder / "prompts.json", list, notes)
        if entries is None or not re.fullmatch(r"step-\d+", step_folder.name):
            notes.append(f"validation/{step_folder.name} is not complete; its videos are left out.")
            continue
        seen: Counter[tuple[str, str]] = Counter()
        for entry in entries:
            details = entry if isinstance(entry, dict) else {}
            prompt, seed = str(details.get("prompt", "")), str(details.get("seed", ""))
            video = _read_video(step_folder, str(details.get("file", "")), notes)
            if video is not None:
                videos = samples.setdefault((prompt, seed, seen[prompt, seed]), {})
                videos[int(step_folder.name.removeprefix("step-"))] = video
            seen[prompt, seed] += 1
    return samples


def _read_video(folder: Path, file: str, notes: list[str]) -> bytes | None:
    """A video of this folder. A prompts.json from elsewhere must not pull other files into the page."""
    problem = "which is missing or cannot be read"
    try:
        path = (folder / file).resolve()
        if path.is_relative_to(folder.resolve()):
            return path.read_bytes()
        problem = "which is outside of its folder"
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        pass
    notes.append(f"validation/{folder.name}/prompts.json names {file!r}, {problem}; it was ignored.")
    return None


# Writing. Whatever comes from a file passes through _text or _number on its way into the page.


def _text(value: object) -> str:
    return escape(str(value))


def _finite(value: Any) -> float | None:
    """The value if it is a number that can be drawn: not missing, NaN or infinite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e30 else None


def _number(value: float) -> str:
    text = f"{value:.3e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return re.sub(r"\.?0*e\+?(-?)0*", r"e\1", text)  # 1e-4, not 1.000e-04


def _section(title: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{title}</h2>", *parts, "</section>\n"])


def _quiet(sentence: object) -> str:
    return f'<p class="quiet">{_text(sentence)}</p>'


def _table(headings: list[str], rows: list[list[Any]]) -> str:
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def _short_name(model: str) -> str:
    """A name on the Hub as it is; of a folder on this machine, which is nobody else's business, the last two names."""
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def _summary(config: dict[str, Any], metrics: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> str:
    last = metrics[-1] if metrics else {}
    loss, step, planned_steps = last.get("loss"), last.get("step", 0), config.get("max_train_steps")
    seconds = sum(_finite(entry.get("step_seconds")) or 0 for entry in metrics)
    is_full = config.get("training_type") == "sft"
    facts = {
        "Model": _short_name(str(config.get("pretrained_model_name_or_path", "unknown"))),
        "Method": "full fine-tuning" if is_full else f"LoRA, rank {config.get('rank', 'unknown')}",
        "Steps": f"{step} of {planned_steps}" if planned_steps else step,
        "Samples seen": last.get("samples_seen", 0),
        "Last loss": _number(loss) if isinstance(loss, int | float) else "none yet",
        **_held_out_facts(held_out),
        "Training time": timedelta(seconds=round(seconds)),
        "Version": config.get("version", "unknown"),
    }
    items = "".join(f"<div><dt>{label}</dt><dd>{_text(value)}</dd></div>\n" for label, value in facts.items())
    return f'<dl class="facts">\n{items}</dl>'


def _held_out_facts(held_out: list[dict[str, Any]]) -> dict[str, str]:
    points = _points(held_out, "loss")
    if not points:
        return {}
    (_, last), (step, best) = points[-1], min(points, key=lambda point: point[1])
    return {"Held-out loss": f"{_number(last)}, best {_number(best)} at step {step:.0f}"}


def _samples_section(samples: dict[SampleKey, VideosByStep], planned_prompt: Any) -> str:
    if not samples:
        reason = "No videos yet." if planned_prompt else "No videos: the run has no validation prompt."
        return _section("Before and after", _quiet(reason))
    button = '<button id="play" type="button" hidden>Pause</button>'  # the script shows it
    rows = [_sample_row(prompt, seed, videos) for (prompt, seed, _), videos in samples.items()]
    return _section(f"Before and after {button}", *rows)


def _sample_row(prompt: str, seed: str, videos: VideosByStep) -> str:
    latest = max(videos)
    between = [step for step in sorted(videos) if 0 < step < latest]
    strip = (
        f"<details><summary>In between: {len(between)}</summary>\n"
        f'<div class="strip">{"".join(_figure(videos, step) for step in between)}</div></details>\n'
    )
    return (
        f'<article class="sample">\n<p>{_text(prompt)} <small>seed&nbsp;{_text(seed)}</small></p>\n'
        f'<div class="pair">{_figure(videos, 0)}{_figure(videos, latest or None)}</div>\n'
        f"{strip if between else ''}</article>"
    )


def _figure(videos: VideosByStep, step: int | None) -> str:
    """The video of a step, or a frame that says that it is missing; step None: there is none after step 0."""
    if step is None or step not in videos:
        when = "from the training yet" if step is None else "from before the training"
        return f'\n<figure class="missing">No video {when}.</figure>'
    source = f"data:video/mp4;base64,{base64.b64encode(videos[step]).decode()}"
    label = f"Step {step:,}" if step else "Before training"
    video = f'<video src="{source}" autoplay loop muted playsinline></video>'
    return f"\n<figure>{video}<figcaption>{label}</figcaption></figure>"


def _points(entries: list[dict[str, Any]], key: str) -> Points:
    """What can be drawn of a value over the steps."""
    pairs = [(_finite(entry.get("step")), _finite(entry.get(key))) for entry in entries]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _curves_section(metrics: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> str:
    if not metrics:
        return _section("Training", _quiet("No step has been finished yet."))
    small = _chart(metrics, "lr", "Learning rate", is_noisy=False) + _chart(metrics, "grad_norm", "Gradient norm")
    measured = _points(held_out, "loss")
    legend = "A dot is a step, a line the running mean."
    if measured:
        legend += " The other line is the loss on clips that are held out, at noise levels of its own."
    loss = _chart(metrics, "loss", "Loss", second=measured)
    return _section("Training", _quiet(legend), loss, f'<div class="pair">{small}</div>')


def _chart(
    metrics: list[dict[str, Any]],
    key: str,
    title: str,
    is_noisy: bool = True,
    second: Sequence[tuple[float, float]] = (),
) -> str:
    """A chart over the steps. Its lines stretch to any width; its texts, outside of them, keep their size.

    `second` is another curve in it.
    """
    points = _points(metrics, key)
    gaps = len(metrics) - len(points)
    remark = f" <small>steps without a finite value: {gaps}</small>" if gaps else ""
    caption = f"<figcaption>{title}{remark}</figcaption>"
    if not points:
        return f"<figure>{caption}</figure>\n"

    drawn = [*points, *second]
    last_step = max(1.0, *(step for step, _ in drawn))
    values = [value for _, value in drawn]
    ticks = _round_ticks(min(values), max(values))

    def across(step: float) -> str:
        return f"{100 * step / last_step:.2f}"

    def down(value: float) -> str:
        return f"{100 * (ticks[-1] - value) / (ticks[-1] - ticks[0]):.2f}"

    def places(line: Points) -> list[str]:
        return [f"{across(step)} {down(value)}" for step, value in _thinned(line)]

    axes = [
        f'<line x2="100%" y1="{down(tick)}%" y2="{down(tick)}%"/>'
        f'<text y="{down(tick)}%" dx="-8" dy=".32em" text-anchor="end">{_number(tick)}</text>'
        for tick in ticks
    ] + [
        f'<text x="{across(tick)}%" y="100%" dy="1.7em" text-anchor="middle">{tick:,.0f}</text>'
        for tick in _round_ticks(0, last_step)
        if tick <= last_step and tick.is_integer()
    ]
    dots = "".join(f"M{place}h.01" for place in places(points)) if is_noisy or len(points) == 1 else ""
    line = "M" + "L".join(places(_smoothed(points) if is_noisy else points))
    other = places([*second]) if second else []
    other_line = f'<path class="held-out" d="M{"L".join(other)}"/>' if other else ""
    other_dots = f'<path class="held-out dots" d="{"".join(f"M{place}h.01" for place in other)}"/>' if other else ""
    return f"""<figure class="chart {key}">{caption}
<svg role="img" aria-label="{title} by step">{"".join(axes)}
<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">
<path class="dots" d="{dots}"/><path class="line" d="{line}"/>{other_line}{other_dots}</svg></svg></figure>
"""


def _round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about five of them, that enclose the range."""
    size = max(abs(low), abs(high), 1e-30)
    if high - low < 1e-3 * size:  # a flat line is drawn in the middle
        low, high = low - size, high + size
    wanted = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= 0.999 * wanted)
    return [step * index for index in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _smoothed(points: Points) -> Points:
    """Running mean with exponential weights, taken forwards and then backwards, so that it does not lag behind."""
    keep = 1 - 1 / max(3, len(points) / 40)
    for _ in range(2):
        total = weight = 0.0
        means = []
        for step, value in points:
            total, weight = keep * total + value, keep * weight + 1
            means.append((step, total / weight))
        points = means[::-1]
    return points


def _thinned(points: Points) -> Points:
    """A thousand points at the most: the lowest and highest of each stretch, so that no spike is lost."""
    length = math.ceil(len(points) / 500)
    stretches = [points[start : start + length] for start in range(0, len(points), length)]
    ordered = [sorted(stretch, key=lambda point: point[1]) for stretch in stretches]
    return [point for stretch in ordered for point in sorted({stretch[0], stretch[-1]})]


def _memory_section(memory: dict[str, Any]) -> str:
    kinds = [kind for kind in ("measured", "planned") if isinstance(memory.get(kind), dict)]
    figures = {(phase, kind): _finite(memory[kind].get(phase)) for phase in MEMORY_PHASES for kind in kinds}
    largest = max((figure for figure in figures.values() if figure is not None), default=0)
    if largest <= 0:
        return _section("Memory", _quiet("Nothing has been measured yet."))
    bars = ""
    for (phase, kind), figure in figures.items():
        label = f"<dt>{MEMORY_PHASES[phase]}</dt>\n" if kind == kinds[0] else ""
        value = f"not {kind}" if figure is None else f"{figure:.2f} {memory.get('unit', 'GiB')} {kind}"
        bar = f'<span class="{kind}" style="width:{100 * (figure or 0) / largest:.1f}%"></span>'
        bars += f'{label}<dd><span class="track">{bar}</span>{_text(value)}</dd>\n'
    return _section("Memory", _quiet(memory.get("kind", "unknown kind")), f'<dl class="bars">\n{bars}</dl>')


def _clips_section(clips: list[dict[str, Any]], preparation: dict[str, Any], prepared: Path) -> str:
    if not clips:
        return _section("Clips", _quiet(f"No prepared clips in {prepared} yet."))
    sizes = Counter(tuple(clip.get("bucket") or ("unknown", "?", "?")) for clip in clips)
    rows = [[frames, f"{height} × {width}", count] for (frames, height, width), count in sizes.most_common()]
    counts = [f"{preparation[name]} {name}" for name in ("encoded", "reused") if name in preparation]
    summary = ", ".join([f"{len(clips)} prepared", *counts])
    return _section("Clips", _quiet(summary), _table(["Frames", "Height × width", "Clips"], rows))


def _problems_section(skipped_clips: Any, skipped_steps: list[dict[str, Any]], notes: list[str]) -> str:
    clips = [[clip.get("path"), clip.get("reason")] for clip in skipped_clips or []]
    steps = [[line.get(key) for key in ("step", "loss", "grad_norm")] for line in skipped_steps]
    names = [", ".join(map(str, line.get("clips") or [])) for line in skipped_steps]
    parts = [_table(["Skipped clip", "Reason"], clips)] if clips else []
    if steps:
        heads = ["Skipped step", "Loss", "Gradient norm", "Clips"]
        parts.append(_table(heads, [[*step, name] for step, name in zip(steps, names, strict=True)]))
    parts += [f'<p class="note">{_text(note)}</p>' for note in notes]
    return _section("Problems", *(parts or [_quiet("None.")]))


def _config_section(config: dict[str, Any]) -> str:
    rows = [
        [name, without_secrets(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))]
        for name, value in config.items()
        if name not in SECRET_OPTIONS
    ]
    options = _table(["Option", "Value"], rows)
    return _section("Configuration", f"<details><summary>All options</summary>\n{options}</details>")


STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1d2126; --quiet: #646b75; --rule: #e3e4e6;
  --track: #eeeff1; --accent: #2463c9; --planned: #a9bfe6; --warning: #a4480f; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --ink: #e5e7ea; --quiet: #979ea9;
  --rule: #2c3036; --track: #23262c; --accent: #76a9fa; --planned: #3d5682; --warning: #f0a06a; } }
* { box-sizing: border-box; margin: 0; }
body { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { display: flex; align-items: center; justify-content: space-between; min-height: 2rem;
  margin-bottom: .5rem; font-size: 1.25rem; }
section { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); }
small, .quiet, dt, th, summary, figcaption { color: var(--quiet); font-size: .85rem; font-weight: 400; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin-top: 1.25rem; }
.facts dd { font-weight: 500; }
button { padding: .3rem 1rem; border: 1px solid var(--rule); border-radius: 1rem; background: none;
  color: inherit; font: 500 .85rem system-ui, sans-serif; cursor: pointer; }
.sample { margin: .5rem 0 2rem; }
.sample > p { max-width: 44rem; margin-bottom: .6rem; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem 1rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); gap: .5rem; }
summary { margin: .5rem 0; cursor: pointer; }
video { display: block; width: 100%; margin-bottom: .3rem; border-radius: 4px; background: var(--track); }
.missing { display: grid; place-items: center; min-height: 8rem; padding: 1rem; border-radius: 4px;
  border: 1px dashed var(--rule); color: var(--quiet); font-size: .85rem; text-align: center; }
.chart { margin-top: 1.25rem; padding: 0 .5rem 1.75rem 3rem; }
.chart figcaption { margin: 0 0 .9rem -3rem; color: var(--ink); font-weight: 500; }
svg { display: block; width: 100%; height: 8rem; overflow: visible; }
.loss > svg { height: 16rem; }
svg svg { height: 100%; }
svg line { stroke: var(--rule); }
svg text { fill: var(--quiet); font-size: .75rem; }
path { fill: none; vector-effect: non-scaling-stroke; stroke: var(--accent); stroke-linecap: round;
  stroke-linejoin: round; }
.line { stroke-width: 2; }
.dots { stroke-width: 4; stroke-opacity: .3; }
.held-out { stroke: var(--warning); stroke-width: 2; }
.held-out.dots { stroke-width: 6; stroke-opacity: 1; }
.bars dt { margin-top: .7rem; }
.bars dd { display: grid; grid-template-columns: 1fr 9rem; gap: 1rem; align-items: center;
  font-size: .85rem; }
.track, .track span { display: block; height: .75rem; border-radius: 3px; background: var(--track); }
.track .measured { background: var(--accent); }
.track .planned { background: var(--planned); }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; white-space: pre-wrap; }
details td:first-child { min-width: 10.5rem; }
.note { margin-top: .6rem; color: var(--warning); font-size: .9rem; }
"""

SCRIPT = """
const videos = [...document.querySelectorAll("video")], button = document.getElementById("play");
const playing = () => videos.some(video => !video.paused);
const setAll = on => videos.forEach(video => on ? video.play().catch(() => {}) : video.pause());
const showState = () => { button.textContent = playing() ? "Pause" : "Play"; };
for (const video of videos) for (const event of ["play", "pause"]) video.addEventListener(event, showState);
for (const sample of document.querySelectorAll(".sample")) {
  const [leader, ...others] = sample.querySelectorAll("video");
  leader.addEventListener("timeupdate", () => {
    for (const other of others) {
      const gap = Math.abs(other.currentTime - leader.currentTime);
      if (Math.min(gap, other.duration - gap) > 0.06) other.currentTime = leader.currentTime;
    }
  });
}
if (button) {
  button.hidden = false;
  button.addEventListener("click", () => setAll(!playing()));
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) setAll(false);
  showState();
}
"""

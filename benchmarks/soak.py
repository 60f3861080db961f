"""Whether a long training needs more and more: memory, open files, threads or processes.

Runs `train` on a tiny model for 2,000 steps, with checkpoints, validation videos, the held-out loss, a moving average
and TensorBoard, and looks at the process from outside several times a second.

    python benchmarks/soak.py --output benchmarks/results/soak.json --page docs/reliability.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.demo.world import PROMPTS, render_clips

SECONDS_BETWEEN = 0.25
NUM_KEPT = 200  # samples in the file of results
MIB = 2**20
# What the figures of a run that needs no more than at its start stay within, from its first quarter to its last.
LIMITS = {"resident_mib": 16.0, "open_files": 0.0, "threads": 0.0, "processes": 0.0}
NAMES = {
    "resident_mib": "resident memory, MiB",
    "open_files": "open files and sockets",
    "threads": "threads",
    "processes": "processes beside it",
}
BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"

Sample = dict[str, float]


def prepare_inputs(folder: Path) -> list[str]:
    """Model, clips and a prepared set; the options of a training on them that name these."""
    model, clips, prepared = folder / "model", folder / "clips", folder / "prepared"
    build_tiny_pipeline(seed=0, num_layers=2).save_pretrained(model)
    render_clips(clips)
    shared = ["--pretrained_model_name_or_path", str(model)]
    size = ["--frame_buckets", "9", "--max_sequence_length", "16"]
    program("prepare", *shared, "--data_root", str(clips), "--output_dir", str(prepared), *size)
    return [*shared, "--data_root", str(prepared), "--load_tensors"]


def options_of(num_steps: int) -> list[str]:
    """What the training is to do, all of it often enough to show what it leaves behind."""
    every = max(1, num_steps // 20)
    return [
        *("--rank", "4", "--lora_alpha", "4", "--train_batch_size", "1", "--ema_decay", "0.9"),
        *("--max_train_steps", str(num_steps), "--checkpointing_steps", str(every), "--checkpoints_total_limit", "2"),
        *("--validation_prompt", PROMPTS[0], "--validation_steps", str(2 * every), "--num_inference_steps", "1"),
        *("--validation_fraction", "0.1", "--validation_loss_steps", str(2 * every), "--report_to", "tensorboard"),
    ]


def program(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "cogvideox_factory", *arguments], check=True)


def watch(arguments: Sequence[str], metrics: Path) -> list[Sample]:
    """Run the program, and look at its process from the first step to the last."""
    samples: list[Sample] = []
    with subprocess.Popen([sys.executable, "-m", "cogvideox_factory", *arguments]) as run:
        process, step, read = psutil.Process(run.pid), 0, 0
        while run.poll() is None:
            time.sleep(SECONDS_BETWEEN)
            if metrics.exists():
                with metrics.open("rb") as file:
                    file.seek(read)
                    new = file.read()
                step, read = step + new.count(b"\n"), read + len(new)
            try:
                sample = look_at(process)
            except psutil.Error:  # it has just ended
                continue
            if step:
                samples.append({"step": step, **sample})
    if run.returncode:
        raise SystemExit(f"the training ended with exit code {run.returncode}")
    last = samples[-1]["step"]
    return [sample for sample in samples if sample["step"] < last]  # then the model is loaded anew, and tested


def look_at(process: psutil.Process) -> Sample:
    with process.oneshot():
        return {
            "resident_mib": round(process.memory_info().rss / MIB, 1),
            "open_files": process.num_fds(),
            "threads": process.num_threads(),
            "processes": len(process.children(recursive=True)),
        }


def summary_of(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Of each figure the medians of the first and the last quarter of the steps, the most, and the slope of a line."""
    last_step = samples[-1]["step"]
    found = {}
    for name, limit in LIMITS.items():
        first, last = (statistics.median(quarter) for quarter in first_and_last_quarter(samples, name))
        settled = [sample for sample in samples if sample["step"] > last_step / 10]
        slope = np.polyfit([sample["step"] for sample in settled], [sample[name] for sample in settled], 1)[0]
        found[name] = {
            "first_quarter": first,
            "last_quarter": last,
            "most": max(sample[name] for sample in samples),
            "slope_per_1000_steps": round(float(slope) * 1000, 3) + 0.0,
            "is_flat": last - first <= limit,
        }
    return found


def first_and_last_quarter(samples: Sequence[Sample], name: str) -> tuple[list[float], list[float]]:
    """Values of a figure in the first and in the last quarter of the steps."""
    last_step = samples[-1]["step"]
    first = [sample[name] for sample in samples if sample["step"] <= last_step / 4]
    return first, [sample[name] for sample in samples if sample["step"] >= last_step * 3 / 4]


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | first quarter: median, least | last quarter: median, least | most | slope over 1,000 steps |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["summary"].items():
        least_first, least_last = map(min, first_and_last_quarter(result["samples"], name))
        lines.append(
            f"| {NAMES[name]} | {row['first_quarter']:g}, {least_first:g} | {row['last_quarter']:g}, {least_last:g} | "
            f"{row['most']:g} | {row['slope_per_1000_steps']:+.2f} |"
        )
    where = f"{result['machine']}, torch {result['versions']['torch']}"
    done = f"{result['steps']:,} steps in {result['seconds'] / 60:.0f} minutes, {result['num_samples']:,} looks"
    return "\n".join([*lines, "", f"Run on {result['date']} ({where}): {done}."])


def with_table(page: str, result: dict[str, Any]) -> str:
    """A page with the table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    parser.add_argument("--page", type=Path, help="page whose table is to be written anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        inputs = prepare_inputs(Path(temporary))
        started = time.monotonic()
        arguments = ["train", *inputs, "--output_dir", str(run), *options_of(options.steps)]
        samples = watch(arguments, run / "metrics.jsonl")
        seconds = time.monotonic() - started
    summary = summary_of(samples)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "peft")},
        "options": options_of(options.steps),
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "num_samples": len(samples),
        "summary": summary,
        "samples": samples[:: max(1, len(samples) // NUM_KEPT)],
    }
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.page:
        options.page.write_text(with_table(options.page.read_text(), result))
    grown = [NAMES[name] for name, row in summary.items() if not row["is_flat"]]
    print(f"GROWS: {', '.join(grown)}" if grown else "flat")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())

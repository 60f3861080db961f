"""Peak memory and step time of real-size trainings on a GPU, beside what `plan` says of them.

Which trainings these are stands in gpu_rows.py, how each is run in gpu_phases.py.

    python benchmarks/gpu_memory.py --list
    python benchmarks/gpu_memory.py --plan --rows lora-5b               # planned figures; needs no GPU
    python benchmarks/gpu_memory.py --rows lora-5b smallest --card 24
    python benchmarks/gpu_memory.py --missing --minutes 9               # those without a result, for nine minutes
    python benchmarks/gpu_memory.py --table

Each row is a process of its own, with a fresh CUDA context, and its result is in the file before the next one starts;
out of memory is a result. `--tiny` runs it on a CPU with shrunken models, where tensors are counted in place of what
CUDA counts (not with torchao's optimizers: nothing can be counted in what they compile).

On a machine without the package, PYTHONPATH=src suffices. What an image with torch (2.11 will do), transformers,
accelerate, peft, pillow, pyyaml and psutil then lacks, as wheels: diffusers, av, tyro, docstring_parser and typeguard.
Where a row asks for them, also bitsandbytes (of its libraries, the one for the CUDA version at hand is enough) and
torchao.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_phases import GIB, CudaMeter, Meter, TinyMeter, measure_row
from gpu_rows import Row, all_rows, opened, published_rows

from cogvideox_factory.planning.phases import HELD
from cogvideox_factory.planning.traces import NAMES, Traces

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_memory.json"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "torchao")
# The columns of the original's table that our phases answer to.
PUBLISHED_AS = {
    "training": "memory_before_validation",
    "validation": "memory_after_validation",
    "testing": "memory_after_testing",
}


def plan_row(row: Row, is_tiny: bool) -> dict[str, dict[str, float]]:
    """Planned GiB of each phase, on the GPU and on the host; of a training without the moment of loading."""
    with opened(row, is_tiny) as (options, checkpoint):
        phases = [Traces(checkpoint).phase(name, options) for name in row.phases]
    return {
        phase.name: {
            "peak": phase.peak / GIB,
            "host": max(stage.host for name, stage in phase.stages.items() if name != HELD) / GIB,
        }
        for phase in phases
    }


def measure_into(row: Row, meter: Meter, num_steps: int, card: float | None, file: Path) -> dict[str, Any]:
    """The row's record, which is written after each phase, so that what kills the process loses one."""
    record: dict[str, Any] = {
        "row": row.name,
        "flags": " ".join(row.flags),
        "date": datetime.now().isoformat(timespec="seconds"),
        "counted": meter.kind,
        "device": platform.machine() if meter.device.type == "cpu" else torch.cuda.get_device_name(meter.device),
        "card_gib": card,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or "default",
        "versions": {name: version_of(name) for name in LIBRARIES},
        "status": "killed",
        "phases": {},
    }
    file.write_text(json.dumps(record))
    try:
        for phase, figures in measure_row(row, meter, num_steps):
            record["phases"][phase] = figures
            file.write_text(json.dumps(record))
        record["status"] = "measured"
    except torch.OutOfMemoryError as error:
        record |= {"status": "out of memory", "error": str(error)[:300]}
    except Exception as error:  # whatever it is, the next row is to have its turn
        traceback.print_exc()
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
    file.write_text(json.dumps(record))
    return record


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def measure_in_process(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of a row that runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        command = [sys.executable, __file__, "--rows", row.name, "--phases", *row.phases, "--into", str(file)]
        command += ["--steps", str(arguments.steps), *(["--tiny"] if arguments.tiny else [])]
        command += [] if arguments.card is None else ["--card", str(arguments.card)]
        try:
            code = subprocess.run(command, timeout=arguments.row_minutes * 60).returncode
            status = f"killed (exit code {code})"
        except subprocess.TimeoutExpired:
            status = f"stopped after {arguments.row_minutes:g} minutes"
        record = json.loads(file.read_text()) if file.is_file() else {"row": row.name, "phases": {}, "status": "killed"}
    return {**record, "status": status} if record["status"] == "killed" else record


def read_results(path: Path) -> dict[str, Any]:
    """`planned`: by row and phase. `measured`: a record a run, the latest last."""
    return json.loads(path.read_text()) if path.is_file() else {"planned": {}, "measured": []}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def table(rows: Mapping[str, Row], results: Mapping[str, Any]) -> str:
    """Markdown: a line for each phase of each row of which something is known."""
    latest = {record["row"]: record for record in results["measured"]}
    columns = ["row", "phase", "planned", "allocated", "reserved", "outside", "promised", "published"]
    columns += ["host: planned", "resident", "pinned", "host: promised", "step, s", "status"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows.values():
        record, planned = latest.get(row.name, {}), results["planned"].get(row.name, {})
        reached = record.get("phases", {})
        for phase in [name for name in NAMES if name in {**planned, **reached}] or (["–"] if record else []):
            plan, figures = planned.get(phase, {}), reached.get(phase, {})
            promised = row.promised.get(phase)
            cells = [
                *(plan.get("peak"), figures.get("peak"), figures.get("reserved"), figures.get("outside"), promised),
                row.published.get(PUBLISHED_AS.get(phase, "")),
                *(plan.get("host"), figures.get("host"), figures.get("pinned"), row.promised.get("host")),
                figures.get("seconds", {}).get("step"),
            ]
            status = "measured" if figures else record.get("status", "not measured")
            if promised is not None and figures.get("peak", 0) > promised:
                status = "more than promised"
            lines.append(f"| {row.name} | {phase} | {' | '.join(map(cell, cells))} | {status} |")
    return "\n".join(lines)


def cell(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def listed(rows: Mapping[str, Row]) -> str:
    """All rows with their options, and those of the original's table that no row is for."""
    lines = [f"{row.name}: {row.model}, {', '.join(row.phases)}: {' '.join(row.flags)}" for row in rows.values()]
    left_out = [
        f"(not here: {line['method']} {line['model']} {line['optimizer']}, batch {line['train_batch_size']}: it is of "
        "an engine with a configuration of its own)"
        for line in published_rows()[1]
    ]
    return "\n".join([*lines, *left_out])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--missing", action="store_true", help="leave out rows that the file has a result of")
    parser.add_argument("--phases", nargs="+", choices=NAMES, help="measure these in place of the row's own")
    parser.add_argument(
        "--card", type=float, metavar="GIB", help="as on a card of so much memory; default: all there is"
    )
    parser.add_argument("--steps", type=int, default=3, help="of the training; the first one's time is kept apart")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after these")
    parser.add_argument("--row_minutes", type=float, default=6.0, help="the most that one row may take")
    parser.add_argument("--output", type=Path, help="the results' file")
    parser.add_argument("--tiny", action="store_true", help="shrunken models on a CPU")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # measure one row here and now, into this file
    for name, text in (
        ("plan", "write down what `plan` says of the rows; needs no GPU"),
        ("list", "print the rows"),
        ("table", "print the results as Markdown"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    rows = all_rows()
    unknown = [name for name in arguments.rows or () if name not in rows]
    if unknown:
        print(f"--rows {' '.join(unknown)}: no such row; --list names them", file=sys.stderr)
        return 2
    rows = {name: row for name, row in rows.items() if name in (arguments.rows or rows)}
    if arguments.phases:
        rows = {name: replace(row, phases=tuple(arguments.phases)) for name, row in rows.items()}
    path = arguments.output or (Path(tempfile.gettempdir()) / "gpu_memory_tiny.json" if arguments.tiny else RESULTS)
    results = read_results(path)
    if arguments.list or arguments.table:
        print(listed(rows) if arguments.list else table(rows, results))
        return 0
    if not (arguments.plan or arguments.tiny or torch.cuda.is_available()):
        print("no CUDA GPU here: --plan and --tiny need none, all else does", file=sys.stderr)
        return 2
    if arguments.into:
        meter = TinyMeter() if arguments.tiny else CudaMeter(arguments.card)
        (row,) = rows.values()
        measure_into(row, meter, arguments.steps, arguments.card, arguments.into)
        return 0
    done = {record["row"] for record in results["measured"]}
    done = set(results["planned"]) if arguments.plan else done
    started = time.monotonic()
    for name, row in rows.items():
        if arguments.missing and name in done:
            continue
        if time.monotonic() - started > arguments.minutes * 60:
            print(f"time is up before {name}; go on with --missing")
            break
        if arguments.plan:
            if row.is_original:
                continue  # it is not what `plan` knows
            results["planned"][name] = plan_row(row, arguments.tiny)
            print(f"{name}: planned {results['planned'][name]}", flush=True)
        else:
            results["measured"].append(measure_in_process(row, arguments))
            print(f"{name}: {results['measured'][-1]['status']}", flush=True)
        write_results(path, results)
    print(table(rows, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

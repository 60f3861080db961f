"""What a plan says, to people and to programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cogvideox_factory.config import Plan, plain_values
from cogvideox_factory.memory.tracker import PARTS
from cogvideox_factory.model.adapters import describe_method
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.planning.phases import Phase, largest_bucket, training_dtype
from cogvideox_factory.planning.search import Budget, Found
from cogvideox_factory.training.start_images import with_redacted_images

GIB = 1024**3
# Allowances for what no tensor holds.
PROGRAM_GIB = 2.0  # of the machine: Python, its libraries and CUDA's
CONTEXT_GIB = 1.2  # of every process on a GPU: the CUDA context, the libraries' workspaces, fragmentation


def budget_of(options: Plan) -> Budget:
    """What tensors may take of the memory that the options give."""
    gpu, host = options.budget.gpu_memory, options.budget.host_memory
    return Budget(
        math.inf if gpu is None else (gpu - CONTEXT_GIB) * GIB,
        math.inf if host is None else (host / sharing_a_machine(options) - PROGRAM_GIB) * GIB,
    )


def sharing_a_machine(options: Plan) -> int:
    """Processes that share the memory of one machine."""
    return math.ceil(options.num_processes / options.num_machines)


def of_machine(options: Plan, host: int) -> float:
    """GiB that a machine needs for its processes, of which each has so many bytes of tensors there."""
    return (host / GIB + PROGRAM_GIB) * sharing_a_machine(options)


def flags_of(values: Mapping[str, Any]) -> str:
    """Values of options as one writes them on a command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items())


def as_reasons(found: Found) -> str:
    """What a search looked at, and what it took."""
    lines = [
        f"--fit: the fastest settings found are {flags_of(found.values) or 'those given'}",
        "Looked at, in this order (GiB, with what the program itself takes):",
    ]
    seen = []
    for look in found.looks:
        if (look.phase.name, look.values) in seen:
            continue
        seen.append((look.phase.name, look.values))
        gpu, host = look.phase.peak / GIB + CONTEXT_GIB, look.phase.host / GIB + PROGRAM_GIB
        verdict = "fits" if look.fits else "too much"
        flags = flags_of(look.values) or "as given"
        lines.append(f"  {look.phase.name:<10} {gpu:>7.2f} on the GPU {host:>7.2f} on the host   {verdict:<8}  {flags}")
    return "\n".join([*lines, ""])


def nothing_fits(found: Found) -> str:
    """The message where a search found nothing."""
    budget = found.options.budget
    highest, host = max(phase.peak for phase in found.phases), max(phase.host for phase in found.phases)
    of_host = "" if budget.host_memory is None else f" and --host_memory {budget.host_memory:g}"
    phases = ", ".join(f"{phase.name} {phase.peak / GIB:.2f}" for phase in found.phases)
    return (
        f"--gpu_memory {budget.gpu_memory:g}{of_host}: nothing that is known fits. The most sparing settings "
        f"({flags_of(found.values) or 'those given'}) need a GPU of {highest / GIB + CONTEXT_GIB:.2f} GiB and "
        f"{of_machine(found.options, host):.2f} GiB of host memory (planned: {phases} GiB, and {CONTEXT_GIB} for the "
        "CUDA context). Take smaller or fewer frames (--height_buckets, --width_buckets, --frame_buckets), a smaller "
        "--train_batch_size"
        + (", --training_type lora" if found.options.method.training_type == "sft" else "")
        + ", or a larger GPU"
    )


def does_not_fit(options: Plan, phases: Sequence[Phase], found: Found) -> str:
    """The message where settings do not fit; `found` is what does, or what comes closest."""
    gpu, host = options.budget.gpu_memory, options.budget.host_memory
    assert gpu is not None and host is not None
    needs = ", ".join(
        f"{phase.name} {phase.peak / GIB + CONTEXT_GIB:.2f} GiB of the GPU and {of_machine(options, phase.host):.2f} "
        "of the machine"
        for phase in phases
    )
    asked = f"these settings do not fit into {gpu:.2f} GiB of the GPU (--gpu_memory) and {host:.2f} GiB of the machine "
    asked += f"(--host_memory). Planned: {needs}. "
    if not found.fits:
        return asked + nothing_fits(found)
    return f"{asked}The nearest that fits: add {flags_of(found.values)}; or let --fit choose"


def as_json(options: Plan, phases: Sequence[Phase]) -> dict[str, Any]:
    """The plan for programs; memory in GiB."""
    rows = [
        {
            "name": phase.name,
            "peak_gib": phase.peak / GIB,
            "host_gib": phase.host / GIB,
            "parts": {part: phase.parts[part] / GIB for part in PARTS},
        }
        for phase in phases
    ]
    peak = max(phase.peak for phase in phases) / GIB
    budget = budget_of(options)
    return {
        "settings": plain_values(replace(options, validation=with_redacted_images(options.validation))),
        "phases": rows,
        "peak_gib": peak,
        "budget_gib": options.budget.gpu_memory,
        "fits": None if budget == Budget() else all(budget.holds(phase) for phase in phases),
    }


def as_text(options: Plan, checkpoint: Checkpoint, phases: Sequence[Phase]) -> str:
    """The plan for people."""
    columns = ["peak", *PARTS, "host"]
    lines = [
        f"{checkpoint.name}, {describe_method(options.method, options.lora)}, batch "
        f"{options.training.train_batch_size} of {largest_bucket(options)}, "
        f"{str(training_dtype(options, checkpoint)).removeprefix('torch.')}",
        *_as_ranks(options),
        "Planned by tracing on fake tensors, not measured; GiB at the highest moment of each phase:",
        "",
        f"{'phase':<12}" + "".join(f"{column:>13}" for column in columns),
    ]
    for phase in phases:
        values = [phase.peak, *(phase.parts[part] for part in PARTS), phase.host]
        lines.append(f"{phase.name:<12}" + "".join(f"{value / GIB:>13.2f}" for value in values))
    highest = max(phases, key=lambda phase: phase.peak)
    need = highest.peak / GIB + CONTEXT_GIB
    lines += [
        "",
        f"planned peak {highest.peak / GIB:.2f} GiB, in {highest.name}; with {CONTEXT_GIB} GiB allowed for the CUDA "
        f"context {need:.2f} GiB",
    ]
    needs = {"gpu_memory": need, "host_memory": of_machine(options, max(phase.host for phase in phases))}
    for name, needed in needs.items():
        given = getattr(options.budget, name)
        if given is not None:
            left = given - needed
            verdict = f"fits, with {left:.2f} GiB to spare" if left >= 0 else f"does not fit, by {-left:.2f} GiB"
            lines.append(f"--{name} {given:g}: {verdict}")
    return "\n".join(lines)


def _as_ranks(options: Plan) -> list[str]:
    if options.num_processes == 1:
        return []
    machines = f"{options.num_machines} machines" if options.num_machines > 1 else "one machine"
    return [
        f"One of {options.num_processes} processes on {machines}, by {options.engine} (what that changes is computed, "
        "not traced); the first one tests the result",
    ]

"""The `plan` command: what each phase of a run holds on the GPU at its peak, before anything is downloaded or rented.

The figures are traced (see `phases`), not measured: tensors' bytes, to which the CUDA context comes, and what the
allocator loses between them.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cogvideox_factory.config import Plan, UserError, nearest, plain_values
from cogvideox_factory.memory.strategies import check_memory
from cogvideox_factory.memory.tracker import PARTS
from cogvideox_factory.model import published
from cogvideox_factory.model.adapters import describe_method
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning
from cogvideox_factory.planning.phases import Phase, largest_bucket, trace_phases, training_dtype
from cogvideox_factory.sampling import resolve_sampling
from cogvideox_factory.training.run_options import resolve_options

GIB = 1024**3
CONTEXT_GIB = 1.2  # of every process on a GPU: the CUDA context, the libraries' workspaces, fragmentation


def run(options: Plan) -> None:
    """Trace the phases and print them. Raises UserError for a model that is not known here, and for what training
    would refuse."""
    with open_configs(options) as checkpoint:
        options = resolve(options, checkpoint)
        phases = trace_phases(options, checkpoint)
        print(json.dumps(as_json(options, phases)) if options.json else as_text(options, checkpoint, phases))


@contextlib.contextmanager
def open_configs(options: Plan) -> Iterator[Checkpoint]:
    """The checkpoint of a folder, or of a published model's name, of which the configs are kept with the program.

    Raises UserError for any other name. Nothing is downloaded.
    """
    name = options.model.pretrained_model_name_or_path
    assert name is not None
    with contextlib.ExitStack() as stack:
        if Path(name).expanduser().is_dir():
            checkpoint = open_checkpoint(options.model)
        elif published.is_published(name):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            published.write_configs(name, Path(folder))
            model = replace(options.model, pretrained_model_name_or_path=folder)
            checkpoint = replace(open_checkpoint(model), name=name)
        else:
            known = [f"{owner}/{model}" for owner in published.OWNERS for model in published.NAMES]
            of_first = [name for name in known if name.startswith(published.OWNERS[0])]
            raise UserError(
                f"--pretrained_model_name_or_path {name}: no such folder, and none of the published models"
                f"{nearest(name, known)}. Known are {', '.join(of_first)}, also as {published.OWNERS[1]}/…"
            )
        checkpoint = with_conditioning(checkpoint, options.conditioning)
        _ = checkpoint.weights_dtype  # it is kept once read, and its file cannot be read in the fake world
        yield checkpoint


def resolve(options: Plan, checkpoint: Checkpoint) -> Plan:
    """Options as `train` would fill them in, for raw clips of every bucket."""
    given = replace(
        options,
        output_dir=options.output_dir or Path("."),
        data=replace(options.data, data_root=options.data.data_root or Path(".")),
        training=replace(options.training, load_tensors=False),  # a prepared set may not be there yet
    )
    resolved = resolve_options(given, checkpoint)
    check_memory(resolved, num_processes=1, has_scaler=training_dtype(resolved, checkpoint) == torch.float16)
    sampling = resolve_sampling(
        options.sampling, largest_bucket(resolved), checkpoint.size_divisor, checkpoint.temporal_factor
    )
    return replace(options, **{name: getattr(resolved, name) for name in FILLED_IN}, sampling=sampling)


FILLED_IN = ("data", "encoding", "training", "optimizer", "held_out")


def as_json(options: Plan, phases: list[Phase]) -> dict[str, Any]:
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
    budget = options.budget.gpu_memory
    return {
        "settings": plain_values(options),
        "phases": rows,
        "peak_gib": peak,
        "budget_gib": budget,
        "fits": None if budget is None else peak + CONTEXT_GIB <= budget,
    }


def as_text(options: Plan, checkpoint: Checkpoint, phases: list[Phase]) -> str:
    """The plan for people."""
    columns = ["peak", *PARTS, "host"]
    lines = [
        f"{checkpoint.name}, {describe_method(options.method, options.lora)}, batch "
        f"{options.training.train_batch_size} of {largest_bucket(options)}, "
        f"{str(training_dtype(options, checkpoint)).removeprefix('torch.')}",
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
    if options.budget.gpu_memory is not None:
        left = options.budget.gpu_memory - need
        verdict = f"fits, with {left:.2f} GiB to spare" if left >= 0 else f"does not fit, by {-left:.2f} GiB"
        lines.append(f"--gpu_memory {options.budget.gpu_memory:g}: {verdict}")
    return "\n".join(lines)

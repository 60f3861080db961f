"""What `train` plans before it loads anything: settings that fit, chosen or refused, and the figures to be kept.

Without a GPU, and without --gpu_memory, there is nothing to fit into, and nothing is planned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import psutil
import torch

from cogvideox_factory.config import Plan, Train, UserError, with_values
from cogvideox_factory.data.store import PreparedSet
from cogvideox_factory.planning import budget_of, open_configs, resolve
from cogvideox_factory.planning.phases import HELD, Phase
from cogvideox_factory.planning.search import search
from cogvideox_factory.planning.texts import GIB, as_reasons, does_not_fit, nothing_fits
from cogvideox_factory.planning.traces import Traces

logger = logging.getLogger(__name__)


def plan_training(options: Train) -> tuple[Train, Mapping[str, float] | None]:
    """Options of a training that fits, and its planned peaks in GiB by their names in memory.json.

    Raises UserError where what is asked for does not fit, or with --fit, where nothing does.
    """
    fit, budget = options.budget.fit, options.budget
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        if fit:
            raise UserError(
                f"--fit: for one GPU, and there are {num_processes} processes; let `cogvideox-factory plan --fit` "
                "choose, and give train what it chose"
            )
        return options, None
    gpu_memory = budget.gpu_memory or memory_of_card()
    if gpu_memory is None:
        if fit:
            raise UserError("--fit: there is no GPU here that it could fit into; give its memory, as --gpu_memory 24")
        return options, None
    host_memory = budget.host_memory or psutil.virtual_memory().total / GIB
    plan = Plan(**{item.name: getattr(options, item.name) for item in dataclasses.fields(Train)})
    plan = with_values(plan, {"gpu_memory": gpu_memory, "host_memory": host_memory})
    logger.info("planning   what fits into %.1f GiB of the GPU and %.1f of the machine", gpu_memory, host_memory)
    with open_configs(plan, may_download=True) as checkpoint:
        with _unheard():  # train says it all again
            plan = resolve(_with_prepared_size(plan), checkpoint)
        traces, limit, names = Traces(checkpoint), budget_of(plan), phases_of(options)
        if fit:
            found = search(plan, traces, limit, names)
            if not found.fits:
                raise UserError(nothing_fits(found))
            logger.info("%s", as_reasons(found))
            options, phases = with_values(options, {**found.values, "fit": False}), list(found.phases)
        else:
            phases = [traces.phase(name, plan) for name in names]
            if not all(limit.holds(phase) for phase in phases):
                found = search(plan, traces, limit, names)
                raise UserError(does_not_fit(plan, phases, found))
    return options, as_measured(phases)


def phases_of(options: Train) -> list[str]:
    """The phases that a training will have."""
    has_videos = bool(options.validation.validation_prompt)
    is_prepared = options.training.load_tensors
    return [
        *(["preparing"] if has_videos or not is_prepared else []),
        "training",
        *(["validation", "testing"] if has_videos else []),
    ]


def as_measured(phases: Sequence[Phase]) -> dict[str, float]:
    """Planned peaks in GiB under the names that memory.json gives the measured ones."""
    by_name = {phase.name: phase for phase in phases}
    figures = {
        "memory_before_training": by_name["training"].stages[HELD].peak,
        "memory_before_validation": by_name["training"].peak,
    }
    for name, phase in (("memory_after_validation", "validation"), ("memory_after_testing", "testing")):
        if phase in by_name:
            figures[name] = by_name[phase].peak
    return {name: round(value / GIB, 3) for name, value in figures.items()}


def memory_of_card() -> float | None:
    """GiB of the GPU that a program may take; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = (value / GIB for value in torch.cuda.mem_get_info())
    # By asking, this process has made its CUDA context, about half a GiB that is planned for; what else is missing
    # belongs to others.
    return min(total, free + 0.5)


def _with_prepared_size(plan: Plan) -> Plan:
    """With the largest bucket of a prepared set as the only one, where the training is given one."""
    if not plan.training.load_tensors:
        return plan
    assert plan.data.data_root is not None
    bucket = max((entry.bucket for entry in PreparedSet(plan.data.data_root).read_index()), key=math.prod)
    size = {f"{name}_buckets": (value,) for name, value in zip(("frame", "height", "width"), bucket, strict=True)}
    return with_values(plan, size)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Nothing of what is logged inside is shown."""
    package = logging.getLogger("cogvideox_factory")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)

"""What `train` plans before it loads anything: settings that fit, chosen or refused, and the figures to be kept.

Without a GPU, and without --gpu_memory, there is nothing to fit into, and nothing is planned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from cogvideox_factory.config import DataOptions, Plan, Train, UserError, option_values, read_config, with_values
from cogvideox_factory.data.store import PreparedSet
from cogvideox_factory.planning import open_configs, resolve
from cogvideox_factory.planning.phases import HELD, Phase
from cogvideox_factory.planning.search import OPTIONS, search
from cogvideox_factory.planning.texts import GIB, as_reasons, budget_of, does_not_fit, nothing_fits
from cogvideox_factory.planning.traces import Traces
from cogvideox_factory.training.engine import engine_of_launcher

logger = logging.getLogger(__name__)

# What a run that goes on keeps, as its saved states are of that form.
KEPT_BY_A_RUN = {"quantize_base", "trainable_dtype", "use_8bit", "use_4bit"}


def plan_training(options: Train) -> tuple[Train, Mapping[str, float] | None]:
    """Options of a training that fits, and its planned peaks in GiB by their names in memory.json.

    Of several processes the first plans, before they wait for each other; it ends them all where nothing fits.
    Raises UserError where what is asked for does not fit, or with --fit, where nothing does.
    """
    fit, budget = options.budget.fit, options.budget
    num_processes = number_of_processes()
    if num_processes > 1:
        if fit:
            raise UserError(
                f"--fit: for one GPU, and there are {num_processes} processes; let `cogvideox-factory plan --fit` "
                "choose, with --num_processes, and give train what it chose"
            )
        if os.environ.get("RANK", "0") != "0" or engine_of_launcher() is None:
            return options, None
    limits = [limit for limit in (budget.gpu_memory, memory_of_card()) if limit is not None]
    gpu_memory = min(limits, default=None)
    if gpu_memory is None:
        if fit:
            raise UserError("--fit: there is no GPU here that it could fit into; give its memory, as --gpu_memory 24")
        return options, None
    if will_be_refused(options):
        return options, None  # at once, by train itself
    host_memory = budget.host_memory or memory_of_machine()
    plan = Plan(**{item.name: getattr(options, item.name) for item in dataclasses.fields(Train)})
    plan = with_values(plan, {"gpu_memory": gpu_memory, "host_memory": host_memory, **processes(num_processes)})
    logger.info("planning   what fits into %.1f GiB of the GPU and %.1f of the machine", gpu_memory, host_memory)
    with open_configs(plan, may_download=True) as checkpoint:
        with _unheard():  # train says it all again
            plan = resolve(_with_prepared_size(plan), checkpoint)
        traces, limit, names = Traces(checkpoint), budget_of(plan), phases_of(options)
        if fit:
            plan, may_choose = with_choices_of_run(plan, options)
            found = search(plan, traces, limit, names, may_choose=may_choose)
            if not found.fits:
                raise UserError(nothing_fits(found))
            logger.info("%s", as_reasons(found))
            chosen = {name: value for name, value in option_values(found.options).items() if name in OPTIONS}
            return with_values(options, {**chosen, "fit": False}), as_measured(found.phases)
        try:
            phases = [traces.phase(name, plan) for name in names]
        except UserError:
            raise
        except Exception as error:  # a fault of the plan's must not keep anyone from training
            logger.warning("the memory could not be planned (%s: %s); going on without", type(error).__name__, error)
            return options, None
        if budget.host_memory is None and any(phase.host > limit.host for phase in phases):
            most = max(phase.host for phase in phases) / GIB
            logger.warning("planned for the machine are %.1f GiB of tensors, more than it has room for", most)
            limit = replace(limit, host=math.inf)
        if not all(limit.holds(phase) for phase in phases):
            found = search(plan, traces, limit, names, may_choose=is_installed)
            raise UserError(does_not_fit(plan, phases, found))
    return options, as_measured(phases)


def number_of_processes() -> int:
    """As the launcher says it. Raises UserError where the variable holds something else."""
    value = os.environ.get("WORLD_SIZE", "1")
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"the variable WORLD_SIZE is {value!r}: the number of processes is needed, which torchrun and accelerate "
            "launch set themselves; unset it"
        ) from None


def processes(num_processes: int) -> dict[str, Any]:
    """What the launcher says of them, as options of `plan`."""
    of_machine = os.environ.get("LOCAL_WORLD_SIZE", "")
    num_machines = math.ceil(num_processes / int(of_machine)) if of_machine.isdecimal() and int(of_machine) else 1
    return {"num_processes": num_processes, "num_machines": num_machines, "engine": engine_of_launcher()}


def will_be_refused(options: Train) -> bool:
    """Whether the data set is not there, or the run's folder holds what would be replaced."""
    root, run = options.data.data_root, options.output_dir
    assert root is not None and run is not None
    return not root.is_dir() or ((run / "config.yaml").exists() and not options.training.resume_from_checkpoint)


def with_choices_of_run(plan: Plan, options: Train) -> tuple[Plan, Callable[[Mapping[str, Any]], bool]]:
    """Where a run goes on: with what was chosen for it, and without what it cannot change any more."""
    assert options.output_dir is not None
    file = options.output_dir / "config.yaml"
    if not options.training.resume_from_checkpoint or not file.is_file():
        return plan, is_installed
    given, defaults, settings = option_values(plan), option_values(Plan()), read_config(file)
    earlier = {name: settings[name] for name in OPTIONS if name in settings and given.get(name) == defaults.get(name)}
    return with_values(plan, earlier), lambda values: is_installed(values) and not KEPT_BY_A_RUN & set(values)


def is_installed(values: Mapping[str, Any]) -> bool:
    """Whether the libraries that values of options need are there."""
    needed = set()
    if values.get("use_torchao"):
        needed.add("torchao")
    elif values.get("use_8bit") or values.get("quantize_base") == "nf4":
        needed.add("bitsandbytes")
    return all(importlib.util.find_spec(name) for name in needed)


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


def memory_of_machine() -> float:
    """GiB that this process may take of the machine: what it has, or what its container may have of it."""
    total = psutil.virtual_memory().total
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            total = min(total, int(Path(file).read_text()))
    return total / GIB


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
    plan = dataclasses.replace(plan, data=DataOptions(data_root=plan.data.data_root))
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

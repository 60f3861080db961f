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

import torch

from cogvideox_factory.config import Plan, UserError, nearest
from cogvideox_factory.memory.strategies import check_memory
from cogvideox_factory.model import published
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning
from cogvideox_factory.planning.phases import largest_bucket, training_dtype
from cogvideox_factory.planning.search import search
from cogvideox_factory.planning.texts import as_json, as_reasons, as_text, budget_of, nothing_fits
from cogvideox_factory.planning.traces import Traces
from cogvideox_factory.sampling import resolve_sampling
from cogvideox_factory.training.engine import check_options_of_engine, check_precision_of_engine
from cogvideox_factory.training.optimizers import check_optimizer_options
from cogvideox_factory.training.run_options import resolve_options


def run(options: Plan) -> None:
    """Trace the phases and print them, with --fit of the settings that were found.

    Raises UserError for a model that is not known here, for what training would refuse, and with --fit where nothing
    fits.
    """
    if options.budget.fit and options.budget.gpu_memory is None:
        raise UserError("--fit: into what? Give the memory of the GPU in GiB, such as --gpu_memory 24")
    with open_configs(options) as checkpoint:
        options = resolve(options, checkpoint)
        traces = Traces(checkpoint)
        found = None
        if options.budget.fit:
            found = search(options, traces, budget_of(options))
            if not found.fits:
                raise UserError(nothing_fits(found))
            options = found.options
        phases = traces.phases(options)
        if options.json:
            chosen = {} if found is None else {"chosen": dict(found.values)}
            print(json.dumps({**as_json(options, phases), **chosen}))
        else:
            if found is not None:
                print(as_reasons(found))
            print(as_text(options, checkpoint, phases))


@contextlib.contextmanager
def open_configs(options: Plan, *, may_download: bool = False) -> Iterator[Checkpoint]:
    """The checkpoint of a folder, or of a published model's name, of which the configs are kept with the program.

    Any other name is looked up on the Hub, where that is allowed, for its configs alone; or else raises UserError.
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
        elif may_download:
            checkpoint = open_checkpoint(options.model, with_weights=False)
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
    resolved = resolve_options(given, checkpoint, is_gpu=True)
    has_scaler = training_dtype(resolved, checkpoint) == torch.float16
    check_optimizer_options(resolved.optimizer, options.num_processes, has_scaler=has_scaler)
    check_memory(resolved, options.num_processes, has_scaler=has_scaler)
    if options.num_processes > 1:
        check_precision_of_engine(training_dtype(resolved, checkpoint), options.engine)
        check_options_of_engine(resolved, options.engine)
    sampling = resolve_sampling(
        options.sampling, largest_bucket(resolved), checkpoint.size_divisor, checkpoint.temporal_factor
    )
    return replace(options, **{name: getattr(resolved, name) for name in FILLED_IN}, sampling=sampling)


FILLED_IN = ("data", "encoding", "training", "optimizer", "held_out")

"""What saving costs the step loop: a LoRA of CogVideoX-5b with its AdamW states, written to this machine's disk.

A step is a wait, as for a GPU, then a change of every trained number, as by the optimizer. Loops with no saving, with
saving that the loop waits for, and with saving beside the loop follow each other in every round, so that whatever else
the machine does falls on all three. What saving costs is what a loop takes longer than the one without.

    python benchmarks/checkpoint_saving.py [--rank 64] [--rounds 5] [--step_seconds 2] [--folder RUNS]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from cogvideox_factory.config import LoraOptions
from cogvideox_factory.model.adapters import attach_lora, trainable_parameters
from cogvideox_factory.model.published import read_configs
from cogvideox_factory.training.checkpoint import Snapshot, TrainState
from cogvideox_factory.training.saving import Saver

GIB = 1024**3
STEPS = 6  # of a loop; the first is saved, and the others are there for the writing to go on beside them
MODES = ("none", "waiting", "beside")


def build(rank: int):
    """A LoRA of CogVideoX-5b over weights without content, and AdamW with its states."""
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(read_configs("CogVideoX-5b")["transformer"])
        transformer.requires_grad_(False)
        attach_lora(transformer, LoraOptions(rank=rank, lora_alpha=rank), 0)
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(torch.randn(parameter.shape)))
    trained = list(trainable_parameters(transformer).values())
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return transformer, optimizer


def loop(mode: str, run: Path, transformer, optimizer, step_seconds: float) -> tuple[float, float]:
    """Seconds of the loop, and of its call of `save`; writing that goes on afterwards is waited for outside."""
    held = 0.0
    saver = Saver(run, keep=1, last_step=0)
    with saver if mode == "beside" else contextlib.nullcontext():  # outside of its context it writes at once
        started = time.perf_counter()
        for step in range(1, STEPS + 1):
            time.sleep(step_seconds)
            for parameter in trainable_parameters(transformer).values():
                parameter.data.mul_(1.0001)
            if step == 1 and mode != "none":
                before = time.perf_counter()
                saver.save(TrainState(step=step), transformer, optimizer)
                held = time.perf_counter() - before
            assert not saver.has_failed
        seconds = time.perf_counter() - started
    saver.wait()
    shutil.rmtree(run, ignore_errors=True)
    return seconds, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step_seconds", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; a temporary one by default")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    transformer, optimizer = build(arguments.rank)
    size = Snapshot.take(TrainState(), transformer, optimizer).num_bytes / GIB
    rounds = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for number in range(arguments.rounds):
            found = {
                mode: loop(mode, Path(folder) / mode, transformer, optimizer, arguments.step_seconds) for mode in MODES
            }
            costs = {mode: found[mode][0] - found["none"][0] for mode in ("waiting", "beside")}
            held = {mode: found[mode][1] for mode in ("waiting", "beside")}
            rounds.append({"costs_seconds": costs, "held_seconds": held})
            print(f"round {number + 1}: {size:.2f} GiB; " + ", ".join(f"{mode} {costs[mode]:.2f} s" for mode in costs))
    medians = {
        mode: statistics.median(each["costs_seconds"][mode] for each in rounds) for mode in ("waiting", "beside")
    }
    print("median: " + ", ".join(f"{mode} {seconds:.2f} s" for mode, seconds in medians.items()))
    if arguments.output:
        result = {
            "date": date.today().isoformat(),
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "safetensors")},
            "gib": round(size, 3),
            "options": {name: value for name, value in vars(arguments).items() if name in ("rank", "step_seconds")},
            "rounds": rounds,
            "median_costs_seconds": medians,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

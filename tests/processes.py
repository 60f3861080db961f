"""The program on several processes that share a training, as a launcher would start it."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ENGINES: dict[str, dict[str, str]] = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {"ACCELERATE_USE_CPU": "true"},  # and `_allow_fsdp_without_gpu`
}


def run_on_ranks(engine: str, *arguments: str | Path, num_ranks: int = 2) -> list[int]:
    """Run a command under an engine; the exit codes of its processes.

    They are forked, so that they have all imports already: CPU work alone may be done so.
    """
    launch = {
        **ENGINES[engine],
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    words = [str(argument) for argument in arguments]
    ranks = [context.Process(target=_run, args=(engine, words, launch, rank)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()  # one that waits for another that has failed
    return [-1 if code is None else code for code in codes]


def _run(engine: str, words: Sequence[str], launch: Mapping[str, str], rank: int) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from cogvideox_factory.cli import main

    os.environ.update({**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    for state in (GradientState, PartialState):  # of the tests before, which ran in one process
        state._reset_state()
    AcceleratorState._reset_state(True)
    if engine == "fsdp2":
        _allow_fsdp_without_gpu()
    raise SystemExit(main(list(words)))


def _allow_fsdp_without_gpu() -> None:
    """accelerate refuses FSDP without a GPU, though torch's works over gloo; what a GPU would set is set here."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from cogvideox_factory.training import engine

    def make(**settings: Any) -> Accelerator:
        accelerator = Accelerator(**settings)
        for state in (PartialState._shared_state, accelerator.state._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["CogVideoXBlock"],
            cpu_ram_efficient_loading=False,
        )
        return accelerator

    engine.Accelerator = make


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

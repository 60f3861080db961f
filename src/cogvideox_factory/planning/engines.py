"""What each of several processes holds of a phase, from what one process alone would hold.

Computed, not traced: buckets and parts of an engine follow from the size of what is trained. DDP: Li et al. 2020,
https://arxiv.org/abs/2006.15704. ZeRO: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054; its buckets are
DeepSpeed's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cogvideox_factory.memory.tracker import PARTS, Moment
from cogvideox_factory.planning.depth import Stages

FP32, HALF = 4, 2  # bytes of a number
ADAM = 3 * FP32  # of a trained number: its fp32 master and two states
# In numbers, not bytes.
REDUCE_BUCKET = 500_000_000  # `reduce_bucket_size`: gradients are averaged over the ranks when so many have come
LIVE = 1_000_000_000  # `stage3_max_live_parameters`: weights of other ranks that are kept before they are dropped


@dataclass(frozen=True)
class Weights:
    """The transformer's weights, and what is trained of them."""

    count: int  # numbers, those of an adapter included
    trained: int
    trained_bytes: int  # as one process alone holds it
    part: str  # "adapter" or "weights": what the trained ones are counted as
    gathered: int  # numbers that FSDP2 puts together at a time: two blocks, and what is outside of the blocks
    average: int = 0  # bytes of their moving average, which every rank keeps whole


def of_a_rank(stages: Stages, engine: str, num_ranks: int, weights: Weights) -> Stages:
    """Stages of a phase in which a training is in memory, on one of `num_ranks` processes."""
    change = _ENGINES[engine]
    return {key: change(stage, num_ranks, weights) for key, stage in stages.items()} if num_ranks > 1 else stages


def stages_of_its_own(engine: str, num_ranks: int, num_of_machine: int, weights: Weights) -> Stages:
    """Stages of a training that one process alone has not. `num_of_machine` processes share a machine."""
    if num_ranks == 1 or engine == "ddp":
        return {}
    frozen = weights.count - weights.trained
    on_host = FP32 * weights.trained + HALF * frozen if engine == "fsdp2" else 0
    # The first process gathers weights and states for a checkpoint, beside what all have there. Its machine has room
    # for it or not: told of each of the machine's processes is their part of it.
    waiting = _zero3(_EMPTY, num_ranks, weights).host if engine == "zero3" else 0
    return {
        # DeepSpeed divides a model that is on the GPU; trained weights are made fp32 for FSDP2.
        ("before it is divided", 0): _moment(HALF * weights.count if engine == "zero3" else 0, on_host),
        ("a checkpoint", 0): _moment(0, waiting + -(-ADAM * weights.trained // num_of_machine)),
    }


def _moment(weights: int, host: int) -> Moment:
    return Moment({**dict.fromkeys(PARTS, 0), "weights": weights}, host)


_EMPTY = _moment(0, 0)


def _ddp(stage: Moment, num_ranks: int, weights: Weights) -> Moment:
    """Gradients are views of buckets, which stay when the gradients are dropped."""
    gradients = max(stage.parts["gradients"], weights.trained_bytes)
    return Moment({**stage.parts, "gradients": gradients}, stage.host)


def _zero2(stage: Moment, num_ranks: int, weights: Weights) -> Moment:
    """Fp32 masters, states and averaged gradients are divided among the ranks; what computes is whole, in 16 bits."""
    share = -(-weights.trained // num_ranks)
    parts = dict(stage.parts)
    parts[weights.part] += HALF * weights.trained - weights.trained_bytes
    parts["optimizer"] = ADAM * share + weights.average
    parts["gradients"] = FP32 * share + _bucket(weights)
    return Moment(parts, stage.host)


def _zero3(stage: Moment, num_ranks: int, weights: Weights) -> Moment:
    """All of that is divided, and the weights too; a rank's parts wait on the host."""
    share = -(-weights.trained // num_ranks)
    base = weights.count - (weights.trained if weights.part == "adapter" else 0)
    parts = {**stage.parts, "adapter": 0, "optimizer": weights.average, "gradients": _bucket(weights)}
    parts["weights"] += HALF * (min(weights.count, LIVE) - base)
    return Moment(parts, stage.host + HALF * -(-weights.count // num_ranks) + (ADAM + FP32) * share)


def _fsdp2(stage: Moment, num_ranks: int, weights: Weights) -> Moment:
    """Each rank's parts are on its GPU: trained weights in fp32 with states and gradients, the others in 16 bits."""
    share = -(-weights.trained // num_ranks)
    frozen = weights.count - weights.trained
    base = weights.count - (weights.trained if weights.part == "adapter" else 0)
    parts = {**stage.parts, "adapter": 0, "optimizer": (ADAM - FP32) * share, "gradients": FP32 * share}
    parts["weights"] += HALF * (-(-frozen // num_ranks) + weights.gathered - base) + FP32 * share
    return Moment(parts, stage.host)


def _bucket(weights: Weights) -> int:
    """Gradients that fill a bucket in 16 bits, and their copy in fp32 that travels."""
    return min(weights.trained, REDUCE_BUCKET) * (HALF + FP32)


_ENGINES: Mapping[str, Callable[[Moment, int, Weights], Moment]] = {
    "ddp": _ddp,
    "zero2": _zero2,
    "zero3": _zero3,
    "fsdp2": _fsdp2,
}

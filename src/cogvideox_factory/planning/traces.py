"""The phases of a run under one setting after another, none of them traced twice.

A phase depends on some of the options alone, and on how many blocks are resident in a way that two figures tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cogvideox_factory.config import Plan, option_values, with_values
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.planning.depth import Stages, along_line, at_full_depth
from cogvideox_factory.planning.engines import Weights, of_a_rank, stages_of_its_own
from cogvideox_factory.planning.fakes import fake_world
from cogvideox_factory.planning.phases import (
    Phase,
    count_weights,
    engine_holds,
    trace_encoding,
    trace_first_frame,
    trace_held,
    trace_testing,
    trace_text,
    trace_training,
    trace_validation,
    training_dtype,
)
from cogvideox_factory.planning.repeats import Calls

NAMES = ("preparing", "training", "validation", "testing")
# Options of a search that the tracing of a phase does not look at.
_OF_VIDEOS = {"enable_tiling", "enable_model_cpu_offload"}
_OF_ENCODING = {"use_tiling", "offload_text_encoder"}
_OF_BUDGET = {"fit", "gpu_memory", "host_memory", "json"}
_OF_RANKS = {"num_processes", "num_machines", "engine"}
_OF_PASSES = {
    *("gradient_checkpointing", "offload_activations", "split_checkpoints"),
    *("optimizer_in_backward", "offload_gradients"),
}
# What is held between two steps depends on these.
OF_HELD = {"trainable_dtype", "quantize_base", "use_8bit", "use_4bit", "use_torchao", "use_cpu_offload_optimizer"}
_OF_STEPS = _OF_PASSES | OF_HELD
FEW_RESIDENT = 2, 3  # numbers of resident blocks that are traced; each other one has a slot more or less


class Traces:
    """Traces phases of a checkpoint when they are asked for, and keeps them."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._decodings: Calls = {}
        self._kept: dict[tuple[Any, ...], Stages] = {}
        self._counted: dict[tuple[Any, ...], Weights] = {}

    @property
    def num_blocks(self) -> int:
        return self._checkpoint.transformer["num_layers"]

    def has_scaler(self, options: Plan) -> bool:
        """Whether these options train in fp16, whose gradients are scaled."""
        return training_dtype(options, self._checkpoint) == torch.float16

    def phases(self, options: Plan) -> list[Phase]:
        """Preparing, training, validation and testing with resolved options, as on a GPU."""
        return [self.phase(name, options) for name in NAMES]

    def phase(self, name: str, options: Plan) -> Phase:
        """One of `NAMES`, or what is held between two steps."""
        if name == "preparing":
            text = self._traced("text", options, {*_OF_VIDEOS, *_OF_STEPS, "use_tiling", "resident_blocks"}, self._text)
            without = {*_OF_VIDEOS, *_OF_STEPS, "offload_text_encoder", "resident_blocks"}
            clip = self._traced("clip", options, without, self._clip)
            kept = {"text": text, "clip": clip}
            if self._checkpoint.is_image_to_video:
                kept["picture"] = self._traced("picture", options, without, self._picture)
            return Phase(name, {(part, key): value for part, traced in kept.items() for key, value in traced.items()})
        trace, without = {
            "training": (self._training, {*_OF_VIDEOS, *_OF_ENCODING}),
            "held": (self._held, {*_OF_VIDEOS, *_OF_ENCODING, *_OF_PASSES, "feed_forward_chunks"}),
            "validation": (self._validation, {*_OF_ENCODING, *_OF_PASSES}),
            "testing": (self._testing, {*_OF_STEPS, "use_tiling"}),
        }[name]
        stages = self._with_residents(name, options, without, trace)
        if options.num_processes > 1 and name != "testing":  # by then the training and its engine have gone
            engine, count, weights = options.engine, options.num_processes, self._weights(options)
            stages = dict(of_a_rank(stages, engine, count, weights))
            if name == "training":
                stages |= stages_of_its_own(engine, count, math.ceil(count / options.num_machines), weights)
        return Phase(name, stages)

    def _weights(self, options: Plan) -> Weights:
        """For training and for what is done beside it."""
        key = "weights", options.optimizer.trainable_dtype  # of the options of a search these are all that matter
        if key not in self._counted:
            with fake_world():
                self._counted[key] = count_weights(options, self._checkpoint)
        return self._counted[key]

    def _with_residents(self, name: str, options: Plan, without: set[str], trace: Callable[[Plan], Stages]) -> Stages:
        """Whatever the number of resident blocks, from traces with few."""
        wanted, high = options.memory.resident_blocks, max(FEW_RESIDENT)
        if wanted is not None and wanted >= self.num_blocks:
            options = with_values(options, {"resident_blocks": None})
        if wanted is None or wanted <= high or wanted >= self.num_blocks:
            return self._traced(name, options, without, trace)
        few, more = (
            self._traced(name, with_values(options, {"resident_blocks": count}), without, trace)
            for count in FEW_RESIDENT
        )
        return along_line(few, more, FEW_RESIDENT, wanted)

    def _traced(self, name: str, options: Plan, without: set[str], trace: Callable[[Plan], Stages]) -> Stages:
        values: Mapping[str, Any] = option_values(options)
        key = (
            name,
            engine_holds(options),
            *(repr(value) for option, value in values.items() if option not in without | _OF_BUDGET | _OF_RANKS),
        )
        if key not in self._kept:
            with fake_world():
                self._kept[key] = trace(options)
        return self._kept[key]

    def _text(self, options: Plan) -> Stages:
        return trace_text(options, self._checkpoint).stages

    def _clip(self, options: Plan) -> Stages:
        return trace_encoding(options, self._checkpoint).stages

    def _picture(self, options: Plan) -> Stages:
        return trace_first_frame(options, self._checkpoint).stages

    def _training(self, options: Plan) -> Stages:
        return at_full_depth(self._checkpoint, options, lambda checkpoint: trace_training(options, checkpoint).stages)

    def _held(self, options: Plan) -> Stages:
        return at_full_depth(self._checkpoint, options, lambda checkpoint: trace_held(options, checkpoint).stages)

    def _validation(self, options: Plan) -> Stages:
        decodings = self._decodings
        return at_full_depth(
            self._checkpoint, options, lambda checkpoint: trace_validation(options, checkpoint, decodings).stages
        )

    def _testing(self, options: Plan) -> Stages:
        decodings = self._decodings
        return at_full_depth(
            self._checkpoint, options, lambda checkpoint: trace_testing(options, checkpoint, decodings).stages
        )

"""A moving average of the trained weights, which is what a run shows and exports where one is kept.

    average = decay × average + (1 - decay) × weights

after every optimizer step, from the weights that training starts with; in fp32, because a step of bf16 weights is
smaller than what they can tell apart. Rejected: diffusers' EMAModel, which keeps the average in the weights' type and
replaces the decay by (1 + n) / (10 + n) for the first steps, so that it is not the average that was asked for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from cogvideox_factory.model.adapters import AVERAGE_FILE

logger = logging.getLogger(__name__)


class WeightAverage:
    """The average of some parameters, by name, on the device where they are."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float):
        self.parameters = parameters
        self.decay = decay
        self.start_from(None)

    def start_from(self, averages: Mapping[str, torch.Tensor] | None) -> None:
        """Go on from averages that were saved, or begin with the parameters as they are."""
        source = self.parameters if averages is None else averages
        self._averages = {
            name: source[name].detach().to(parameter.device, torch.float32, copy=True)
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take in the trained weights as they are after an optimizer step: the fp32 masters where there are any."""
        for name, average in self._averages.items():
            average.lerp_(weights[name].detach().to(average.device, torch.float32), 1 - self.decay)

    def tensors(self) -> list[torch.Tensor]:
        """What it keeps."""
        return list(self._averages.values())

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """For a while the parameters are the averages, in the parameters' type; then what they were, untouched."""
        weights = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self._averages[name].to(parameter.dtype, copy=True)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = weights[name]

    def by_name(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint keeps of it."""
        return self._averages

    @staticmethod
    def read(folder: Path) -> dict[str, torch.Tensor] | None:
        """The averages of a checkpoint; None where it was written without."""
        if not (folder / AVERAGE_FILE).is_file():
            logger.warning("%s holds no average of the weights: it begins with the weights of that step", folder)
            return None
        return load_file(folder / AVERAGE_FILE)


def build_average(parameters: Mapping[str, torch.nn.Parameter], decay: float | None) -> WeightAverage | None:
    """The average that the option asks for, if any."""
    return None if decay is None else WeightAverage(parameters, decay)


def averaged(average: WeightAverage | None) -> contextlib.AbstractContextManager[None]:
    """The averages in the parameters' place for a while; where none are kept, nothing changes."""
    return average.swapped_in() if average else contextlib.nullcontext()

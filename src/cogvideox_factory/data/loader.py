"""Prepared clips → batches, with all random numbers that a training step needs.

Noise, timestep, caption dropout and the draw from the latent distribution come from a generator keyed by (seed,
epoch, clip). They are therefore the same for any batch size, number of processes and number of workers, and a run
that is resumed draws what it would have drawn. Rejected: one generator a process, whose state would have to be
saved, and whose numbers change with the number of processes.

Stratified timesteps are the exception that is asked for: they depend on which clips share an optimizer step, though
still not on how that step is cut into batches and shared out.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from cogvideox_factory.config import RunError
from cogvideox_factory.data.sampler import Position, Sampler
from cogvideox_factory.data.store import DamagedEntry, Entry, PreparedSet
from cogvideox_factory.stopping import SIGNALS


@dataclass(frozen=True)
class Batch:
    """Clips of one bucket and their random numbers. B clips, F latent frames, C channels, L tokens."""

    raw_latents: torch.Tensor  # (B, F, C, H, W) fp32, in the VAE's own scale, drawn from its distribution
    noise: torch.Tensor  # (B, F', C, H, W) fp32; F' is F rounded up to what the model takes
    timestep_quantiles: torch.Tensor  # (B,) fp32 in [0, 1]: which part of the timesteps' distribution
    prompt_embeds: torch.Tensor  # (B, L, D)
    share: float  # of the clips of this optimizer step, over all ranks
    raw_image_latents: torch.Tensor | None = None  # (B, C, H, W) fp32, image-to-video only: the noised first frame

    @property
    def num_clips(self) -> int:
        return self.raw_latents.shape[0]

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change) -> Batch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{k: change(v) for k, v in values.items() if isinstance(v, torch.Tensor)})


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in one optimizer step."""

    position: Position
    batches: list[Batch]  # a micro-batch each
    num_clips: int  # over all ranks

    def pin_memory(self) -> StepBatches:
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


FIXED = -1  # stands for the seed where numbers must be the same in every run; no seed of a user is negative


def clip_generator(seed: int, epoch: int, key: str) -> torch.Generator:
    """The source of all random numbers of a clip in an epoch."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(seed, epoch, key)[:8], "big", signed=True))


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()


class PreparedClips(Dataset):
    """(position, step of the sampler) → the tensors of this rank."""

    def __init__(
        self,
        prepared: PreparedSet,
        entries: Sequence[Entry],
        empty_prompt_file: str,
        *,
        seed: int,
        caption_dropout: float,
        latent_frame_multiple: int = 1,
        noised_image_dropout: float | None = None,
        rank: int = 0,
        stratified_timesteps: bool = False,
    ):
        """`noised_image_dropout` is the share of clips that are shown without their image; None: there are none."""
        self.prepared = prepared
        self.entries = entries
        self.empty_prompt_file = empty_prompt_file
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.latent_frame_multiple = latent_frame_multiple
        self.noised_image_dropout = noised_image_dropout
        self.rank = rank
        self.stratified_timesteps = stratified_timesteps

    def __getitem__(self, item: tuple[Position, list[list[list[int]]]]) -> StepBatches:
        position, step = item
        num_clips = sum(len(share) for micro_batch in step for share in micro_batch)
        batches = [self._batch(shares, position.epoch, num_clips) for shares in step]
        if self.stratified_timesteps:
            strata = self._strata(step, position.epoch)
            batches = [
                replace(batch, timestep_quantiles=_within_strata(batch.timestep_quantiles, strata, self._shown(shares)))
                for batch, shares in zip(batches, step, strict=True)
            ]
        return StepBatches(position, batches, num_clips)

    def _batch(self, shares: Sequence[Sequence[int]], epoch: int, num_clips: int) -> Batch:
        entries = [self.entries[index] for index in self._shown(shares)]
        clips = [self._clip(entry, clip_generator(self.seed, epoch, entry.key)) for entry in entries]
        return _stacked(clips, share=len(shares[self.rank]) / num_clips)

    def fixed_batch(self, indices: Sequence[int], draw: int, num_draws: int) -> Batch:
        """Clips of one bucket as an evaluation sees them: draw `draw` of `num_draws` gives them the same numbers
        whenever and in whatever batch, and the middle of that part of the timesteps."""
        entries = [self.entries[index] for index in indices]
        clips = [self._clip(entry, clip_generator(FIXED, draw, entry.key)) for entry in entries]
        batch = _stacked(clips, share=1.0)
        return replace(batch, timestep_quantiles=torch.full_like(batch.timestep_quantiles, (draw + 0.5) / num_draws))

    def _shown(self, shares: Sequence[Sequence[int]]) -> Sequence[int]:
        """Clips of this rank; one without a share takes part with weight zero, as the others wait for its gradients."""
        return shares[self.rank] or shares[0][:1]

    def _strata(self, step: Sequence[Sequence[Sequence[int]]], epoch: int) -> dict[int, int]:
        """Which of the equal parts of [0, 1) each clip of an optimizer step gets: each another, drawn at random.

        A clip's place is that of its hash among the hashes of the step, whatever batch and rank it came in.
        """
        indices = {index for micro_batch in step for share in micro_batch for index in share}
        in_order = sorted(indices, key=lambda index: _digest(self.seed, epoch, self.entries[index].key, "stratum"))
        return {index: stratum for stratum, index in enumerate(in_order)}

    def _clip(self, entry: Entry, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Tensors of a clip, by their names in Batch."""
        quantile, caption_draw, view_draw = torch.rand(3, generator=generator)
        view = int(view_draw * len(entry.files["latents"]))
        latents = self.prepared.read_tensors(entry.files["latents"][view])  # (C, F, H, W) each
        raw_latents = _draw(latents["mean"].transpose(0, 1), latents["logvar"].transpose(0, 1), generator)
        frames = raw_latents.shape[0] + -raw_latents.shape[0] % self.latent_frame_multiple
        noise = torch.randn((frames, *raw_latents.shape[1:]), generator=generator)
        prompt_file = self.empty_prompt_file if caption_draw < self.caption_dropout else entry.files["prompt"][0]
        clip = {
            "raw_latents": raw_latents,
            "noise": noise,
            "timestep_quantiles": quantile,
            "prompt_embeds": self.prepared.read_tensors(prompt_file)["prompt_embeds"],
        }
        if self.noised_image_dropout is not None:  # drawn last: the rest is the same for text-to-video
            dropout_draw, image_draw = torch.rand(2, generator=generator)
            images = self.prepared.read_tensors(entry.files["images"][view])  # (draws, C, H, W) each
            number = int(image_draw * len(images["mean"]))
            image = _draw(images["mean"][number], images["logvar"][number], generator)
            clip["raw_image_latents"] = image * (dropout_draw >= self.noised_image_dropout)
        return clip


def _draw(mean: torch.Tensor, logvar: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A sample, in fp32, of the VAE's latent distribution."""
    return mean.float() + torch.exp(0.5 * logvar.float()) * torch.randn(mean.shape, generator=generator)


def _stacked(clips: Sequence[Mapping[str, torch.Tensor]], share: float) -> Batch:
    tensors = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
    return Batch(**tensors, share=share)


def _within_strata(uniform: torch.Tensor, strata: Mapping[int, int], indices: Sequence[int]) -> torch.Tensor:
    """Numbers in [0, 1), (B,), moved into the strata of their clips."""
    stratum = torch.tensor([strata[index] for index in indices], dtype=torch.float64)
    return ((stratum + uniform) / len(strata)).to(uniform.dtype)


class _Answers(Dataset):
    """Steps, or what keeps them from being read: as a value, which says the same from a worker process too."""

    def __init__(self, clips: PreparedClips):
        self.clips = clips

    def __getitem__(self, item: tuple[Position, list[list[list[int]]]]) -> StepBatches | DamagedEntry:
        try:
            return self.clips[item]
        except DamagedEntry as error:
            return error


def load_steps(
    clips: PreparedClips,
    sampler: Sampler,
    position: Position,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[StepBatches | RunError]:
    """Optimizer steps without end, from a position on, read ahead by worker processes where there are any.

    Ends with a RunError instead of a step, where a file is damaged or a worker process has died.
    """
    loader: DataLoader = DataLoader(
        _Answers(clips),
        batch_size=None,
        sampler=_Positions(sampler, position),
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # for the workers' seeds, which nothing needs: torch's own generator is left alone
    )
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    steps = iter(loader)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        # DataLoader's own handler raises when a worker dies, wherever the program is: amid an update, or a save.
        signal.signal(signal.SIGCHLD, handler)
    return _until_failure(steps)


def _until_failure(steps: Iterator[StepBatches | RunError]) -> Iterator[StepBatches | RunError]:
    while True:
        try:
            answer = next(steps)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            answer = RunError(
                f"a process that reads prepared clips has died ({str(error).splitlines()[0]}): the machine may be "
                "short of memory; lower --dataloader_num_workers, 0 reads in the program itself"
            )
        yield answer
        if isinstance(answer, RunError):
            return


def _ignore_signals(worker: int) -> None:
    """They may reach all processes; the program decides what to finish. It ends its workers itself, by SIGTERM."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


class _Positions:
    """The sampler's steps as DataLoader wants them: an object that can be iterated."""

    def __init__(self, sampler: Sampler, position: Position):
        self.sampler, self.position = sampler, position

    def __iter__(self) -> Iterator[tuple[Position, list[list[list[int]]]]]:
        return self.sampler.from_position(self.position)


def _as_it_is(item: Any) -> Any:
    return item

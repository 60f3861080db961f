"""Random numbers of a step belong to (seed, epoch, clip), whoever draws them and however the step is cut."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.config import RunError
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.loader import Batch, PreparedClips, StepBatches, clip_generator, load_steps
from cogvideox_factory.data.sampler import Position, Sampler
from cogvideox_factory.data.store import DamagedEntry, Entry, PreparedSet

LONG, SHORT = Bucket(17, 16, 24), Bucket(9, 16, 24)
BUCKETS = [LONG, SHORT, LONG, LONG, SHORT, LONG, LONG]
CHANNELS, HEIGHT, WIDTH = 2, 2, 3
IMAGE_DRAWS = 3
TENSORS = ("raw_latents", "noise", "timestep_quantiles", "prompt_embeds")
EMPTY = PreparedSet.prompt_file("empty")
SEED = 7

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedSet, list[Entry]]:
    """Seven clips of two buckets (5 and 3 latent frames), of made-up latents and captions."""
    prepared = PreparedSet(tmp_path_factory.mktemp("small"))
    generator = torch.Generator().manual_seed(0)
    prepared.write_tensors(EMPTY, {"prompt_embeds": torch.full((4, 6), -1.0)})
    entries = []
    for index, bucket in enumerate(BUCKETS):
        shape = (CHANNELS, (bucket.frames - 1) // 4 + 1, HEIGHT, WIDTH)
        latents_file, prompt_file = prepared.latents_file(f"clip{index}"), prepared.prompt_file(f"caption{index}")
        files = {"latents": (latents_file,), "prompt": (prompt_file,)}
        latents = {name: torch.randn(shape, generator=generator) for name in ("mean", "logvar")}
        prepared.write_tensors(files["latents"][0], latents)
        images = {name: torch.randn(IMAGE_DRAWS, CHANNELS, HEIGHT, WIDTH, generator=generator) for name in latents}
        files["images"] = (prepared.image_file(f"clip{index}"),)
        prepared.write_tensors(files["images"][0], images)
        prepared.write_tensors(files["prompt"][0], {"prompt_embeds": torch.full((4, 6), float(index))})
        entries.append(Entry(f"{index}.mp4", f"caption {index}", bucket, files, key=f"key{index}"))
    return prepared, entries


def clips_of(small_set: tuple[PreparedSet, list[Entry]], **options) -> PreparedClips:
    prepared, entries = small_set
    return PreparedClips(prepared, entries, EMPTY, **{"seed": SEED, "caption_dropout": 0.5, **options})


def one_by_one(clips: PreparedClips, epoch: int = 0) -> dict[int, Tensors]:
    """Each clip's tensors in an epoch, each drawn in a step of its own."""
    batches = {index: clips[Position(epoch), [[[index]]]].batches[0] for index in range(len(clips.entries))}
    return {index: {name: getattr(batch, name)[0] for name in TENSORS} for index, batch in batches.items()}


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    for name in TENSORS:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    ("batch_size", "num_ranks", "num_micro_batches"), [(1, 1, 1), (3, 1, 1), (2, 2, 1), (1, 3, 2), (2, 1, 4), (4, 4, 2)]
)
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_clips_random_numbers_do_not_depend_on_how_the_step_is_cut(
    small_set, batch_size: int, num_ranks: int, num_micro_batches: int, epoch: int
) -> None:
    expected = one_by_one(clips_of(small_set), epoch)
    sampler = Sampler(BUCKETS, batch_size, num_ranks, num_micro_batches, SEED)
    seen = []
    for rank in range(num_ranks):
        clips = clips_of(small_set, rank=rank)
        for step in sampler.epoch(epoch):
            batches = clips[Position(epoch), step].batches
            assert len(batches) == len(step)
            for shares, batch in zip(step, batches, strict=True):
                for place, index in enumerate(shares[rank]):
                    assert_equal({name: getattr(batch, name)[place] for name in TENSORS}, expected[index])
                    seen.append(index)
    assert sorted(seen) == list(range(len(BUCKETS)))  # each clip once, over all ranks


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_and_a_resumed_position_give_what_an_uninterrupted_iteration_gives(small_set, num_workers: int) -> None:
    clips, sampler = clips_of(small_set), Sampler(BUCKETS, 2, num_micro_batches=2, seed=SEED)
    assert sampler.steps_per_epoch() == 2
    steps = [(Position(epoch, number), step) for epoch in range(3) for number, step in enumerate(sampler.epoch(epoch))]
    for start in (0, 1, 2, 5):
        loaded = itertools.islice(load_steps(clips, sampler, steps[start][0], num_workers=num_workers), 6 - start)
        for ours, (position, step) in zip(loaded, steps[start:], strict=True):
            assert isinstance(ours, StepBatches) and ours.position == position
            assert ours.num_clips == sum(len(share) for shares in step for share in shares)
            theirs = [clips[position, [shares]].batches[0] for shares in step]
            for mine, reference in zip(ours.batches, theirs, strict=True):
                assert_equal(vars(mine), vars(reference))


def test_every_clip_epoch_and_seed_has_random_numbers_of_its_own(small_set) -> None:
    """Trap: a random state equal on every rank; here ranks differ because their clips do."""
    drawn = [
        tensors
        for seed in (7, 8, 70)
        for epoch in (0, 1, 10)
        for tensors in one_by_one(clips_of(small_set, seed=seed), epoch).values()
    ]
    assert len(drawn) == 3 * 3 * len(BUCKETS)
    for one, other in itertools.combinations(drawn, 2):
        assert one["timestep_quantiles"] != other["timestep_quantiles"]
        frames = min(len(one["noise"]), len(other["noise"]))
        assert (one["noise"][:frames] - other["noise"][:frames]).abs().mean() > 0.5
    again = one_by_one(clips_of(small_set), 10)
    for index, tensors in one_by_one(clips_of(small_set), 10).items():
        assert_equal(tensors, again[index])


def test_ranks_of_one_step_draw_different_numbers(small_set) -> None:
    """Trap, in one step: neither the noise nor the timestep of two ranks is alike."""
    step = [[[0], [2], [3]]]
    torch.manual_seed(0)  # the global state, equal on every rank, has no part in it
    drawn = [clips_of(small_set, rank=rank)[Position(), step].batches[0] for rank in range(3)]
    for one, other in itertools.combinations(drawn, 2):
        assert one.timestep_quantiles != other.timestep_quantiles
        assert (one.noise - other.noise).abs().mean() > 0.5


def test_a_generator_is_keyed_by_all_of_seed_epoch_and_clip() -> None:
    keys = [(1, 1, "a"), (1, 1, "b"), (1, 2, "a"), (2, 1, "a"), (1, 11, "a"), (11, 1, "a"), (-1, 1, "a")]
    numbers = {tuple(torch.rand(2, generator=clip_generator(*key)).tolist()) for key in keys}
    assert len(numbers) == len(keys)
    state = torch.get_rng_state()
    assert torch.equal(*(torch.rand(2, generator=clip_generator(1, 1, "a")) for _ in range(2)))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator stays out of it


@pytest.mark.parametrize("multiple", [1, 2])
def test_latents_are_drawn_from_the_stored_distribution_as_diffusers_draws(small_set, multiple: int) -> None:
    clips = clips_of(small_set, latent_frame_multiple=multiple)
    for index, tensors in one_by_one(clips, epoch=4).items():
        stored = clips.prepared.read_tensors(clips.entries[index].files["latents"][0])
        distribution = DiagonalGaussianDistribution(torch.cat([stored["mean"], stored["logvar"]])[None])
        generator = clip_generator(SEED, 4, f"key{index}")
        quantile, *_ = torch.rand(3, generator=generator)
        frames = stored["mean"].shape[1]
        eps = torch.randn((frames, CHANNELS, HEIGHT, WIDTH), generator=generator)
        sample = distribution.mean + distribution.std * eps.transpose(0, 1)
        noise = torch.randn((frames + frames % multiple, CHANNELS, HEIGHT, WIDTH), generator=generator)
        assert torch.equal(tensors["raw_latents"], sample[0].transpose(0, 1))
        assert torch.equal(tensors["noise"], noise) and torch.equal(tensors["timestep_quantiles"], quantile)


def test_the_draws_are_standard_normal_uniform_and_independent(small_set) -> None:
    clips = clips_of(small_set)
    stored = [clips.prepared.read_tensors(entry.files["latents"][0]) for entry in clips.entries]
    eps, noise, quantiles = [], [], []
    for epoch in range(60):
        for index, tensors in one_by_one(clips, epoch).items():
            mean, std = (
                part.transpose(0, 1) for part in (stored[index]["mean"], stored[index]["logvar"].mul(0.5).exp())
            )
            eps.append(((tensors["raw_latents"] - mean) / std).flatten())
            noise.append(tensors["noise"].flatten())
            quantiles.append(tensors["timestep_quantiles"])
    pair = torch.stack([torch.cat(eps), torch.cat(noise)])
    bound = 5 / pair.shape[1] ** 0.5
    assert pair.mean(1).abs().max() < bound and (pair.var(1) - 1).abs().max() < 2 * bound
    assert pair.prod(0).mean().abs() < bound
    uniform = torch.stack(quantiles)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert (uniform.mean() - 0.5).abs() < 5 * (1 / 12) ** 0.5 / len(uniform) ** 0.5
    counts = torch.histc(uniform, bins=4, min=0, max=1)
    assert (counts - len(uniform) / 4).abs().max() < 5 * (len(uniform) * 3 / 16) ** 0.5


def test_half_precision_on_disk_is_drawn_in_fp32(tmp_path: Path) -> None:
    prepared = PreparedSet(tmp_path)
    mean, logvar = (torch.randn(2, 3, 2, 2).bfloat16() for _ in range(2))
    prepared.write_tensors("latents/a.safetensors", {"mean": mean, "logvar": logvar})
    prepared.write_tensors(EMPTY, {"prompt_embeds": torch.ones(4, 6, dtype=torch.bfloat16)})
    entry = Entry("a.mp4", "a", SHORT, {"latents": ("latents/a.safetensors",), "prompt": (EMPTY,)}, "a")
    batch = PreparedClips(prepared, [entry], EMPTY, seed=1, caption_dropout=0.0)[Position(), [[[0]]]].batches[0]
    generator = clip_generator(1, 0, "a")
    torch.rand(3, generator=generator)
    eps = torch.randn((3, 2, 2, 2), generator=generator)
    expected = mean.float().transpose(0, 1) + torch.exp(0.5 * logvar.float().transpose(0, 1)) * eps
    assert torch.equal(batch.raw_latents[0], expected) and batch.noise.dtype == torch.float32
    assert batch.raw_latents.dtype == torch.float32 and batch.prompt_embeds.dtype == torch.bfloat16


def test_caption_dropout_of_0_and_1_are_exact(small_set) -> None:
    for epoch in range(50):
        for index, tensors in one_by_one(clips_of(small_set, caption_dropout=0.0), epoch).items():
            assert torch.equal(tensors["prompt_embeds"], torch.full((4, 6), float(index)))
        for tensors in one_by_one(clips_of(small_set, caption_dropout=1.0), epoch).values():
            assert torch.equal(tensors["prompt_embeds"], torch.full((4, 6), -1.0))


@pytest.mark.parametrize("chance", [0.1, 0.5])
def test_caption_dropout_takes_its_share_and_changes_no_other_number(small_set, chance: float) -> None:
    some, none = clips_of(small_set, caption_dropout=chance), clips_of(small_set, caption_dropout=0.0)
    dropped, early = [], []
    for epoch in range(150):
        kept = one_by_one(none, epoch)
        for index, tensors in one_by_one(some, epoch).items():
            dropped.append(bool((tensors["prompt_embeds"] == -1).all()))
            early.append(bool(tensors["timestep_quantiles"] < 0.5))
            if not dropped[-1]:
                assert_equal(tensors, kept[index])
            else:
                assert_equal({**tensors, "prompt_embeds": kept[index]["prompt_embeds"]}, kept[index])
    trials = len(dropped)
    deviation = (trials * chance * (1 - chance)) ** 0.5
    assert abs(sum(dropped) - trials * chance) < 4 * deviation
    both = sum(one and other for one, other in zip(dropped, early, strict=True))
    assert abs(both - trials * chance / 2) < 4 * deviation  # no part of the timesteps loses its captions


@pytest.mark.parametrize(("batch_size", "num_ranks", "num_micro_batches"), [(2, 1, 2), (1, 3, 2), (2, 2, 3), (3, 4, 2)])
def test_shares_of_a_step_sum_to_one_and_weigh_every_clip_alike(
    small_set, batch_size: int, num_ranks: int, num_micro_batches: int
) -> None:
    sampler = Sampler(BUCKETS, batch_size, num_ranks, num_micro_batches, SEED)
    for number, step in enumerate(sampler.epoch(0)):
        per_rank = [clips_of(small_set, rank=rank)[Position(0, number), step] for rank in range(num_ranks)]
        num_clips = sum(len(share) for shares in step for share in shares)
        assert {item.num_clips for item in per_rank} == {num_clips}
        for rank, item in enumerate(per_rank):
            assert [batch.share for batch in item.batches] == pytest.approx(
                [len(shares[rank]) / num_clips for shares in step]
            )
        assert sum(batch.share for item in per_rank for batch in item.batches) == pytest.approx(1.0)


def test_a_rank_without_clips_takes_part_with_weight_zero(small_set) -> None:
    step = [[[0, 2], []], [[1], [4]]]
    first, second = (clips_of(small_set, rank=rank)[Position(), step] for rank in range(2))
    idle, busy = second.batches
    assert idle.share == 0.0 and busy.share == 0.25
    assert idle.num_clips == 1  # one is enough to take part
    assert idle.raw_latents.shape[1:] == first.batches[0].raw_latents.shape[1:]
    assert sum(batch.share for item in (first, second) for batch in item.batches) == 1.0


def test_noise_has_as_many_frames_as_a_patch_of_several_needs(small_set) -> None:
    for multiple, long, short in ((1, 5, 3), (2, 6, 4), (3, 6, 3), (4, 8, 4)):
        batch = clips_of(small_set, latent_frame_multiple=multiple)[Position(), [[[0]], [[1]]]].batches
        assert [item.noise.shape for item in batch] == [(1, n, CHANNELS, HEIGHT, WIDTH) for n in (long, short)]
        assert [item.raw_latents.shape[1] for item in batch] == [5, 3]


def test_a_batch_moves_as_a_whole(small_set) -> None:
    batch = clips_of(small_set, noised_image_dropout=0.0)[Position(), [[[0, 2]]]].batches[0]
    moved = batch.to(torch.device("meta"))
    assert {getattr(moved, name).device.type for name in (*TENSORS, "raw_image_latents")} == {"meta"}
    assert moved.share == batch.share == 1.0 and moved.num_clips == batch.num_clips == 2
    assert {item.name for item in fields(Batch)} == {*TENSORS, "raw_image_latents", "share"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_tensor_file_that_is_gone_is_named(small_set, num_workers: int) -> None:
    prepared, entries = small_set
    gone = [replace(entry, files={**entry.files, "latents": ("latents/gone.safetensors",)}) for entry in entries]
    clips = PreparedClips(prepared, gone, EMPTY, seed=SEED, caption_dropout=0.0)
    steps = load_steps(clips, Sampler(BUCKETS, 2), Position(), num_workers=num_workers)
    (answer,) = steps  # and nothing after it
    assert isinstance(answer, DamagedEntry)
    assert re.search(r"latents/gone\.safetensors cannot be read", str(answer)) and "Traceback" not in str(answer)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_as_a_value_and_nothing_hangs(small_set) -> None:
    """Trap: DataLoader raises it from a signal handler, wherever the program is at that moment."""
    handler = signal.getsignal(signal.SIGCHLD)
    steps = load_steps(clips_of(small_set), Sampler(BUCKETS, 2), Position(), num_workers=1)
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert isinstance(next(steps), StepBatches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    *read_before, answer = steps
    assert all(isinstance(step, StepBatches) for step in read_before)
    assert isinstance(answer, RunError) and "has died" in str(answer) and "--dataloader_num_workers" in str(answer)


# --- the image of image-to-video ---


def images_of(small_set: tuple[PreparedSet, list[Entry]], epoch: int, **options) -> list[torch.Tensor]:
    clips = clips_of(small_set, **{"noised_image_dropout": 0.0, **options})
    batches = [clips[Position(epoch), [[[index]]]].batches[0] for index in range(len(BUCKETS))]
    assert all(batch.raw_image_latents is not None for batch in batches)
    return [batch.raw_image_latents[0] for batch in batches if batch.raw_image_latents is not None]


def test_text_to_video_reads_no_images_and_has_the_numbers_of_image_to_video(small_set) -> None:
    without = clips_of(small_set)[Position(2), [[[0, 2]]]].batches[0]
    with_images = clips_of(small_set, noised_image_dropout=0.5)[Position(2), [[[0, 2]]]].batches[0]
    assert without.raw_image_latents is None
    assert with_images.raw_image_latents is not None
    for name in TENSORS:
        assert torch.equal(getattr(without, name), getattr(with_images, name))


def test_the_image_is_a_draw_from_one_of_its_stored_distributions(small_set) -> None:
    """Whatever the number that is drawn, it comes from one of the stored noised first frames: (x - mean) / std is
    the same standard normal noise nowhere else."""
    prepared, entries = small_set
    chosen = set()
    for epoch in range(40):
        for index, image in enumerate(images_of(small_set, epoch)):
            stored = prepared.read_tensors(entries[index].files["images"][0])
            generator = clip_generator(SEED, epoch, entries[index].key)
            torch.rand(3, generator=generator)
            frames = (BUCKETS[index].frames - 1) // 4 + 1
            for _ in range(2):  # the draw of the video's latents, and its noise
                torch.randn((frames, CHANNELS, HEIGHT, WIDTH), generator=generator)
            torch.rand(2, generator=generator)
            noise = torch.randn((CHANNELS, HEIGHT, WIDTH), generator=generator)
            expected = stored["mean"] + torch.exp(0.5 * stored["logvar"]) * noise
            (number,) = [number for number in range(IMAGE_DRAWS) if torch.equal(expected[number], image)]
            chosen.add(number)
    assert chosen == set(range(IMAGE_DRAWS))


def test_images_are_left_out_by_clip_and_as_often_as_asked_for(small_set) -> None:
    epochs = 200
    shown = torch.tensor(
        [
            [bool(image.any()) for image in images_of(small_set, epoch, noised_image_dropout=0.25)]
            for epoch in range(epochs)
        ]
    ).float()
    assert abs(1 - shown.mean() - 0.25) < 4 * (0.25 * 0.75 / shown.numel()) ** 0.5
    assert 0 < shown.mean(1).min() < shown.mean(1).max() <= 1  # not all clips of a step together
    assert not any(image.any() for image in images_of(small_set, 0, noised_image_dropout=1.0))


def test_of_several_views_the_image_is_that_of_the_video(small_set, tmp_path: Path) -> None:
    prepared = PreparedSet(tmp_path)
    prepared.write_tensors(EMPTY, {"prompt_embeds": torch.zeros(4, 6)})
    names = [f"view{number}" for number in range(3)]
    for number, name in enumerate(names):
        certain = {"logvar": torch.full((CHANNELS, 3, HEIGHT, WIDTH), -100.0)}
        prepared.write_tensors(
            prepared.latents_file(name), {"mean": torch.full((2, 3, 2, 3), float(number)), **certain}
        )
        certain = {"logvar": torch.full((1, CHANNELS, HEIGHT, WIDTH), -100.0)}
        prepared.write_tensors(prepared.image_file(name), {"mean": torch.full((1, 2, 2, 3), float(number)), **certain})
    files = {
        "latents": tuple(prepared.latents_file(name) for name in names),
        "images": tuple(prepared.image_file(name) for name in names),
        "prompt": (EMPTY,),
    }
    clips = clips_of((prepared, [Entry("a.mp4", "a", SHORT, files, key="a")]), noised_image_dropout=0.0)
    seen = set()
    for epoch in range(20):
        batch = clips[Position(epoch), [[[0]]]].batches[0]
        assert batch.raw_image_latents is not None
        assert batch.raw_latents.mean().round() == batch.raw_image_latents.mean().round()
        seen.add(int(batch.raw_latents.mean().round()))
    assert seen == {0, 1, 2}


# --- stratified timesteps ---


class InMemory(PreparedSet):
    """A set whose every file holds the smallest tensors, so that many steps can be drawn."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))

    def read_tensors(self, file: str) -> Tensors:
        one = torch.zeros(1, 1, 1, 1)
        return {"mean": one, "logvar": one, "prompt_embeds": torch.zeros(1, 1)}


def stratified(num_clips: int, seed: int, rank: int = 0, stratified_timesteps: bool = True) -> PreparedClips:
    files = {"latents": ("latents/a",), "prompt": ("prompts/a",)}
    entries = [Entry(f"{index}.mp4", "a", SHORT, files, key=f"key{index}") for index in range(num_clips)]
    return PreparedClips(
        InMemory(),
        entries,
        EMPTY,
        seed=seed,
        caption_dropout=0.0,
        rank=rank,
        stratified_timesteps=stratified_timesteps,
    )


def quantiles_of(num_clips: int, seed: int, epoch: int, step: list[list[list[int]]]) -> dict[int, float]:
    """Quantile of each clip of a step, over all ranks."""
    found: dict[int, float] = {}
    for rank in range(len(step[0])):
        batches = stratified(num_clips, seed, rank)[Position(epoch), step].batches
        for shares, batch in zip(step, batches, strict=True):
            found |= dict(zip(shares[rank], batch.timestep_quantiles.tolist(), strict=False))
    return found


@st.composite
def cut_steps(draw: st.DrawFn) -> tuple[int, list[list[list[int]]]]:
    """Some of twenty clips in any order, cut into micro-batches and shares of ranks, of which some are empty."""
    chosen = draw(st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True))
    num_ranks, size = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    micro_batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return 20, [[batch[rank::num_ranks] for rank in range(num_ranks)] for batch in micro_batches]


@settings(deadline=None, max_examples=60)
@given(cut=cut_steps(), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 100))
def test_stratified_timesteps_hit_every_stratum_once_however_the_step_is_cut(
    cut: tuple[int, list[list[list[int]]]], seed: int, epoch: int
) -> None:
    num_clips, step = cut
    quantiles = quantiles_of(num_clips, seed, epoch, step)
    count = len(quantiles)
    for stratum, quantile in enumerate(sorted(quantiles.values())):
        assert stratum - 1e-5 <= quantile * count <= stratum + 1 + 1e-5
    whole = quantiles_of(num_clips, seed, epoch, [[sorted(quantiles)]])  # one rank, one batch, another order
    assert whole == quantiles


def test_stratified_quantiles_of_a_clip_are_uniform_over_the_epochs() -> None:
    """Which stratum a clip gets, and where in it, is drawn anew each epoch, one independent of the other."""
    clips, step, count = stratified(5, seed=3), [[[0, 1, 2, 3, 4]]], 3000
    drawn = torch.stack([clips[Position(epoch), step].batches[0].timestep_quantiles for epoch in range(count)])
    for quantiles in drawn.double().T:
        counts = torch.histc(quantiles, bins=20, min=0, max=1)
        chi_squared = ((counts - count / 20) ** 2 / (count / 20)).sum()
        assert chi_squared < 50  # 19 ± 6.2 where all twentieths are alike
    means = drawn.mean(1)
    assert means.std() < 0.05 < 0.1 < torch.rand(count, 5).mean(1).std()  # a step's mean varies less: what it is for


def test_without_stratification_every_number_is_what_it_was(small_set) -> None:
    """The default draws just what a clip's generator gives; stratification changes the quantile alone."""
    step = [[[0, 2, 3]], [[1]]]
    plain, spread = (clips_of(small_set, stratified_timesteps=choice)[Position(2), step] for choice in (False, True))
    for shares, one, other in zip(step, plain.batches, spread.batches, strict=True):
        expected = [torch.rand(3, generator=clip_generator(SEED, 2, f"key{index}"))[0] for index in shares[0]]
        assert torch.equal(one.timestep_quantiles, torch.stack(expected))
        assert not torch.equal(one.timestep_quantiles, other.timestep_quantiles)
        assert_equal({**vars(other), "timestep_quantiles": one.timestep_quantiles}, vars(one))


def test_a_fixed_draw_is_the_same_in_any_run_and_batch_and_has_all_that_training_has(small_set) -> None:
    """What an evaluation sees: noise of the clip and the draw alone, the middle of each part of the timesteps."""
    ours = clips_of(small_set, caption_dropout=0.0, noised_image_dropout=0.0)
    theirs = clips_of(small_set, caption_dropout=0.0, noised_image_dropout=0.0, seed=99, rank=3)
    trained = ours[Position(0), [[[0, 2]]]].batches[0]
    noises = []
    for draw in range(4):
        batch, other = ours.fixed_batch([0, 2], draw, 4), theirs.fixed_batch([3, 2, 0], draw, 4)
        assert batch.timestep_quantiles.tolist() == [draw / 4 + 0.125] * 2
        assert batch.raw_image_latents is not None and other.raw_image_latents is not None
        for name in (*TENSORS, "raw_image_latents"):
            assert getattr(batch, name).shape == getattr(trained, name).shape
            assert torch.equal(getattr(batch, name)[0], getattr(other, name)[2])
        assert batch.raw_image_latents.abs().sum((1, 2, 3)).min() > 0  # none is left out
        assert not torch.equal(batch.noise, trained.noise)
        noises.append(batch.noise)
    assert all(not torch.equal(one, two) for one, two in itertools.combinations(noises, 2))

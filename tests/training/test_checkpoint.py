"""Checkpoints against an optimizer that was never saved, and against failures in the middle of saving."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogvideox_factory.config import LoraOptions, OptimizerOptions, UserError
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.manifest import MANIFEST, damage_of
from cogvideox_factory.data.sampler import Layout, Position, Sampler
from cogvideox_factory.model.adapters import attach_lora, trainable_parameters
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.training import checkpoint, checkpoint_folders
from cogvideox_factory.training.checkpoint import Snapshot, TrainState, load_checkpoint, read_state
from cogvideox_factory.training.checkpoint_folders import find_checkpoint, new_checkpoint
from cogvideox_factory.training.fp32_steps import held_weights
from cogvideox_factory.training.optimizers import OPTIMIZERS, build_optimizer
from cogvideox_factory.training.resuming import resumed_position
from cogvideox_factory.training.tensor_tree import flatten


def build(seed: int = 0, **lora: Any):
    """A one-layer transformer with a LoRA, and AdamW over it."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=1, sample_height=8, sample_width=8, sample_frames=9, max_text_seq_length=4,
    )  # fmt: skip
    transformer.requires_grad_(False)
    attach_lora(transformer, LoraOptions(**{"rank": 2, "lora_alpha": 4, **lora}), seed)
    parameters = list(trainable_parameters(transformer).values())
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:3], "lr": 1e-2}, {"params": parameters[3:], "lr": 3e-3}],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    return transformer, optimizer


def save_checkpoint(run: Path, state: TrainState, transformer, optimizer, keep: int | None) -> Path:
    return Snapshot.take(state, transformer, optimizer).write(run, keep)


def steps(transformer, optimizer, numbers: range) -> None:
    """Optimizer steps with gradients that depend on nothing but the step's number."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in trainable_parameters(transformer).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)  # as a schedule would
        optimizer.step()


def weights(transformer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainable_parameters(transformer).items()}


def assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    """Equality to the bit of nested values; JSON knows no tuples."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, value in enumerate(theirs):
            assert_equal(ours[index], value, f"{where}/{index}")
    else:
        assert ours == theirs and type(ours) is type(theirs), where


def low_bit_flags(state_format: str) -> dict[str, bool]:
    """Options that ask for a way to keep the state, as the table of optimizers names it."""
    precision, _, library = state_format.partition(" ")
    return {f"use_{precision.replace('-', '')}": True, "use_torchao": library == "torchao"} if state_format else {}


ROWS = [*(key for key in OPTIMIZERS if "torchao" not in key[1] or key[0] == "adamw")]  # torchao's adam keeps the same


def row_options(name: Any, state_format: str, weights_as: str) -> OptimizerOptions:
    return OptimizerOptions(
        optimizer=name,
        learning_rate=1.0 if name == "prodigy" else 1e-2,
        weight_decay=0.1,
        prodigy_use_bias_correction=True,
        trainable_dtype="bf16" if weights_as == "rounded" else "fp32",
        use_cpu_offload_optimizer=weights_as == "on the host",
        **low_bit_flags(state_format),  # type: ignore[arg-type]
    )


def start(options: OptimizerOptions, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    """A transformer whose adapter is large enough for low-bit states (128 × 32), and its optimizer."""
    transformer, _ = build(seed, rank=128)
    parameters = trainable_parameters(transformer)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(dtype)
    return transformer, build_optimizer(parameters.values(), options, 1)


def take_steps(transformer, optimizer, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in trainable_parameters(transformer).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def check_goes_on(run: Path, options: OptimizerOptions, dtype: torch.dtype) -> Path:
    """Two steps, saved, loaded into another optimizer, and two more equal four to the bit; the checkpoint."""
    whole, parts, fresh = (start(options, dtype, seed) for seed in (0, 0, 9))
    take_steps(*whole, range(4))
    take_steps(*parts, range(2))
    folder = save_checkpoint(run, TrainState(step=2), *parts, keep=None)
    take_steps(*fresh, range(7, 8))  # what it held before counts for nothing
    load_checkpoint(folder, *fresh)
    torch.manual_seed(1)
    take_steps(*fresh, range(2, 4))
    assert_equal(weights(fresh[0]), weights(whole[0]))
    ours, theirs = (held_weights(optimizer, trainable_parameters(model)) for model, optimizer in (fresh, whole))
    assert_equal(ours, theirs)
    (ours, our_rest), (theirs, their_rest) = (flatten(optimizer.state_dict(), "") for _, optimizer in (fresh, whole))
    assert_equal(ours, theirs)
    assert our_rest == their_rest
    low_bit = {torch.uint8, torch.float8_e4m3fn} & {value.dtype for value in ours.values()}
    assert bool(low_bit) == (options.use_8bit or options.use_4bit or options.use_fp8)
    return folder


@pytest.mark.parametrize("weights_as", ["fp32", "masters", "rounded", "on the host"])
@pytest.mark.parametrize(("name", "state_format"), ROWS)
def test_every_optimizer_goes_on_as_if_never_saved(
    tmp_path: Path, name: str, state_format: str, weights_as: str
) -> None:
    """torchao's are not compiled here: their states are the same, and compiling takes half a minute each."""
    dtype = torch.bfloat16 if weights_as in ("masters", "rounded") else torch.float32
    with torch.compiler.set_stance("force_eager"):
        folder = check_goes_on(tmp_path, row_options(name, state_format, weights_as), dtype)
    saved = load_file(folder / "trainable.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16 if weights_as == "rounded" else torch.float32}
    if weights_as == "masters":
        assert any(not torch.equal(value, value.bfloat16().float()) for value in saved.values())


@pytest.mark.slow
@pytest.mark.parametrize("state_format", ["8-bit torchao", "4-bit torchao", "fp8 torchao"])
def test_compiled_optimizers_go_on_as_if_never_saved(tmp_path: Path, state_format: str) -> None:
    check_goes_on(tmp_path, row_options("adamw", state_format, "fp32"), torch.float32)


def save_steps(run: Path, *numbers: int, keep: int | None = None) -> tuple[Any, Any]:
    transformer, optimizer = build()
    steps(transformer, optimizer, range(1))
    for number in numbers:
        save_checkpoint(run, TrainState(step=number), transformer, optimizer, keep)
    return transformer, optimizer


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


def test_what_is_loaded_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    transformer, optimizer = build()
    steps(transformer, optimizer, range(3))
    state = TrainState(
        step=3,
        position=Position(2, 5, ((Layout(4, 2, 3, drop_last=True), 7), (Layout(1), 1))),
        samples_seen=11,
        identity={"--rank": 2},
        optimizer_options={"learning_rate": 1 / 3},
        order={"seed": 7, "clips": "a"},
        layout=Layout(2, 3, 4, drop_last=True),
        scaler={"scale": 65536.0, "_growth_tracker": 3},
    )
    folder = save_checkpoint(tmp_path, state, transformer, optimizer, None)
    assert folder == tmp_path / "checkpoints/step-00000003"
    other_transformer, other_optimizer = build(seed=99)
    before = weights(other_transformer)
    assert not all(torch.equal(before[name], value) for name, value in weights(transformer).items())
    assert load_checkpoint(folder, other_transformer, other_optimizer) == state
    assert_equal(weights(other_transformer), weights(transformer))
    assert_equal(other_optimizer.state_dict(), optimizer.state_dict())
    assert optimizer.state_dict()["state"][0]["exp_avg"].abs().sum() > 0
    for numbers in (range(3, 4), range(4, 5)):
        steps(transformer, optimizer, numbers)
        steps(other_transformer, other_optimizer, numbers)
        assert_equal(weights(other_transformer), weights(transformer))
        assert_equal(other_optimizer.state_dict(), optimizer.state_dict())


def test_the_number_of_processes_may_change_between_runs(tmp_path: Path) -> None:
    """One process, then two, then one: every clip once an epoch, in which each run ends and is read from disk."""
    buckets = [Bucket(17, 64, 96)] * 11 + [Bucket(9, 64, 96)] * 6
    transformer, optimizer = save_steps(tmp_path)
    state = TrainState(layout=Layout(1), order={"seed": 3})
    drawn: list[int] = []
    for num_ranks in (1, 2, 1):
        sampler = Sampler(buckets, 1, num_ranks=num_ranks, num_micro_batches=2, seed=3)
        fresh = TrainState(layout=sampler.layout, order=state.order)
        position = resumed_position(state, fresh, sampler)
        for at, step in itertools.islice(sampler.from_position(position), 1 if num_ranks == 2 else 2):
            assert all(len(micro_batch) == num_ranks for micro_batch in step)
            drawn += [index for micro_batch in step for share in micro_batch for index in share]
            position = sampler.after(at)
        fresh.step, fresh.position = state.step + 1, position
        state = read_state(save_checkpoint(tmp_path, fresh, transformer, optimizer, None))
        assert state == fresh
    assert len(set(drawn)) == len(drawn) == 4 + 4 + 4
    rest = sampler.epoch(state.position.epoch, state.position.earlier)[state.position.step :]
    drawn += [index for step in rest for micro_batch in step for share in micro_batch for index in share]
    assert state.position.epoch == 0 and sorted(drawn) == list(range(17))


def test_saving_changes_nothing_in_memory(tmp_path: Path) -> None:
    saved, never_saved = build(), build()
    for number in range(4):
        for transformer, optimizer in (saved, never_saved):
            steps(transformer, optimizer, range(number, number + 1))
        save_checkpoint(tmp_path, TrainState(step=number), saved[0], saved[1], keep=1)
    assert_equal(weights(saved[0]), weights(never_saved[0]))
    assert_equal(saved[1].state_dict(), never_saved[1].state_dict())


def test_an_optimizer_that_made_no_step_yet_is_saved_too(tmp_path: Path) -> None:
    transformer, optimizer = build()
    folder = save_checkpoint(tmp_path, TrainState(), transformer, optimizer, None)
    other_transformer, other_optimizer = build(seed=1)
    assert load_checkpoint(folder, other_transformer, other_optimizer) == TrainState()
    steps(transformer, optimizer, range(2))
    steps(other_transformer, other_optimizer, range(2))
    assert_equal(weights(other_transformer), weights(transformer))


def test_the_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    transformer, optimizer = save_steps(tmp_path)
    torch.manual_seed(5)
    torch.rand(3)
    state = torch.get_rng_state()
    expected = torch.randn(8)
    torch.set_rng_state(state)
    folder = save_checkpoint(tmp_path, TrainState(step=1), transformer, optimizer, None)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    load_checkpoint(folder, transformer, optimizer)
    assert torch.equal(torch.randn(8), expected)


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    files = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    folder = "checkpoints/step-00000001"
    tensors = ("optimizer.safetensors", "pytorch_lora_weights.safetensors", "trainable.safetensors")
    expected = sorted(("manifest.json", "state.json", *tensors))
    assert sorted(files) == [f"{folder}/{name}" for name in expected]
    for name, path in files.items():
        if path.suffix == ".safetensors":
            assert load_file(path), name
        else:
            json.loads(path.read_text())


def test_the_lora_beside_it_is_the_trained_one(tmp_path: Path) -> None:
    transformer, _ = save_steps(tmp_path, 1)
    (folder,) = list_checkpoints(tmp_path)
    lora, metadata = CogVideoXPipeline.lora_state_dict(
        folder, weight_name="pytorch_lora_weights.safetensors", return_lora_metadata=True
    )
    trained = {  # alpha / rank is 2, and is in the weights
        name.replace(".default", ""): value * (2 if "lora_B" in name else 1)
        for name, value in weights(transformer).items()
    }
    assert_equal(
        {name.removeprefix("transformer."): lora[name] for name in sorted(lora)}, dict(sorted(trained.items()))
    )
    assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == 2


@pytest.mark.parametrize(
    ("keep", "left"),
    [(None, [1, 2, 3, 10]), (1, [10]), (2, [3, 10]), (9, [1, 2, 3, 10])],
)
def test_the_oldest_beyond_the_limit_are_removed(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    save_steps(tmp_path, 1, 2, 3, 10, keep=keep)
    assert names(tmp_path) == [f"step-{number:08}" for number in left]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names(tmp_path)


def test_the_oldest_is_there_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, optimizer = save_steps(tmp_path, 1, 2, keep=2)
    seen = []
    replace = os.replace

    def look_then_rename(path: Path, new: Path) -> None:
        if Path(path).name == "step-00000001":
            seen.append(names(tmp_path))
            assert damage_of(tmp_path / "checkpoints/step-00000003") is None
        replace(path, new)

    monkeypatch.setattr(checkpoint_folders.os, "replace", look_then_rename)
    save_checkpoint(tmp_path, TrainState(step=3), transformer, optimizer, keep=2)
    assert seen == [["step-00000001", "step-00000002", "step-00000003"]]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("failing", ["write_durably", "write_tensors", "write_lora"])
def test_a_full_disk_leaves_older_checkpoints_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    transformer, optimizer = save_steps(tmp_path, 1, 2, keep=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, TrainState(step=3), transformer, optimizer, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert not list((tmp_path / "checkpoints").glob("step-*3"))
    assert all(path.read_bytes() == content for path, content in before.items())
    latest = find_checkpoint(tmp_path, "latest")
    assert latest is not None and load_checkpoint(latest, *build()).step == 2
    save_checkpoint(tmp_path, TrainState(step=3), transformer, optimizer, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names(tmp_path)


def test_what_a_killed_run_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    transformer, optimizer = save_steps(tmp_path, 1)
    whole = tmp_path / "checkpoints/step-00000001"
    shutil.copytree(whole, tmp_path / "checkpoints/.step-00000002.part")
    shutil.copytree(whole, tmp_path / "checkpoints/step-00000003", ignore=lambda *_: {"manifest.json"})
    assert names(tmp_path) == ["step-00000001"] and find_checkpoint(tmp_path, "latest") == whole
    steps(transformer, optimizer, range(1, 2))
    folder = save_checkpoint(tmp_path, TrainState(step=2), transformer, optimizer, None)
    assert load_checkpoint(folder, *build()).step == 2
    assert not (tmp_path / "checkpoints/.step-00000002.part").exists()


def test_a_step_saved_again_replaces_the_one_of_an_earlier_course(tmp_path: Path) -> None:
    transformer, optimizer = save_steps(tmp_path, 1, 2)
    (tmp_path / "checkpoints/step-00000002/left-over").touch()
    steps(transformer, optimizer, range(5, 7))
    folder = save_checkpoint(tmp_path, TrainState(step=2), transformer, optimizer, 5)
    assert not (folder / "left-over").exists()
    assert_equal(load_file(folder / "trainable.safetensors"), weights(transformer))


def test_the_new_checkpoint_of_a_run_resumed_from_an_older_one_survives_its_own_limit(tmp_path: Path) -> None:
    transformer, optimizer = save_steps(tmp_path, 2, 4, 6)
    folder = save_checkpoint(tmp_path, TrainState(step=3), transformer, optimizer, keep=2)  # went on from step 2
    assert folder.is_dir() and folder in list_checkpoints(tmp_path)


def test_latest_is_the_newest_of_the_course_that_goes_on_not_of_one_that_was_left(tmp_path: Path) -> None:
    transformer, optimizer = save_steps(tmp_path, 2, 4, 6)
    folder = save_checkpoint(tmp_path, TrainState(step=3), transformer, optimizer, keep=None)  # went on from step 2
    assert find_checkpoint(tmp_path, "latest") == folder


def test_a_checkpoint_is_found_as_latest_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path / "run", 9, 10)
    first, second = (tmp_path / "run/checkpoints" / name for name in ("step-00000009", "step-00000010"))
    assert find_checkpoint(tmp_path / "run", "latest") == second
    assert find_checkpoint(tmp_path / "run", "step-00000009") == first
    assert find_checkpoint(tmp_path / "run", "checkpoints/step-00000009") == first
    assert find_checkpoint(tmp_path / "another-run", str(first)) == first
    monkeypatch.chdir(tmp_path)
    found = find_checkpoint(tmp_path / "another-run", "run/checkpoints/step-00000009")
    assert found is not None and found.resolve() == first.resolve()


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") is None
    with pytest.raises(UserError, match=r"step-00000007: no such checkpoint.* has none"):
        find_checkpoint(tmp_path, "step-00000007")
    save_steps(tmp_path, 1, 2)
    with pytest.raises(UserError, match=r"step-00000007: no such checkpoint.* step-00000001, step-00000002 .*latest"):
        find_checkpoint(tmp_path, "step-00000007")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize("name", ["optimizer.safetensors", "manifest.json"])
def test_latest_is_the_newest_that_is_whole_and_the_damaged_one_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, name: str
) -> None:
    transformer, optimizer = save_steps(tmp_path, 1, 2, 3, 4)
    first, second, third, fourth = list_checkpoints(tmp_path)
    flip(first / "state.json")  # older than what is taken: nobody looks
    damage(third / name)
    flip(fourth / "trainable.safetensors")
    with caplog.at_level("WARNING"):
        assert find_checkpoint(tmp_path, "latest") == second
    assert f"{fourth} is damaged: trainable.safetensors" in caplog.text
    assert f"{third} is damaged: {name}" in caplog.text and f"going on from {second.name}" in caplog.text
    kept = ["damaged-step-00000003", "damaged-step-00000004", "step-00000001", "step-00000002"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept
    assert (tmp_path / "checkpoints/damaged-step-00000004/trainable.safetensors").exists()
    caplog.clear()
    save_checkpoint(tmp_path, TrainState(step=5), transformer, optimizer, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000005"] and not caplog.text


def test_a_changed_byte_in_any_region_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (folder,) = list_checkpoints(tmp_path)
    chance = random.Random(0)
    files = sorted(folder.iterdir())
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        header = chance.sample(range(min(256, len(content))), 16)
        regions = [min(at + chance.randrange(4096), len(content) - 1) for at in range(0, len(content), 4096)]
        for offset in (*header, *regions):
            damaged = bytearray(content)
            damaged[offset] ^= chance.randrange(1, 256)
            path.write_bytes(damaged)
            assert path.name in str(damage_of(folder)), (path.name, offset)
            with pytest.raises(UserError, match=path.name):
                find_checkpoint(tmp_path, folder.name)
        path.write_bytes(content)
    assert find_checkpoint(tmp_path, folder.name) == folder


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_nothing_is_renamed(tmp_path: Path) -> None:
    """To begin again would be to lose the run's work without a word."""
    save_steps(tmp_path, 1, 2)
    for folder in list_checkpoints(tmp_path):
        flip(folder / "state.json")
    with pytest.raises(UserError, match=r"every checkpoint .*step-00000002: state.json .* step-00000001: state"):
        find_checkpoint(tmp_path, "latest")
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_checkpoints_of_an_earlier_version_are_not_called_damaged(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for folder in list_checkpoints(tmp_path):
        (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="of an earlier version"):
        find_checkpoint(tmp_path, "latest")


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused_naming_the_file(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    first, second = list_checkpoints(tmp_path)
    flip(second / "optimizer.safetensors")
    for choice in (second.name, str(second)):
        with pytest.raises(UserError, match=r"step-00000002 is damaged: optimizer.safetensors .*`latest`"):
            find_checkpoint(tmp_path, choice)
    (first / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"step-00000001 is damaged: manifest.json is missing"):
        find_checkpoint(tmp_path, first.name)
    assert first.is_dir() and second.is_dir()


def test_a_checkpoint_that_may_not_be_read_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2)

    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path / "state.json"))

    monkeypatch.setattr(checkpoint_folders, "damage_of", forbidden)
    with pytest.raises(UserError, match=r"step-00000002 may not be read.*state.json"):
        find_checkpoint(tmp_path, "latest")
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_one_that_was_cut_short_does_not_count_to_the_limit_and_is_not_removed(tmp_path: Path) -> None:
    """The last good one stays, however many newer ones are seen at a glance to be none."""
    transformer, optimizer = save_steps(tmp_path, 1, 2, 3)
    for folder in list_checkpoints(tmp_path)[1:]:
        cut(folder / "optimizer.safetensors")
    save_checkpoint(tmp_path, TrainState(step=4), transformer, optimizer, keep=2)
    assert names(tmp_path) == [f"step-{number:08}" for number in (1, 2, 3, 4)]
    save_checkpoint(tmp_path, TrainState(step=5), transformer, optimizer, keep=2)
    assert names(tmp_path) == [f"step-{number:08}" for number in (2, 3, 4, 5)]


def test_other_engines_write_what_they_like_into_a_new_checkpoint(tmp_path: Path) -> None:
    with new_checkpoint(tmp_path, 7, keep=1) as part:
        (part / "engine/states").mkdir(parents=True)
        (part / "engine/states/rank-0.pt").write_bytes(b"0" * 100)
        assert list_checkpoints(tmp_path) == []
    (folder,) = list_checkpoints(tmp_path)
    assert damage_of(folder) is None
    flip(folder / "engine/states/rank-0.pt")
    assert "engine/states/rank-0.pt" in str(damage_of(folder))


def test_what_is_replaced_is_there_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any rename, the run has the old checkpoint of this step, the new one, or the one before."""
    transformer, optimizer = save_steps(tmp_path, 1, 2)

    class Killed(BaseException):
        pass

    replace = os.replace
    for allowed in range(4):
        count = 0

        def rename_or_die(path: Path, new: Path) -> None:
            nonlocal count
            if Path(path).parent.name == "checkpoints":
                count += 1
                if count > allowed:  # noqa: B023
                    raise Killed
            replace(path, new)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(checkpoint_folders.os, "replace", rename_or_die)
            save_checkpoint(tmp_path, TrainState(step=2), transformer, optimizer, keep=2)
        assert "step-00000001" in names(tmp_path)
        assert all(damage_of(folder) is None for folder in list_checkpoints(tmp_path))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_bytes(b"\0" * 64)])
@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_a_users_error_naming_the_folder(tmp_path: Path, name: str, damage) -> None:
    save_steps(tmp_path, 1)
    (folder,) = list_checkpoints(tmp_path)
    damage(folder / name)
    transformer, optimizer = build(seed=3)
    before = weights(transformer)
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, transformer, optimizer)
    assert str(folder) in str(caught.value)
    assert_equal(weights(transformer), before)


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_state_without_its_fields_is_a_users_error_naming_the_folder(tmp_path: Path, content: str) -> None:
    save_steps(tmp_path, 1)
    (folder,) = list_checkpoints(tmp_path)
    (folder / "state.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, *build())
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (
            {"target_modules": ("to_q", "to_k")},
            {"target_modules": ("to_q",)},
            "other --target_modules.*to_k.*trains it",
        ),
        ({"target_modules": ("to_q",)}, {"target_modules": ("to_q", "to_v")}, "--target_modules.*to_v.*not in"),
        ({"rank": 2}, {"rank": 3}, r"another --rank.*\[2, 32\].*\[3, 32\]"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing(
    tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any], message: str
) -> None:
    transformer, optimizer = build(**saved)
    steps(transformer, optimizer, range(1))
    folder = save_checkpoint(tmp_path, TrainState(step=1), transformer, optimizer, None)
    other_transformer, other_optimizer = build(seed=3, **loaded)
    before = weights(other_transformer)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(folder, other_transformer, other_optimizer)
    assert str(folder) in str(caught.value)
    assert_equal(weights(other_transformer), before)

"""What happens to files and processes while a run goes on: a message, an exit code, and the last good state."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.training import validation
from cogvideox_factory.training.metrics import MetricsLog, read_metrics

Cli = Callable[..., tuple[int, str, str]]
SEED = 42  # the default
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def flags(tiny_model: Path) -> tuple[str, ...]:
    model = ("--pretrained_model_name_or_path", str(tiny_model), "--report_to", "none", "--rank", "4")
    return (*model, "--learning_rate", "1e-2", "--train_batch_size", "2", "--max_train_steps", "6")


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Let something happen right after a step was logged."""

    def arrange(step: int, happen: Callable[[], object]) -> None:
        write = MetricsLog.write

        def write_then(log: MetricsLog, **values: Any) -> None:
            write(log, **values)
            if values["step"] == step:
                happen()

        monkeypatch.setattr(MetricsLog, "write", write_then)

    return arrange


def file_of_step(entries: list[Entry], step: int) -> str:
    """A file that optimizer step `step` reads, and none before it."""
    number = Sampler([entry.bucket for entry in entries], 2, seed=SEED).epoch(0)[step - 1][0][0][0]
    return entries[number].files["latents"][0]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_prepared_file_damaged_or_deleted_during_the_run_is_named_and_the_steps_before_are_saved(
    cli: Cli, flags: tuple[str, ...], tmp_path: Path, prepared_folder: Path, entries: list[Entry], after_step, damage
) -> None:
    data, run = shutil.copytree(prepared_folder, tmp_path / "set"), tmp_path / "run"
    file = data / file_of_step(entries, 5)
    after_step(2, lambda: damage(file))
    code, _, messages = cli("train", *flags, "--data_root", data, "--load_tensors", "--output_dir", run)
    assert code == 1 and "Traceback" not in messages
    assert f"{file} cannot be read" in messages and "prepare again, which makes it anew" in messages
    assert "All 4 steps before are saved" in messages and "--resume_from_checkpoint latest" in messages
    assert [path.name for path in list_checkpoints(run)] == ["step-00000004"]


@pytest.mark.slow
def test_after_the_remedy_that_is_told_the_run_ends_as_if_nothing_had_happened(
    cli: Cli, flags: tuple[str, ...], tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips that are deleted during the run make no difference: what is trained on was prepared before."""
    root = shutil.copytree(clips, tmp_path / "clips", symlinks=False)
    assert cli("train", *flags, "--data_root", root, "--output_dir", tmp_path / "whole")[0] == 0
    run, write = tmp_path / "run", MetricsLog.write

    def write_then_damage(log: MetricsLog, **values: Any) -> None:
        write(log, **values)
        if values["step"] == 2:
            entries = PreparedSet(run / "prepared").read_index()
            flip(run / "prepared" / file_of_step(entries, 5))

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_then_damage)
        code, _, messages = cli("train", *flags, "--data_root", root, "--output_dir", run)
    assert code == 1 and "prepare again" in messages
    code, _, messages = cli("train", "--config", run / "config.yaml", "--resume_from_checkpoint", "latest")
    assert code == 0, messages
    assert "1 encoded, 11 reused" in messages
    whole, parts = load_file(tmp_path / "whole" / LORA), load_file(run / LORA)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [[line["loss"] for line in read_metrics(path / "metrics.jsonl")] for path in (tmp_path / "whole", run)]
    assert losses[0] == losses[1]


def test_a_clip_deleted_during_the_run_is_not_missed(
    cli: Cli, flags: tuple[str, ...], tmp_path: Path, few_clips: Path, after_step
) -> None:
    root = shutil.copytree(few_clips, tmp_path / "clips", symlinks=False)
    after_step(1, lambda: shutil.rmtree(root / "videos"))
    code, _, messages = cli(
        *("train", *flags, "--max_train_steps", "2", "--data_root", root, "--output_dir", tmp_path / "run")
    )
    assert code == 0 and not (root / "videos").exists(), messages


def test_metrics_that_cannot_be_written_name_their_file(
    cli: Cli, flags: tuple[str, ...], tmp_path: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = tmp_path / "run", MetricsLog.write

    def fill_then_write(log: MetricsLog, **values: Any) -> None:
        if values["step"] == 3:
            monkeypatch.setattr(log, "_file", open("/dev/full", "w", encoding="utf-8"))  # noqa: SIM115
        write(log, **values)

    monkeypatch.setattr(MetricsLog, "write", fill_then_write)
    data = ("--data_root", prepared_folder, "--load_tensors", "--output_dir", run, "--checkpointing_steps", "2")
    code, _, messages = cli("train", *flags, *data)
    assert code == 1 and "Traceback" not in messages
    assert "No space left on device: /dev/full; make room there, then start again" in messages
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002"]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """A limit of the size of files in its place: what is written is cut off in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_the_file_and_nothing_unfinished_is_left(
    cli: Cli, flags: tuple[str, ...], tmp_path: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, run = validation.write_video, tmp_path / "run"

    def write_to_full_disk(*arguments: Any) -> None:
        with full_disk():
            write(*arguments)

    monkeypatch.setattr(validation, "write_video", write_to_full_disk)
    data = ("--data_root", prepared_folder, "--load_tensors", "--output_dir", run, "--max_train_steps", "1")
    code, _, messages = cli("train", *flags, *data, "--validation_prompt", "a", "--num_inference_steps", "1")
    assert code == 1 and "Traceback" not in messages
    assert os.strerror(errno.EFBIG) in messages and str(run / "validation/step-00000000") in messages
    assert "make room there" in messages and not list(run.rglob("*.part")) and not list(run.rglob("*.mp4"))

"""A run that is killed and started again, against one that was never stopped; and many ranks that choose together."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogvideox_factory.config import UserError
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.training import resuming
from cogvideox_factory.training.metrics import MetricsLog, read_metrics

Cli = Callable[..., tuple[int, str, str]]
VOLATILE = ("step_seconds", "data_seconds", "memory_gib")
# Ten clips are trained on, two a step in two batches: step 2 is in the middle of an epoch of five steps.
FLAGS = ["--max_train_steps", "5", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "2"]
FLAGS += ("--ema_decay", "0.7", "--validation_fraction", "0.2", "--lr_scheduler", "cosine")
METHODS = {"lora": ("--rank", "4", "--learning_rate", "1e-2"), "sft": ("--training_type", "sft")}


class Killed(BaseException):
    """As SIGKILL: nothing is saved or tidied up for it."""


def killed_after(patch: pytest.MonkeyPatch, run: Path, step: int) -> None:
    """The process ends after a step was logged, in the middle of writing the next line."""
    write = MetricsLog.write

    def write_then_die(log: MetricsLog, **values: Any) -> None:
        write(log, **values)
        if values["step"] == step and "lr" in values:  # not a line of the held-out loss
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(values)[:25])
            raise Killed

    patch.setattr(MetricsLog, "write", write_then_die)


def seed_all(seed: int) -> None:
    """The generators that a process has anyway. torch's is saved; on the others nothing in a training depends."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def assert_same_run(ours: Path, theirs: Path, num_steps: int) -> None:
    """Equality to the bit of all that a run leaves but for what the clock and the memory say."""
    checkpoint = f"checkpoints/step-{num_steps:08}"
    exported = [path for path in theirs.rglob("*.safetensors") if path.parent in (theirs, theirs / "transformer")]
    saved = sorted((theirs / checkpoint).glob("*.safetensors"))
    files = [path.relative_to(theirs) for path in (*exported, *saved)]
    assert len(exported) == 1 and len(saved) >= 3
    for file in files:
        tensors, expected = load_file(ours / file), load_file(theirs / file)
        assert tensors.keys() == expected.keys(), file
        assert all(torch.equal(tensors[name], value) for name, value in expected.items()), file
    assert (ours / checkpoint / "state.json").read_bytes() == (theirs / checkpoint / "state.json").read_bytes()
    assert (ours / "validation_loss.jsonl").read_bytes() == (theirs / "validation_loss.jsonl").read_bytes()
    lines, expected_lines = (
        [
            {key: value for key, value in line.items() if key not in VOLATILE}
            for line in read_metrics(run / "metrics.jsonl")
        ]
        for run in (ours, theirs)
    )
    assert lines == expected_lines and [line["step"] for line in lines] == list(range(1, num_steps + 1))
    assert len((ours / "metrics.jsonl").read_text().splitlines()) == num_steps


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_that_is_killed_and_whose_newest_checkpoint_is_damaged_equals_one_never_stopped(
    cli: Cli, tmp_path: Path, tiny_model: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def train(run: Path, *flags: str) -> tuple[int, str]:
        code, _, messages = cli(
            *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder),
            *("--load_tensors", "--report_to", "none", "--output_dir", run, "--train_batch_size", "1"),
            *(*FLAGS, *METHODS[method], *flags),
        )
        return code, messages

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    seed_all(3)
    assert train(whole)[0] == 0
    seed_all(3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, parts, 5)
        train(parts)
    assert [path.name for path in list_checkpoints(parts)] == ["step-00000002", "step-00000004"]
    flip(parts / "checkpoints/step-00000004/optimizer.safetensors")
    seed_all(4)
    code, messages = train(parts, "--resume_from_checkpoint", "latest")
    assert code == 0, messages
    assert "step-00000004 is damaged: optimizer.safetensors" in messages and "going on from step-00000002" in messages
    assert_same_run(parts, whole, 5)


@pytest.mark.parametrize("error", [UserError("none is whole"), OSError(5, "Input/output error"), None])
def test_all_ranks_get_what_the_first_one_finds(tmp_path: Path, monkeypatch, error: Exception | None) -> None:
    sent: list[Any] = []
    looks: list[int] = []

    def find(run: Path, choice: str) -> Path:
        looks.append(1)
        if error:
            raise error
        return run / "checkpoints/step-00000002"

    def broadcast(objects: list[Any]) -> list[Any]:
        """The first rank is asked first."""
        sent.append(objects)
        return sent[0]

    monkeypatch.setattr(resuming, "find_checkpoint", find)
    monkeypatch.setattr(resuming, "broadcast_object_list", broadcast)
    for rank in range(3):
        accelerator: Any = SimpleNamespace(is_main_process=rank == 0)
        if error:
            with pytest.raises(type(error)) as caught:
                resuming._chosen(tmp_path, "latest", accelerator)
            assert caught.value is error
        else:
            assert resuming._chosen(tmp_path, "latest", accelerator) == tmp_path / "checkpoints/step-00000002"
    assert len(looks) == 1 and len(sent) == 3

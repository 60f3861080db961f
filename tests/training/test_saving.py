"""Checkpoints that are written beside a training, against those that it waits for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from cogvideox_factory.config import LoraOptions, RunError
from cogvideox_factory.model.adapters import (
    AVERAGE_FILE,
    LORA_FILE,
    TRAINED_FILE,
    attach_lora,
    trainable_parameters,
)
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.training import checkpoint
from cogvideox_factory.training.checkpoint import OPTIMIZER_FILE, Snapshot, TrainState
from cogvideox_factory.training.ema import WeightAverage
from cogvideox_factory.training.saving import Saver


class Training(NamedTuple):
    transformer: Any
    optimizer: torch.optim.Optimizer
    average: WeightAverage


def build(*, has_lora: bool) -> Training:
    """A one-layer transformer of which a LoRA, or some of its own weights, have made a step."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=1, sample_height=8, sample_width=8, sample_frames=9, max_text_seq_length=4,
    ).requires_grad_(False)  # fmt: skip
    if has_lora:
        attach_lora(transformer, LoraOptions(rank=2, lora_alpha=4), 0)
    else:
        transformer.transformer_blocks[0].attn1.requires_grad_(True)
    trained = trainable_parameters(transformer)
    training = Training(transformer, torch.optim.AdamW(trained.values()), WeightAverage(trained, 0.5))
    for parameter in trained.values():
        parameter.grad = torch.randn_like(parameter)
    step(training)
    return training


@pytest.fixture
def training() -> Training:
    return build(has_lora=True)


def step(training: Training) -> None:
    training.optimizer.step()
    training.average.update(trainable_parameters(training.transformer))


class Gate:
    """Lets a file be written only once it is open, as a slow disk would."""

    def __init__(self, patch: pytest.MonkeyPatch, error: Exception | None = None):
        self._open = threading.Event()
        write = checkpoint.write_tensors

        def write_later(tensors, path: Path) -> str:
            assert self._open.wait(20)
            if error:
                raise error
            return write(tensors, path)

        patch.setattr(checkpoint, "write_tensors", write_later)

    def open(self) -> None:
        self._open.set()


def test_what_is_written_is_the_state_at_the_call_whatever_the_training_does_meanwhile(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    Snapshot.take(TrainState(step=3), *training).write(tmp_path / "waited", None)
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path / "beside", None, 0)
    state = TrainState(step=3)
    with saver:
        saver.save(state, *training)
        step(training)
        state.step = 4
        torch.rand(1)
        assert saver.saved_step == 0 and list_checkpoints(tmp_path / "beside") == [] and not saver.has_failed
        gate.open()
    saver.wait()
    assert saver.saved_step == 3
    (ours,), (theirs,) = (list_checkpoints(tmp_path / name) for name in ("beside", "waited"))
    for name in (TRAINED_FILE, AVERAGE_FILE, OPTIMIZER_FILE, "state.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    lora, expected = (load_file(folder / LORA_FILE) for folder in (ours, theirs))  # whose metadata has no order
    assert lora.keys() == expected.keys() and all(torch.equal(lora[name], value) for name, value in expected.items())


def test_the_next_one_waits_for_the_last(tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Saver(tmp_path, 1, 0) as saver:
        saver.save(TrainState(step=1), *training)
        threading.Timer(0.05, gate.open).start()
        saver.save(TrainState(step=2), *training)
        assert saver.saved_step >= 1
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_copies_are_as_large_as_is_said(training: Training) -> None:
    snapshot = Snapshot.take(TrainState(), *training)
    numbers = sum(parameter.numel() for parameter in trainable_parameters(training.transformer).values())
    counters = 4 * len(trainable_parameters(training.transformer)) + torch.get_rng_state().nbytes
    assert snapshot.num_bytes == 5 * 4 * numbers + counters  # weights, as others load them, average, and two states


def test_full_fine_tuning_waits_and_copies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "copied", lambda self: pytest.fail("copied"))
    training = build(has_lora=False)
    with Saver(tmp_path, None, 0) as saver:
        saver.save(TrainState(step=1), *training)
        assert saver.saved_step == 1


def test_outside_of_its_context_it_waits(tmp_path: Path, training: Training) -> None:
    saver = Saver(tmp_path, None, 1)
    saver.save(TrainState(step=2), *training)
    assert saver.saved_step == 2 and len(list_checkpoints(tmp_path)) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_failure_is_told_at_the_next_occasion_with_the_last_good_state(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with Saver(tmp_path, None, 7) as saver, monkeypatch.context() as patch:
        gate = Gate(patch, error)
        saver.save(TrainState(step=8), *training)
        assert not saver.has_failed
        gate.open()
        assert saver.last_good() == "checkpoint of step 7" and saver.has_failed
        with pytest.raises(RunError, match=r"step 8 could not be written.*No space left.*checkpoint of step 7"):
            saver.save(TrainState(step=9), *training)
    assert list_checkpoints(tmp_path) == [] and not saver.has_failed
    saver.save(TrainState(step=9), *training)
    assert saver.last_good() == "checkpoint of step 9"


def test_a_crash_waits_for_what_is_written_and_stays_the_error(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(monkeypatch)
    with pytest.raises(ZeroDivisionError), Saver(tmp_path, None, 0) as saver:
        saver.save(TrainState(step=1), *training)
        threading.Timer(0.05, gate.open).start()
        raise ZeroDivisionError
    assert saver.saved_step == 1 and len(list_checkpoints(tmp_path)) == 1
    Gate(monkeypatch, OSError(28, "No space left on device")).open()
    with pytest.raises(ZeroDivisionError), saver:
        saver.save(TrainState(step=2), *training)
        raise ZeroDivisionError
    assert "step 2 could not be written" in caplog.text


def test_ctrl_c_does_not_wait_for_it(tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, None, 0)
    with pytest.raises(KeyboardInterrupt), saver:
        saver.save(TrainState(step=1), *training)
        raise KeyboardInterrupt
    assert list_checkpoints(tmp_path) == [] and not saver.has_failed  # as it would be once the gate's patience ends
    gate.open()
    saver.wait()

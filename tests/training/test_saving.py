"""Checkpoints that are written beside a training, against those that it waits for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cogvideox_factory.config import RunError
from cogvideox_factory.data.manifest import MANIFEST
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.training import checkpoint
from cogvideox_factory.training.checkpoint import Snapshot, TrainState
from cogvideox_factory.training.ema import WeightAverage
from cogvideox_factory.training.saving import Saver


@pytest.fixture
def training() -> tuple[torch.nn.Module, torch.optim.Optimizer, WeightAverage]:
    model = torch.nn.Linear(50, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    average = WeightAverage(dict(model.named_parameters()), 0.5)
    model(torch.randn(3, 50)).sum().backward()
    optimizer.step()
    return model, optimizer, average


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage) -> None:
    optimizer.step()
    average.update(dict(model.named_parameters()))


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
    tmp_path: Path, training, monkeypatch: pytest.MonkeyPatch
) -> None:
    Snapshot.take(TrainState(step=3), *training).write(tmp_path / "waited", None)
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path / "beside", None, 0)
    state = TrainState(step=3)
    with saver:
        saver.save(state, *training)
        step(*training)
        state.step = 4
        torch.rand(1)
        assert saver.saved_step == 0 and list_checkpoints(tmp_path / "beside") == [] and not saver.has_failed
        gate.open()
    saver.wait()
    assert saver.saved_step == 3
    (ours,), (theirs,) = (list_checkpoints(tmp_path / name) for name in ("beside", "waited"))
    assert (ours / MANIFEST).read_bytes() == (theirs / MANIFEST).read_bytes()


def test_the_next_one_waits_for_the_one_before(tmp_path: Path, training, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Saver(tmp_path, 1, 0) as saver:
        saver.save(TrainState(step=1), *training)
        threading.Timer(0.05, gate.open).start()
        saver.save(TrainState(step=2), *training)
        assert saver.saved_step >= 1
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_large_states_are_written_while_the_training_waits_and_not_copied(
    tmp_path: Path, training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Snapshot, "copied", lambda self: pytest.fail("copied"))
    size = Snapshot.take(TrainState(), *training).num_bytes
    assert size > 4 * 4 * (50 * 40 + 40)  # weights, their average and two states, in fp32
    with Saver(tmp_path, None, 0, max_copies=size - 1) as saver:
        saver.save(TrainState(step=1), *training)
        assert saver.saved_step == 1
    outside = Saver(tmp_path, None, 1)
    outside.save(TrainState(step=2), *training)
    assert outside.saved_step == 2 and len(list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_failure_is_told_at_the_next_occasion_with_the_last_good_state(
    tmp_path: Path, training, monkeypatch: pytest.MonkeyPatch, error: Exception
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
    tmp_path: Path, training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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

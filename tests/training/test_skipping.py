"""Steps whose loss or gradient is no number, against a training in which they were not there."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_steps import steps_of

from cogvideox_factory.config import OptimizerOptions, Train
from cogvideox_factory.data.loader import StepBatches
from cogvideox_factory.data.sampler import Position, Sampler, Step
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.adapters import trainable_parameters
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.planning.phases import OneProcess
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.training import loop
from cogvideox_factory.training.fp32_steps import Fp32Steps
from cogvideox_factory.training.metrics import read_metrics
from cogvideox_factory.training.optimizers import build_optimizer
from cogvideox_factory.training.skipping import FILE, told

TrainOn = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")
SEED = 42  # the default


@pytest.fixture
def train(cli: Callable[..., tuple[int, str, str]], tiny_model: Path) -> TrainOn:
    def call(data: Path, run: Path, *flags: str | Path) -> tuple[int, str]:
        code, _, messages = cli(
            *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", data, "--load_tensors"),
            *("--output_dir", run, "--report_to", "none", "--rank", "4", "--learning_rate", "1e-2"),
            *("--train_batch_size", "2", *flags),
        )
        return code, messages

    return call


@pytest.fixture
def poisoned(tmp_path: Path, prepared: PreparedSet, entries: list[Entry]) -> tuple[Path, Entry, int]:
    """A set in which the latents of one clip are infinite, that clip, and the step of the first epoch that has it."""
    number, index = 2, Sampler([entry.bucket for entry in entries], 2, seed=SEED).epoch(0)[2][0][0][1]
    copy = PreparedSet(shutil.copytree(prepared.folder, tmp_path / "poisoned"))
    file = entries[index].files["latents"][0]
    tensors = copy.read_tensors(file)
    copy.write_tensors(file, {**tensors, "mean": torch.full_like(tensors["mean"], math.inf)})
    return copy.folder, entries[index], number


@pytest.mark.parametrize(
    "flags",
    [
        ("--ema_decay", "0.9"),
        pytest.param(("--optimizer_in_backward",), marks=pytest.mark.slow),
        pytest.param(("--optimizer_in_backward", "--max_grad_norm", "0"), marks=pytest.mark.slow),
        pytest.param(("--trainable_dtype", "bf16"), marks=pytest.mark.slow),
    ],
)
def test_a_skipped_step_changes_nothing_but_the_position(
    train: TrainOn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepared_folder: Path,
    poisoned: tuple[Path, Entry, int],
    flags: tuple[str, ...],
) -> None:
    folder, clip, bad = poisoned
    code, messages = train(folder, tmp_path / "run", "--max_train_steps", "5", *flags)
    assert code == 0, messages
    assert f"skipped    step {bad + 1}: its loss is nan (1 in a row, of at most 10); of: {clip.source}\n" in messages

    from_position = Sampler.from_position

    def without_the_step(sampler: Sampler, position: Position) -> Iterator[tuple[Position, Step]]:
        return (item for item in from_position(sampler, position) if item[0] != Position(0, bad))

    monkeypatch.setattr(Sampler, "from_position", without_the_step)
    assert train(prepared_folder, tmp_path / "without", "--max_train_steps", "4", *flags)[0] == 0
    ours, theirs = tmp_path / "run/checkpoints/step-00000005", tmp_path / "without/checkpoints/step-00000004"
    names = sorted(path.name for path in ours.glob("*.safetensors"))
    assert names == sorted(path.name for path in theirs.glob("*.safetensors")) and len(names) >= 3
    for name in names:
        saved, expected = load_file(ours / name), load_file(theirs / name)
        assert saved.keys() == expected.keys()
        differing = {key for key in saved if not torch.equal(saved[key], expected[key])}
        assert differing <= {"rng.torch"}, name  # nothing draws from it, and each run finds it where the last left it

    lines, expected_lines = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("run", "without"))
    json.loads(json.dumps(lines), parse_constant=pytest.fail)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    skipped_line = lines.pop(bad)
    assert skipped_line["skipped"] is True and skipped_line["loss"] is None
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected_lines]
    assert [line["samples_seen"] for line in lines] == [2, 4, 6, 8] and not any("skipped" in line for line in lines)
    (record,) = [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()]
    assert (record["step"], record["epoch"], record["loss"], record["clips"]) == (bad + 1, 0, "nan", [clip.source])
    assert not (tmp_path / "without" / FILE).exists()


def test_a_gradient_that_is_no_number_is_skipped_and_names_all_clips_of_the_step(
    train: TrainOn, tmp_path: Path, prepared_folder: Path, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip_gradients, calls = loop.clip_gradients, []

    def broken(accelerator: Any, optimizer: Any, parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            assert parameters[0].grad is not None
            parameters[0].grad.fill_(math.inf)
        return clip_gradients(accelerator, optimizer, parameters, limit)

    monkeypatch.setattr(loop, "clip_gradients", broken)
    code, messages = train(prepared_folder, tmp_path / "run", "--max_train_steps", "3")
    assert code == 0 and "skipped    step 2: its gradient's norm is inf" in messages
    step = Sampler([entry.bucket for entry in entries], 2, seed=SEED).epoch(0)[1]
    (record,) = [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()]
    assert record["clips"] == [entries[index].source for index in step[0][0]]
    assert [line["grad_norm"] is None for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [False, True, False]


def test_too_many_in_a_row_end_the_run_with_a_checkpoint_from_before(
    train: TrainOn, tmp_path: Path, prepared_folder: Path
) -> None:
    """Trap: weights that have gone astray are finite; saved while steps are skipped, they push out what was good."""
    flags = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "1", "--max_grad_norm", "0")
    code, messages = train(
        prepared_folder, tmp_path / "run", "--max_skipped_steps", "3", "--learning_rate", "1e30", *flags
    )
    assert code == 1 and "Traceback" not in messages
    assert "3 steps in a row are no numbers, the last of them of " in messages and ".mp4" in messages
    assert "the last good state is the checkpoint of step 1" in messages and "--learning_rate" in messages
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000001"]
    records = [json.loads(line)["step"] for line in (tmp_path / "run" / FILE).read_text().splitlines()]
    assert records == [2, 3, 4]
    # A resumed run repeats the steps, and each is told once.
    resumed = ("--resume_from_checkpoint", "latest", "--max_skipped_steps", "1", "--learning_rate", "1e-2")
    assert train(prepared_folder, tmp_path / "run", *resumed, *flags)[0] == 1
    records = [json.loads(line)["step"] for line in (tmp_path / "run" / FILE).read_text().splitlines()]
    assert records == [2]


def test_the_scaler_of_fp16_keeps_its_scale_and_is_ready_for_the_next_step(
    checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    """Infinite gradients are its own affair; a loss that is no number is not: its scale has no part in that."""

    class Scaled(OneProcess):
        def __init__(self) -> None:
            super().__init__(CPU)
            self.scaler: Any = torch.amp.GradScaler("cpu", init_scale=8.0)

        def backward(self, loss: torch.Tensor) -> None:
            self.scaler.scale(loss).backward()

        overflows = False

        def clip_grad_norm_(self, parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
            if self.overflows:
                assert parameters[0].grad is not None
                parameters[0].grad.fill_(math.inf)
            self.scaler.unscale_(raw)
            return torch.nn.utils.clip_grad_norm_(parameters, limit)

    class Stepping:
        def step(self) -> None:
            accelerator.scaler.step(raw)
            accelerator.scaler.update()

        def zero_grad(self) -> None:
            raw.zero_grad()

    options = Train(optimizer=OptimizerOptions(learning_rate=1e-2))
    transformer = loop.build_model(options, checkpoint, torch.float32, CPU)
    parameters = list(trainable_parameters(transformer).values())
    raw, accelerator = build_optimizer(parameters, options.optimizer, 2), Scaled()
    denoiser, scheduler = Denoiser(checkpoint, torch.float32), load_scheduler(checkpoint)
    good, bad = list(steps_of(prepared, entries, 2, 1))
    bad.batches[0].raw_latents[0, 0, 0, 0, 0] = math.nan

    def step(batches: Any) -> loop.StepResult:
        optimizer: Any = Stepping()
        return loop.optimizer_step(
            batches, accelerator, transformer, optimizer, denoiser, scheduler, parameters, options
        )

    assert not step(good).is_skipped
    before = [parameter.detach().clone() for parameter in parameters], accelerator.scaler.state_dict()
    assert step(bad).is_skipped
    assert all(map(torch.equal, parameters, before[0])) and accelerator.scaler.state_dict() == before[1]
    assert not step(good).is_skipped and not all(map(torch.equal, parameters, before[0]))

    # Gradients that overflow: it skips the step and halves the scale, by itself.
    accelerator.overflows = True
    after = [parameter.detach().clone() for parameter in parameters]
    result = step(good)
    assert not result.is_skipped and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert accelerator.scaler.get_scale() == 4.0 and all(map(torch.equal, parameters, after))


@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_within_the_backward_pass_is_withheld_before_it_begins(
    checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry], limit: float, accumulate: int
) -> None:
    options = Train(optimizer=OptimizerOptions(learning_rate=1e-2, max_grad_norm=limit))
    transformer = loop.build_model(options, checkpoint, torch.float32, CPU)
    parameters = list(trainable_parameters(transformer).values())
    optimizer = build_optimizer(parameters, options.optimizer, 2, in_backward=True)
    assert isinstance(optimizer, Fp32Steps)
    denoiser, scheduler, accelerator = Denoiser(checkpoint, torch.float32), load_scheduler(checkpoint), OneProcess(CPU)
    good, bad = list(steps_of(prepared, entries, 2, accumulate))
    bad.batches[-1].raw_latents[0, 0, 0, 0, 0] = math.nan

    def step(batches: StepBatches) -> loop.StepResult:
        return loop.optimizer_step(
            batches, accelerator, transformer, optimizer, denoiser, scheduler, parameters, options
        )

    def held() -> list[torch.Tensor]:
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*parameters, *states, torch.tensor(optimizer._num_steps))]

    assert not step(good).is_skipped
    before = held()
    result = step(bad)
    assert result.is_skipped and not math.isfinite(result.loss) and len(result.clip_losses) == accumulate
    assert all(map(torch.equal, held(), before))
    assert all(parameter.grad is None for parameter in parameters) and not optimizer._host_gradients
    if limit:  # the loss is a number, the gradient is not: seen in the first of the two passes, or before the step
        last = trainable_parameters(transformer)[max(trainable_parameters(transformer))]
        hook = last.register_hook(lambda gradient: gradient * math.inf)
        result = step(good)
        hook.remove()
        assert result.is_skipped and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
        assert all(map(torch.equal, held(), before))
    assert not step(good).is_skipped and not all(map(torch.equal, held(), before))


def test_many_clips_are_told_in_part() -> None:
    assert told(["a"]) == "a"
    assert told([*"abcdefg"]) == "a, b, c, d, e and 2 more"

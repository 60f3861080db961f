"""What `train` plans before it loads anything. Traces are stand-ins; that they are true is tested beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import Plan, Train, UserError, config_text
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.memory.tracker import PARTS, Moment
from cogvideox_factory.planning import before_training
from cogvideox_factory.planning.before_training import memory_of_card, phases_of, plan_training
from cogvideox_factory.planning.phases import HELD, Phase, largest_bucket
from cogvideox_factory.planning.texts import CONTEXT_GIB
from cogvideox_factory.planning.traces import NAMES

Cli = Callable[..., tuple[int, str, str]]
GIB = 2**30
SMALL = ("--rank", "4", "--max_train_steps", "1", "--load_tensors", "--report_to", "none")


class Traced:
    """A training of 3 GiB, or of 1 with checkpointed blocks; all else takes half a GiB."""

    num_blocks = 4

    def has_scaler(self, options: Plan) -> bool:
        return False

    asked: list[tuple[str, Plan]]

    def __init__(self, checkpoint: Any):
        Traced.asked = []

    def phase(self, name: str, options: Plan) -> Phase:
        Traced.asked.append((name, options))
        peak = GIB // 2
        if name == "training":
            peak = (1 if options.memory.gradient_checkpointing else 3) * GIB
        held = {HELD: self.moment(GIB // 4)} if name == "training" else {}
        return Phase(name, {**held, ("all", 0): self.moment(peak)})

    @staticmethod
    def moment(peak: int) -> Moment:
        return Moment({**dict.fromkeys(PARTS, 0), "weights": peak}, 0)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_training, "memory_of_card", lambda: None)
    monkeypatch.setattr(before_training, "Traces", Traced)


def train_options(model: Path, data: Path, *flags: str) -> Train:
    needed = ("--model_id", str(model), "--data_root", str(data), "--output_dir", "unused")
    return parse_command(Train, "train", (*needed, *SMALL, *flags))


def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    cli: Cli, tiny_model: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    paths = ("--model_id", tiny_model, "--data_root", prepared_folder, "--output_dir", tmp_path / "run")
    code, out, messages = cli("train", *paths, *SMALL, "--gpu_memory", "4", "--host_memory", "64")
    assert (code, out) == (2, "") and not (tmp_path / "run").exists()
    assert f"training {3 + CONTEXT_GIB:.2f} GiB of the GPU" in messages
    assert "The nearest that fits: add --feed_forward_chunks" not in messages
    assert "The nearest that fits: add --gradient_checkpointing;" in messages
    code, _, messages = cli("train", *paths, *SMALL, "--gpu_memory", "2", "--fit")
    assert code == 2 and not (tmp_path / "run").exists()
    assert "--gpu_memory 2" in messages and f"need a GPU of {1 + CONTEXT_GIB:.2f} GiB" in messages


def test_fit_trains_with_what_it_found_and_keeps_the_plan(
    cli: Cli, tiny_model: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    paths = ("--model_id", tiny_model, "--data_root", prepared_folder, "--output_dir", run)
    code, _, messages = cli("train", *paths, *SMALL, "--gpu_memory", "4", "--fit")
    assert code == 0, messages
    assert "--fit: the fastest settings found are --gradient_checkpointing" in messages
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["gradient_checkpointing"] is True and config["fit"] is False
    memory = json.loads((run / "memory.json").read_text())
    assert memory["planned"] == {"memory_before_training": 0.25, "memory_before_validation": 1.0}
    assert set(memory["planned"]) <= set(memory["measured"])
    assert "1.00 GiB planned" in (run / "report.html").read_text()


def test_without_a_gpu_and_a_budget_nothing_is_planned(tiny_model: Path, prepared_folder: Path) -> None:
    options = train_options(tiny_model, prepared_folder)
    assert plan_training(options) == (options, None)
    with pytest.raises(UserError, match="--fit: there is no GPU here"):
        plan_training(train_options(tiny_model, prepared_folder, "--fit"))


def test_the_card_is_the_budget_where_none_is_given(
    tiny_model: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before_training, "memory_of_card", lambda: 24.0)
    options, planned = plan_training(train_options(tiny_model, prepared_folder))
    assert planned and planned["memory_before_validation"] == 3.0 and options.budget.gpu_memory is None
    monkeypatch.setattr(before_training, "memory_of_card", lambda: 4.0)
    with pytest.raises(UserError, match="--gradient_checkpointing"):
        plan_training(train_options(tiny_model, prepared_folder))


def test_the_machine_is_the_budget_of_what_waits_there(tiny_model: Path, prepared_folder: Path) -> None:
    limited = train_options(tiny_model, prepared_folder, "--gpu_memory", "24", "--host_memory", "1.5")
    with pytest.raises(UserError, match=r"1\.50 GiB of the machine"):  # less than the program itself takes
        plan_training(limited)


def test_a_machine_that_is_only_found_is_a_warning(
    tiny_model: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What waits on the host may be swapped; what the user says of it counts."""
    monkeypatch.setattr(before_training, "memory_of_machine", lambda: 1.5)
    monkeypatch.setattr(logging.getLogger("cogvideox_factory"), "propagate", True)
    _, planned = plan_training(train_options(tiny_model, prepared_folder, "--gpu_memory", "24"))
    assert planned and "more than it has room for" in caplog.text


def test_a_container_has_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": "1073741824"}
    monkeypatch.setattr(before_training, "Path", lambda path: tmp_path / Path(path).name)
    (tmp_path / "memory.max").write_text("max")
    whole = before_training.memory_of_machine()
    (tmp_path / "memory.max").write_text(files["memory.max"])
    assert before_training.memory_of_machine() == 1.0 < whole


def test_a_larger_budget_than_the_card_is_not_there(
    tiny_model: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before_training, "memory_of_card", lambda: 4.0)
    with pytest.raises(UserError, match=r"4\.00 GiB of the GPU"):
        plan_training(train_options(tiny_model, prepared_folder, "--gpu_memory", "24"))


def test_a_fault_of_the_plan_keeps_nobody_from_training(
    tiny_model: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Traced, "phase", lambda *_: 1 / 0)
    monkeypatch.setattr(logging.getLogger("cogvideox_factory"), "propagate", True)
    options = train_options(tiny_model, prepared_folder, "--gpu_memory", "24")
    assert plan_training(options) == (options, None)
    assert "could not be planned (ZeroDivisionError" in caplog.text


def test_what_train_refuses_at_once_is_not_planned_first(
    cli: Cli, tiny_model: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    Traced.asked = []
    paths = ("--model_id", tiny_model, "--data_root", tmp_path / "none", "--output_dir", tmp_path / "run")
    code, _, messages = cli("train", *paths, *SMALL, "--gpu_memory", "1.3")
    assert code == 2 and "none" in messages and not Traced.asked


def test_a_run_that_goes_on_keeps_the_form_of_its_states(
    tiny_model: Path, prepared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    flags = ("--training_type", "sft", "--use_8bit", "--feed_forward_chunks", "4")
    run.mkdir()
    (run / "config.yaml").write_text(config_text(train_options(tiny_model, prepared_folder, *flags)))
    resumed = ("--training_type", "sft", "--resume_from_checkpoint", "latest", "--output_dir", str(run), "--fit")
    options, _ = plan_training(train_options(tiny_model, prepared_folder, *resumed, "--gpu_memory", "4"))
    assert options.optimizer.use_8bit and options.memory.feed_forward_chunks == 4
    assert options.memory.gradient_checkpointing and options.optimizer.trainable_dtype == "fp32"


def test_libraries_that_are_not_there_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_training.importlib.util, "find_spec", lambda name: None)
    assert not before_training.is_installed({"use_8bit": True})
    assert not before_training.is_installed({"quantize_base": "nf4"})
    assert not before_training.is_installed({"use_4bit": True, "use_torchao": True})
    assert before_training.is_installed({"quantize_base": "int8"}) and before_training.is_installed({})


def test_the_first_of_several_processes_plans_for_all(
    tiny_model: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    options = train_options(tiny_model, prepared_folder, "--gpu_memory", "1.3")
    with pytest.raises(UserError, match="these settings do not fit into 1"):
        plan_training(options)
    (*_, (_, planned)) = Traced.asked
    assert (planned.num_processes, planned.num_machines, planned.engine) == (8, 2, "zero3")
    with pytest.raises(UserError, match="--use_8bit: not together with DeepSpeed"):
        plan_training(train_options(tiny_model, prepared_folder, "--gpu_memory", "24", "--use_8bit"))
    with pytest.raises(UserError, match="--fit: for one GPU, and there are 8 processes"):
        plan_training(train_options(tiny_model, prepared_folder, "--fit", "--gpu_memory", "24"))
    monkeypatch.setenv("RANK", "1")
    assert plan_training(options) == (options, None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ours.json")  # the stage stands there
    assert plan_training(options) == (options, None)


def test_a_number_of_processes_that_is_none_is_named(
    tiny_model: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two': the number of processes is needed"):
        plan_training(train_options(tiny_model, prepared_folder))


def test_the_largest_clips_of_a_prepared_set_are_planned(
    tiny_model: Path, prepared_folder: Path, prepared: PreparedSet, entries: list[Entry]
) -> None:
    plan_training(train_options(tiny_model, prepared_folder, "--gpu_memory", "24"))
    planned = {name: largest_bucket(options) for name, options in Traced.asked}
    assert planned == {
        "training": max((entry.bucket for entry in entries), key=lambda size: size[0] * size[1] * size[2])
    }


def test_phases_are_those_that_there_will_be(tiny_model: Path, prepared_folder: Path) -> None:
    assert phases_of(train_options(tiny_model, prepared_folder)) == ["training"]
    assert phases_of(train_options(tiny_model, prepared_folder, "--validation_prompt", "a mouse")) == list(NAMES)
    raw = parse_command(Train, "train", ("--model_id", "x", "--data_root", "x", "--output_dir", "x"))
    assert phases_of(raw) == ["preparing", "training"]


def test_what_others_hold_of_the_card_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory_of_card() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, expected in ((23.6, 24.0), (15.0, 15.5)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (int(free * GIB), 24 * GIB))
        assert memory_of_card() == pytest.approx(expected)

"""What a run's options become before it trains, and what is said of those that do nothing."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogvideox_factory.config import (
    DataOptions,
    EncodingOptions,
    HeldOutOptions,
    HubOptions,
    MethodOptions,
    Secret,
    Train,
    TrainingOptions,
    UserError,
    ValidationOptions,
    read_config,
)
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.training.run_options import (
    check_prompts,
    held_out_options,
    naming_the_second_set,
    resolve_options,
    tell_ignored,
    write_config,
)

Warnings = Callable[[], list[str]]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Warnings:
    monkeypatch.setattr(logging.getLogger("cogvideox_factory"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_prompts_are_checked_and_images_are_made_absolute_when_options_are_resolved(
    checkpoint: Checkpoint, few_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    videos = ValidationOptions(validation_prompt="a fox", validation_images="a.png")
    options = Train(data=DataOptions(data_root=few_clips), output_dir=Path("run"), validation=videos)
    assert resolve_options(options, checkpoint).validation.validation_images == str(tmp_path / "a.png")
    with pytest.raises(UserError, match="there is no prompt"):
        resolve_options(dataclasses.replace(options, validation=ValidationOptions(validation_prompt=":::")), checkpoint)


@pytest.mark.parametrize("text", [":::", " ::: ::: "])
def test_a_prompt_that_is_a_separator_only_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="there is no prompt beside the separator :::"):
        check_prompts(ValidationOptions(validation_prompt=text))


def test_options_of_videos_without_a_prompt_are_told_in_one_line(warnings: Warnings) -> None:
    check_prompts(ValidationOptions())
    asked = ValidationOptions(validation_images="a.png", num_validation_videos=2, validation_steps=5)
    check_prompts(dataclasses.replace(asked, validation_prompt="a fox"))
    assert warnings() == []
    check_prompts(dataclasses.replace(asked, validation_epochs=1))
    (message,) = warnings()
    flags = "--validation_images --num_validation_videos --validation_steps --validation_epochs"
    assert message.startswith(f"{flags}: without effect") and "--validation_prompt" in message


def test_a_length_of_the_text_that_a_prepared_set_does_not_have_is_told(warnings: Warnings) -> None:
    settings = {"max_sequence_length": 226}
    for tokens in (None, 226):  # not given, or as config.yaml of the run has it
        tell_ignored(Train(encoding=EncodingOptions(max_sequence_length=tokens)), settings)
    assert warnings() == []
    tell_ignored(Train(encoding=EncodingOptions(max_sequence_length=100)), settings)
    (message,) = warnings()
    assert message.startswith("--max_sequence_length: without effect") and "--load_tensors" in message


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("--data_root /second: no such folder", "--validation_data_root /second: no such folder"),
        ("/second was prepared with another vae", "--validation_data_root /second: /second was prepared with another"),
    ],
)
def test_a_fault_of_the_second_set_names_its_option(fault: str, message: str) -> None:
    data, held_out = DataOptions(data_root=Path("/first")), HeldOutOptions(validation_data_root=Path("/second"))
    second_set = held_out_options(Train(data=data, held_out=held_out))
    assert second_set
    with pytest.raises(UserError) as error, naming_the_second_set(second_set):
        raise UserError(fault)
    assert str(error.value).startswith(message)


def test_full_fine_tuning_of_a_model_in_fp16_is_in_bf16_on_a_gpu_alone(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the default is fp32; a plan is for a GPU wherever it is made."""
    stored = dataclasses.replace(checkpoint)
    vars(stored)["weights_dtype"] = torch.float16
    options = Train(
        method=MethodOptions(training_type="sft"), data=DataOptions(data_root=tmp_path), output_dir=tmp_path
    )
    for has_gpu, asked, expected in ((True, None, "bf16"), (False, None, None), (False, True, "bf16")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert resolve_options(options, stored, is_gpu=asked).training.mixed_precision == expected


def test_config_yaml_repeats_the_run_and_gives_nobody_access(tmp_path: Path) -> None:
    signed = "https://a.example/b.png?X-Amz-Signature=0a1b"
    options = Train(
        output_dir=tmp_path,
        seed=7,
        training=TrainingOptions(resume_from_checkpoint="latest"),
        validation=ValidationOptions(validation_images=signed),
        hub=HubOptions(hub_token=Secret("hf_secret")),
    )
    write_config(options)
    written = read_config(tmp_path / "config.yaml")
    assert written["seed"] == 7 and written["resume_from_checkpoint"] is None
    assert written["validation_images"] == "https://a.example/b.png?…" and "hub_token" not in written


def test_config_yaml_is_complete_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is gone on with by what stands in it."""
    write_config(Train(output_dir=tmp_path, seed=1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_config(Train(output_dir=tmp_path, seed=2))
    assert read_config(tmp_path / "config.yaml")["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]

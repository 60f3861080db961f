"""What is said before and after a training."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import COMMANDS, Train, TrainingOptions
from cogvideox_factory.data.manifest import MANIFEST
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.training.summary import as_size, size_of, tell_end, tell_start


def test_before_the_start_everything_that_is_known_is_said(caplog: pytest.LogCaptureFixture, entries, prepared) -> None:
    checkpoint: Any = SimpleNamespace(name="THUDM/CogVideoX-5b", task="text-to-video")
    data: Any = SimpleNamespace(entries=entries)
    sampler = Sampler([entry.bucket for entry in entries], 4)
    options = Train(training=TrainingOptions(checkpointing_steps=4))
    planned = {"memory_before_training": 10.4, "memory_before_validation": 16.94, "memory_after_testing": 15.11}
    with caplog.at_level(logging.INFO, logger="cogvideox_factory"):
        tell_start(checkpoint, options, data, None, 65536, 10, sampler, 6, planned)
        assert caplog.messages == [
            "model      THUDM/CogVideoX-5b (text-to-video)",
            "method     LoRA, rank 64, alpha 64, 65,536 trainable parameters",
            "clips      12 of 17x64x96 (frames × height × width)",
            "steps      10, of which 6 done; 3 an epoch",
            "memory     planned peaks in GiB of the GPU: training 16.9, testing 15.1",
            "saving     the next checkpoint after 2 steps",
        ]
        caplog.clear()
        tell_start(checkpoint, options, data, None, 65536, 10, sampler, 10, None)
    assert len(caplog.messages) == 4  # nothing planned, nothing left to save


def finished_run(run: Path, task: str) -> None:
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    for name, content in (
        ("config.yaml", "output_dir: run\n"),
        ("pytorch_lora_weights.safetensors", "w" * 12_345),
        ("report.html", "r" * 999),
        ("README.md", f"---\npipeline_tag: {task}\n---\n# A model\n"),
        (f"checkpoints/step-00000002/{MANIFEST}", "{}"),
        ("checkpoints/step-00000002/trainable.safetensors", "t" * 1_600_000),
    ):
        (run / name).write_text(content)


def test_after_the_end_what_was_written_and_what_to_type(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    finished_run(run, "image-to-video")
    with caplog.at_level(logging.INFO, logger="cogvideox_factory"):
        tell_end(run, was_shared=False)
    told = dict(re.findall(r"written +(\S+) +(\d+ \w+)  ", "\n".join(caplog.messages)))
    assert told == {
        "pytorch_lora_weights.safetensors": "12 kB",
        "report.html": "999 B",
        "README.md": "47 B",
        "checkpoints/": "2 MB",
    }
    assert "states to go on from: 1" in caplog.text
    commands = [message for message in caplog.messages if "cogvideox-factory " in message]
    assert [command.split("  ")[0] for command in commands] == ["use it", "share it"]
    for command in commands:  # and they can be typed, though the folder's name has a space
        name, *arguments = shlex.split(command.partition("cogvideox-factory ")[2])
        options: Any = parse_command(
            COMMANDS[name],
            name,
            [*arguments, *(["--pretrained_model_name_or_path", "m", "--data_root", "d"] if name == "train" else [])],
        )
        if name == "sample":
            assert options.run == run and options.image == "FILE"
        else:
            assert options.hub.push_to_hub and options.training.resume_from_checkpoint == "latest"


def test_what_is_shared_already_is_not_proposed_and_text_needs_no_image(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    finished_run(tmp_path, "text-to-video")
    with caplog.at_level(logging.INFO, logger="cogvideox_factory"):
        tell_end(tmp_path, was_shared=True)
    (tmp_path / "README.md").write_text("written by someone\n")
    with caplog.at_level(logging.INFO, logger="cogvideox_factory"):
        tell_end(tmp_path, was_shared=True)
    assert "--push_to_hub" not in caplog.text and "--image" not in caplog.text and caplog.text.count("use it") == 2


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "in/it").mkdir(parents=True)
    (tmp_path / "in/it/a").write_bytes(b"12345")
    (tmp_path / "in/b").write_bytes(b"123")
    assert size_of(tmp_path / "in") == 8 and size_of(tmp_path / "in/b") == 3
    assert [as_size(value) for value in (0, 999, 1000, 283_400, 999_600, 2_600_000, 11_200_000_000)] == [
        *("0 B", "999 B", "1 kB", "283 kB", "1 MB", "3 MB", "11.2 GB"),
    ]

"""The program as a user meets it: exit codes and messages in-process, and one real process a command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import cogvideox_factory.demo
from cogvideox_factory import cli as cli_module
from cogvideox_factory.cli import main, run_guarded
from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import COMMANDS, RunError
from cogvideox_factory.demo import SHOWN

Cli = Callable[..., tuple[int, str, str]]
PROGRAM = [sys.executable, "-m", "cogvideox_factory"]


def assert_one_message(code: int, messages: str, *parts: str) -> None:
    """Exit code 2, no traceback, and a message with all of these parts."""
    assert code == 2, messages
    assert "Traceback" not in messages
    for part in parts:
        assert part in messages


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def test_help_lists_every_command(cli: Cli) -> None:
    for flag in ((), ("--help",), ("help",)):
        code, output, _ = cli(*flag)
        assert code == 0 and all(f"  {name}" in output for name in COMMANDS)
        assert output.endswith("\nExample:\n  cogvideox-factory demo\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_can_be_typed(cli: Cli, command: str) -> None:
    code, output, _ = cli(command, "--help")
    *_, examples = output.partition("\nExample:\n")
    assert code == 0 and examples
    for example in examples.splitlines():
        assert example.startswith(f"  cogvideox-factory {command} ")
        parse_command(COMMANDS[command], command, shlex.split(example)[2:])


def test_an_unknown_command_proposes_the_nearest(cli: Cli) -> None:
    code, _, messages = cli("trian")
    assert_one_message(code, messages, "trian", "did you mean train?")


def test_an_unknown_flag_proposes_the_nearest(cli: Cli) -> None:
    code, output, messages = cli("train", "--height_bucket", "480")
    assert_one_message(code, output + messages, "--height_bucket", "--height_buckets")


def test_a_missing_data_root_is_named(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    for command in ("prepare", "train"):
        code, _, messages = cli(
            *(command, "--pretrained_model_name_or_path", tiny_model, "--data_root", tmp_path / "nowhere"),
            *("--output_dir", tmp_path / command),
        )
        assert_one_message(code, messages, "--data_root", "nowhere")
        assert not (tmp_path / command).exists()  # nothing is made before the input was looked at


def test_unequal_counts_name_both_numbers(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "videos.txt").write_text("a.mp4\nb.mp4\n")
    code, _, messages = cli(
        *("prepare", "--pretrained_model_name_or_path", tiny_model, "--data_root", tmp_path, "--output_dir"),
        tmp_path / "out",
    )
    assert_one_message(code, messages, "3 lines", "2; they must be equal")


def test_no_usable_clip_gives_the_first_reason(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n")
    (tmp_path / "videos.txt").write_text("a.mp4\n")
    code, _, messages = cli(
        *("prepare", "--pretrained_model_name_or_path", tiny_model, "--data_root", tmp_path, "--output_dir"),
        tmp_path / "out",
    )
    assert_one_message(code, messages, "no usable clip", "a.mp4", "no such file")


def test_a_folder_that_is_no_pipeline_is_refused(cli: Cli, clips: Path, tmp_path: Path) -> None:
    for command in ("prepare", "train"):
        code, _, messages = cli(
            *(command, "--pretrained_model_name_or_path", clips, "--data_root", clips, "--output_dir", tmp_path / "out")
        )
        assert_one_message(code, messages, "--pretrained_model_name_or_path", "not a CogVideoX pipeline")


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_an_output_folder_that_cannot_be_written_is_refused(
    cli: Cli, command: str, tiny_model: Path, clips: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, messages = cli(
        *(command, "--pretrained_model_name_or_path", tiny_model, "--data_root", clips),
        *("--output_dir", tmp_path / "file" / "out"),
    )
    assert_one_message(code, messages, "--output_dir", "cannot be written to", "choose another folder")


def test_report_of_a_folder_without_a_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    code, _, messages = cli("report", "--run", tmp_path)
    assert_one_message(code, messages, str(tmp_path))


def test_report_of_several_runs_compares_them(cli: Cli, tmp_path: Path) -> None:
    for name, rank in (("a", 4), ("b", 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"rank: {rank}\n")
    code, _, messages = cli("report", tmp_path / "a", tmp_path / "b")
    page = tmp_path / "a/comparison.html"
    assert code == 0 and str(page) in messages and "a · b</h1>" in page.read_text()
    assert cli("report", tmp_path / "b")[0] == 0 and (tmp_path / "b/report.html").is_file()


def test_a_failure_of_the_machine_is_exit_1_with_the_file(cli: Cli, monkeypatch, tmp_path: Path) -> None:
    import cogvideox_factory.report

    def full_disk(*arguments) -> None:
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(cogvideox_factory.report, "write_report", full_disk)
    code, _, messages = cli("report", "--run", tmp_path)
    assert (
        code == 1
        and "No space left on device: report.html; make room there" in messages
        and "Traceback" not in messages
    )


def test_demo_refuses_a_folder_that_it_did_not_make(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    code, _, messages = cli("demo", "--output_dir", tmp_path)
    assert_one_message(code, messages, "not made by a demo")
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_help_answers_in_a_fresh_process() -> None:
    done = run("--help")
    assert done.returncode == 0 and "usage: cogvideox-factory" in done.stdout


@pytest.mark.slow
def test_prepare_train_sample_and_report_run_as_processes(tiny_model: Path, few_clips: Path, tmp_path: Path) -> None:
    prepared, trained = tmp_path / "prepared", tmp_path / "run"
    model = ("--pretrained_model_name_or_path", tiny_model)
    done = run("prepare", *model, "--data_root", few_clips, "--output_dir", prepared)
    assert done.returncode == 0, done.stderr
    flags = (*model, "--data_root", prepared, "--load_tensors", "--output_dir", trained, "--max_train_steps", "2")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launched = subprocess.run(
        [*launch, "-m", "cogvideox_factory", "train", *map(str, flags)], capture_output=True, text=True, timeout=300
    )
    assert launched.returncode == 0, launched.stderr
    assert (trained / "pytorch_lora_weights.safetensors").exists()
    request = ("--prompt", "a red square", "--num_inference_steps", "2", "--output", tmp_path / "x.mp4")
    done = run("sample", "--run", trained, *request, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "x.mp4")  # standard output holds nothing else
    assert (trained / "versions.json").is_file()
    done = run("report", "--run", trained, "--output", tmp_path / "report.html")
    assert done.returncode == 0 and "report.html" in done.stderr


def assert_demo_ended(messages: str) -> None:
    """The last lines name what there is now, and four commands were shown."""
    last = messages.strip().splitlines()[-4:]
    for line, name in zip(last, ("LoRA", "videos", "picture", "report"), strict=True):
        assert line.split()[0] == name
        assert Path(line.split()[1].rstrip(":")).exists()
    assert messages.count("$ cogvideox-factory") == 4
    assert "Traceback" not in messages


def test_demo_ends_with_the_lora_the_videos_and_the_report(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its own commands, with few steps in place of many."""
    few, shortened = {"--max_train_steps": "2", "--checkpointing_steps": "1", "--num_inference_steps": "1"}, set()

    def run_shortened(arguments: Sequence[str]) -> int:
        pairs = zip(("", *arguments), arguments, strict=False)
        shortened.update(few.keys() & set(arguments))
        return main([few.get(flag, value) for flag, value in pairs])

    monkeypatch.setattr(cli_module, "main", run_shortened)
    monkeypatch.setattr(cogvideox_factory.demo, "NUM_CLIPS", 8)
    monkeypatch.setattr(cogvideox_factory.demo, "SHOWN", SHOWN[:1])
    code, _, messages = cli("demo", "--output_dir", tmp_path / "demo")
    assert code == 0 and shortened == few.keys()
    assert_demo_ended(messages)


@pytest.mark.slow
def test_the_whole_demo_as_a_process(tmp_path: Path) -> None:
    done = run("demo", "--output_dir", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert_demo_ended(done.stderr)
    assert "Warning" not in done.stderr and "WARNING" not in done.stderr
    distances = re.findall(r"base +([\d.]+) → fine-tuned +([\d.]+) \(an empty night: ([\d.]+)\)", done.stderr)
    assert len(distances) == len(SHOWN)
    for base, tuned, empty in distances:  # seen: 0.07 to 0.22 of the base, 0.66 of the empty night
        assert float(tuned) < float(base) / 2 and float(tuned) < 0.9 * float(empty)


def test_a_fault_of_ours_is_reported_by_a_traceback_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("hf_abcdefghijklmnopqrstuvwxyz012345 https://user:word@example.org/a.png?sig=0123")

    assert run_guarded(fail) == 1
    messages = capsys.readouterr().err
    assert "Traceback" in messages and "in fail" in messages
    assert not any(secret in messages.split("RuntimeError:")[-1] for secret in ("hf_abc", "word", "sig=0123"))


@pytest.mark.parametrize("failure", [RunError("no more"), KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_a_run_that_ends_before_its_time_has_a_report_all_the_same(
    failure: BaseException, cli: Cli, tiny_model: Path, prepared_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise failure

    run = tmp_path / "run"
    flags = ("--load_tensors", "--max_train_steps", "1", "--report_to", "none", "--output_dir", run)
    monkeypatch.setattr("cogvideox_factory.training.loop.optimizer_step", fail)
    code, _, messages = cli(
        "train", "--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder, *flags
    )
    assert code not in (0, 2), messages
    assert "<html" in (run / "report.html").read_text()
    assert "report" in messages
    measured = json.loads((run / "memory.json").read_text())["measured"]
    assert {"memory_before_training", "memory_before_validation"} <= set(measured)

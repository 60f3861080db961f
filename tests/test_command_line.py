"""Options: precedence, checks, YAML, and messages that name the flag, the value and the fix."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import (
    COMMANDS,
    Prepare,
    Report,
    Sample,
    Train,
    UserError,
    config_text,
    option_values,
)

REQUIRED = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", "o"]


TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"


def parse(*flags: str) -> Train:
    return parse_command(Train, "train", [*REQUIRED, *flags])


def yaml_file(folder: Path, content: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(content)
    return str(path)


def test_runs_to_report_on_need_no_flag_before_them() -> None:
    for arguments in (["a", "b", "--output", "c"], ["--output", "c", "--run", "a", "b"]):
        options = parse_command(Report, "report", arguments)
        assert options.run == (Path("a"), Path("b")) and options.output == Path("c")
    with pytest.raises(UserError, match=r"^--run is missing. Example: [^\n]*--run runs/steamboat$"):
        parse_command(Report, "report", ["--output", "c"])


def test_a_flag_wins_over_yaml_which_wins_over_the_default(tmp_path: Path) -> None:
    recipe = yaml_file(
        tmp_path, "rank: 8\nlearning_rate: 3e-4\nheight_buckets: [256, 480]\ngradient_checkpointing: true"
    )
    options = parse("--config", recipe, "--rank", "16")
    assert options.lora.rank == 16
    assert options.optimizer.learning_rate == 3e-4
    assert options.data.height_buckets == (256, 480)
    assert options.memory.gradient_checkpointing is True
    assert options.lora.lora_alpha == Train().lora.lora_alpha
    turned_off = parse(f"--config={recipe}", "--no_gradient_checkpointing", "--height_buckets", "720")
    assert turned_off.memory.gradient_checkpointing is False and turned_off.data.height_buckets == (720,)


def test_yaml_gives_required_options(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "pretrained_model_name_or_path: m\ndata_root: d\noutput_dir: o")
    options = parse_command(Train, "train", ["--config", recipe])
    assert options.data.data_root == Path("d") and options.output_dir == Path("o")


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    options = parse("--validation_prompt", 'a: b ::: --no, "quoted" 猫', "--frame_buckets", "17", "49", "--fps", "8")
    (tmp_path / "config.yaml").write_text(config_text(options))
    assert parse_command(Train, "train", ["--config", str(tmp_path / "config.yaml")]) == options


def test_config_yaml_holds_every_option_and_the_version(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_text(parse()))
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert content.pop("version")
    assert list(content) == [name for name in option_values(parse()) if name != "hub_token"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rnk: 8", "rank"),
        ("- 1", "mapping"),
        ("rank: [1", "not valid YAML"),
        ("rank: {a: 1}", "not a mapping"),
    ],
)
def test_a_bad_yaml_file_is_named_with_the_fix(tmp_path: Path, content: str, message: str) -> None:
    recipe = yaml_file(tmp_path, content)
    with pytest.raises(UserError, match=r"recipe\.yaml") as error:
        parse("--config", recipe)
    assert message in str(error.value)


def test_a_missing_yaml_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        parse("--config", "nowhere.yaml")


def test_yaml_never_builds_python_objects(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        parse("--config", yaml_file(tmp_path, "rank: !!python/object/apply:os.getcwd []"))


def test_a_recipe_may_hold_options_of_other_commands(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "rank: 8\nfps: 12")
    flags = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", "o", "--config", recipe]
    assert parse_command(Prepare, "prepare", flags).data.fps == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rank", "0"), "--rank 0: must be 1 or more"),
        (("--caption_dropout", "1.5"), "--caption_dropout 1.5: must be from 0 to 1"),
        (("--learning_rate", "0"), "--learning_rate 0.0: must be more than 0"),
        (("--frame_buckets", "49", "0"), "--frame_buckets 0: must be 1 or more"),
        (("--max_train_steps", "-3"), "--max_train_steps -3"),
        (("--fps", "0"), "--fps 0.0"),
        (("--fps", "inf"), "--fps inf"),
        (("--seed", "99999999999999999999999"), "--seed"),
        (("--validation_prompt_separator", ""), "--validation_prompt_separator : must not be empty"),
        (("--num_inference_steps", "2000"), "--num_inference_steps 2000: must be from 1 to 1000"),
    ],
)
def test_values_out_of_range_are_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*flags)
    assert message in str(error.value)


@pytest.mark.parametrize("missing", ["--pretrained_model_name_or_path", "--data_root", "--output_dir"])
def test_a_missing_required_option_is_named_with_an_example(missing: str) -> None:
    flags = list(REQUIRED)
    index = flags.index(missing)
    del flags[index : index + 2]
    with pytest.raises(UserError, match=f"{missing} is missing. Example: cogvideox-factory train"):
        parse_command(Train, "train", flags)


def test_other_names_that_scripts_use_mean_the_same() -> None:
    flags = ["--model_id", "m", "--data_root", "d", "--output_dir", "o", "--target_fps", "12"]
    options = parse_command(Prepare, "prepare", flags)
    assert options.model.pretrained_model_name_or_path == "m" and options.data.fps == 12


def test_needless_flags_are_accepted_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    needless = ["--save_latents_and_embeddings", "--batch_size", "4", "--num_artifact_workers=2", "--use_slicing"]
    assert parse_command(Prepare, "prepare", [*REQUIRED, *needless, "--fps", "8"]).data.fps == 8
    messages = capsys.readouterr().err
    assert all(flag.partition("=")[0] in messages for flag in needless if flag != "4")
    assert parse("--use_slicing", "--rank", "8").lora.rank == 8
    assert "--use_slicing" in capsys.readouterr().err


def test_needless_options_in_yaml_are_no_error(tmp_path: Path) -> None:
    assert parse("--config", yaml_file(tmp_path, "use_slicing: false\nrank: 8")).lora.rank == 8


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ((f"--hub_tokn={TOKEN}",), "--hub_tokn=…"),
        (("--hub_tokn", TOKEN), "--hub_tokn"),
        (("--hub_token", "A", TOKEN), "Unrecognized"),
        (("--hub_token", "A", "s3cret"), "Unrecognized"),
        (("--hub-tokn=s3cret",), "--hub-tokn=…"),
        (("--hb_tkn", "s3cret"), "--hb_tkn"),
        (("--rank", TOKEN), "hf_…"),
        (("--hub_token", TOKEN, "--rank", "x"), "--rank"),
    ],
)
def test_a_token_is_never_shown(
    flags: tuple[str, ...], shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # lines are broken, also within a token
    with pytest.raises(SystemExit) as exit_request:
        parse(*flags)
    captured = capsys.readouterr()
    assert exit_request.value.code == 2 and shown in captured.err
    assert not any(part in captured.out + captured.err for part in (TOKEN[3:9], TOKEN[-6:], "s3cret"))


def test_a_token_is_taken_and_other_texts_like_it_stay_as_they_are(tmp_path: Path) -> None:
    options = parse("--hub_token", TOKEN, "--hub_model_id", "hf_clips", "--id_token", "MOUSE")
    assert options.hub.hub_token and options.hub.hub_token.reveal() == TOKEN
    assert options.hub.hub_model_id == "hf_clips" and options.data.id_token == "MOUSE"
    with pytest.raises(UserError, match="not valid YAML") as error:
        parse("--config", yaml_file(tmp_path, f"hub_token: {TOKEN}: x"))
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_request:
        parse_command(COMMANDS[name], name, ["--help"])
    assert exit_request.value.code == 0
    shown = capsys.readouterr().out
    assert "(default: None)" not in shown
    assert not re.search(r"_\w* options", shown)  # a box's title is made of words
    # A checkpoint is what a training saved; what is trained is a model.
    assert "checkpoint's" not in shown and "CogVideoX checkpoint" not in shown
    for group in (COMMANDS[name], *typing.get_type_hints(COMMANDS[name]).values()):
        if dataclasses.is_dataclass(group):
            plain, hints = (typing.get_type_hints(group, include_extras=extras) for extras in (False, True))
            for item in dataclasses.fields(group):
                help_texts = [str(getattr(note, "help", "")) for note in getattr(hints[item.name], "__metadata__", ())]
                is_group = dataclasses.is_dataclass(plain[item.name])
                assert is_group or any(text.endswith(".") for text in help_texts), f"--{item.name} has no help text"


def test_sample_defaults_need_no_model_when_a_run_is_given() -> None:
    options = parse_command(Sample, "sample", ["--run", "r", "--prompt", "p", "--output", "x.mp4"])
    assert options.run == Path("r") and options.model.pretrained_model_name_or_path is None


def test_a_bare_no_in_yaml_is_a_text_where_the_option_is_one(tmp_path: Path) -> None:
    options = parse("--config", yaml_file(tmp_path, "mixed_precision: no\nvalidation_prompt: yes"))
    assert options.training.mixed_precision == "no" and options.validation.validation_prompt == "yes"

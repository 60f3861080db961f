"""Full fine-tuning: which weights are trained, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cogvideox_factory.config import LoraOptions, MethodOptions, UserError
from cogvideox_factory.model.adapters import (
    attach,
    check_method,
    describe_method,
    identity_of,
    needs_bf16,
    trainable_parameters,
)
from cogvideox_factory.model.denoiser import load_transformer
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.model.full import load_weights


def trained(checkpoint: Checkpoint, *patterns: str, dtype: torch.dtype = torch.float32) -> set[str]:
    """Names of the parameters that these patterns train."""
    transformer = load_transformer(checkpoint, dtype)
    attach(transformer, MethodOptions(training_type="sft", trainable_modules=patterns), LoraOptions(), seed=0)
    assert {value.dtype for value in transformer.parameters()} == {dtype}
    return set(trainable_parameters(transformer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_transformer_is_trained_in_its_own_type(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    everything = {name for name, _ in load_transformer(checkpoint, dtype).named_parameters()}
    assert trained(checkpoint, dtype=dtype) == everything
    assert len(everything) > 50


@pytest.mark.parametrize(
    ("patterns", "expression"),
    [
        pytest.param(["proj_out"], r"proj_out\.", id="name"),
        pytest.param(["transformer_blocks.1"], r"transformer_blocks\.1\.", id="name-with-all-that-is-in-it"),
        pytest.param(["attn1"], r"transformer_blocks\.\d+\.attn1\.", id="part-of-a-name"),
        pytest.param(["ff.net.2"], r"transformer_blocks\.\d+\.ff\.net\.2\.", id="parts-of-a-name"),
        pytest.param(["transformer_blocks.*.norm1"], r"transformer_blocks\.\d+\.norm1\.", id="pattern"),
        pytest.param(["to_[qk]"], r".*\.to_[qk]\.", id="pattern-of-a-part"),
        pytest.param(["proj_out", "attn1"], r"proj_out\.|.*\.attn1\.", id="two"),
    ],
)
def test_modules_are_chosen_by_names_parts_and_patterns(
    checkpoint: Checkpoint, patterns: list[str], expression: str
) -> None:
    everything = {name for name, _ in load_transformer(checkpoint, torch.float32).named_parameters()}
    expected = {name for name in everything if re.match(expression, name)}
    assert expected and expected != everything
    assert trained(checkpoint, *patterns) == expected


def test_a_name_is_matched_by_whole_parts(checkpoint: Checkpoint) -> None:
    """Otherwise transformer_blocks.1 would train block 10 too."""
    with pytest.raises(UserError, match="attn"):
        trained(checkpoint, "attn")


@pytest.mark.parametrize(
    ("pattern", "proposal"),
    [("atn1", "attn1"), ("transformer_block.1", "transformer_blocks.1"), ("zzz", "made of .*patch_embed.*to_q")],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(
    checkpoint: Checkpoint, pattern: str, proposal: str
) -> None:
    with pytest.raises(UserError, match=f"^--trainable_modules {pattern}: .*{proposal}"):
        trained(checkpoint, "proj_out", pattern)


def test_a_module_without_weights_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"--trainable_modules embedding_dropout: .*with weights"):
        trained(checkpoint, "embedding_dropout")


def test_weights_kept_in_bf16_are_those_that_compute_in_bf16(checkpoint: Checkpoint) -> None:
    method = MethodOptions(training_type="sft")
    attach(load_transformer(checkpoint, torch.bfloat16), method, LoraOptions(), 0, keeps_bf16=True)
    with pytest.raises(UserError, match=r"--trainable_dtype bf16: .* add --mixed_precision bf16"):
        attach(load_transformer(checkpoint, torch.float32), method, LoraOptions(), 0, keeps_bf16=True)


# --- options ---


def test_modules_to_train_are_refused_with_a_lora() -> None:
    with pytest.raises(UserError, match="--trainable_modules attn1 ff: needs --training_type sft"):
        check_method(MethodOptions(trainable_modules=("attn1", "ff")), LoraOptions(), None)


def test_fp16_is_refused_with_full_fine_tuning_only() -> None:
    with pytest.raises(UserError, match=r"--mixed_precision fp16: .* take bf16 or no"):
        check_method(MethodOptions(training_type="sft"), LoraOptions(), "fp16")
    check_method(MethodOptions(), LoraOptions(), "fp16")
    check_method(MethodOptions(training_type="sft"), LoraOptions(), "bf16")


def test_options_of_a_lora_are_told_to_be_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    check_method(MethodOptions(training_type="sft"), LoraOptions(), None)
    check_method(MethodOptions(), LoraOptions(rank=8), None)
    assert not caplog.messages
    check_method(MethodOptions(training_type="sft"), LoraOptions(rank=8, use_dora=True), None)
    assert caplog.messages == ["--rank --use_dora: without effect, --training_type sft trains no LoRA"]


@pytest.mark.parametrize(
    ("training_type", "stored", "expected"),
    [("sft", torch.float16, True), ("sft", torch.bfloat16, False), ("lora", torch.float16, False)],
)
def test_a_checkpoint_stored_in_fp16_is_fine_tuned_in_bf16(
    training_type: Any, stored: torch.dtype, expected: bool
) -> None:
    class Stored:
        weights_dtype = stored

    checkpoint: Any = Stored()
    assert needs_bf16(MethodOptions(training_type=training_type), checkpoint) is expected


@pytest.mark.parametrize(
    ("method", "lora", "expected"),
    [
        ({}, {"rank": 4, "lora_alpha": 2}, "LoRA, rank 4, alpha 2"),
        ({}, {"use_dora": True}, "DoRA, rank 64, alpha 64"),
        ({}, {"use_dora": True, "use_rslora": True}, "DoRA (rank-stabilized), rank 64, alpha 64"),
        ({"training_type": "sft"}, {}, "full fine-tuning of the transformer"),
        ({"training_type": "sft", "trainable_modules": ("attn1", "ff")}, {}, "full fine-tuning of attn1 ff"),
    ],
)
def test_the_method_is_told(method: dict[str, Any], lora: dict[str, Any], expected: str) -> None:
    assert describe_method(MethodOptions(**method), LoraOptions(**lora)) == expected


@pytest.mark.parametrize(
    ("method", "lora", "name"),
    [
        ({"training_type": "sft"}, {}, "--training_type"),
        ({}, {"rank": 4}, "--rank"),
        ({}, {"lora_alpha": 4}, "--lora_alpha"),
        ({}, {"target_modules": ("to_q",)}, "--target_modules"),
        ({}, {"use_dora": True}, "--use_dora"),
        ({}, {"use_rslora": True}, "--use_rslora"),
    ],
)
def test_what_makes_another_training_is_in_the_identity(
    method: dict[str, Any], lora: dict[str, Any], name: str
) -> None:
    usual, other = (
        identity_of(MethodOptions(), LoraOptions()),
        identity_of(MethodOptions(**method), LoraOptions(**lora)),
    )
    assert usual[name] != other[name]


def test_the_modules_that_are_trained_are_in_the_identity_whatever_their_order() -> None:
    one, same, other = (
        identity_of(MethodOptions(training_type="sft", trainable_modules=names), LoraOptions())
        for names in (("ff", "attn1"), ("attn1", "ff"), ("ff",))
    )
    assert one == same != other


# --- loading ---


def test_saved_weights_take_the_place_of_the_models_own_and_leave_the_others(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    transformer = load_transformer(checkpoint, torch.bfloat16)
    before = {name: value.clone() for name, value in transformer.named_parameters()}
    saved = torch.randn(before["proj_out.weight"].shape)
    save_file({"proj_out.weight": saved}, tmp_path / "weights.safetensors")
    load_weights(tmp_path / "weights.safetensors", transformer, "tiny")
    for name, value in transformer.named_parameters():
        assert torch.equal(value, saved.bfloat16() if name == "proj_out.weight" else before[name]), name


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [("proj_out.weight", (2, 2), r"proj_out.weight is \[2, 2\], in the model \["), ("other", (1,), "not there")],
)
def test_weights_of_another_model_are_refused_and_change_nothing(
    checkpoint: Checkpoint, tmp_path: Path, name: str, shape: tuple[int, ...], said: str
) -> None:
    transformer = load_transformer(checkpoint, torch.float32)
    before = {name: value.clone() for name, value in transformer.named_parameters()}
    fitting = torch.ones_like(before["proj_out.bias"])
    save_file({"proj_out.bias": fitting, name: torch.ones(shape)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=f"does not fit tiny: .*{said}"):
        load_weights(tmp_path / "weights.safetensors", transformer, "tiny")
    assert all(torch.equal(value, before[name]) for name, value in transformer.named_parameters())


def test_a_damaged_file_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "weights.safetensors"))):
        load_weights(tmp_path / "weights.safetensors", load_transformer(checkpoint, torch.float32), "tiny")

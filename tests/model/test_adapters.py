"""The adapter: what trains, where its first weights come from, and a file that stock diffusers reads the same."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvideox_factory import __version__
from cogvideox_factory.config import LoraOptions, UserError
from cogvideox_factory.model.adapters import LORA_FILE, attach_lora, find_lora, save_lora, trainable_parameters
from cogvideox_factory.model.denoiser import load_transformer
from cogvideox_factory.model.family import Checkpoint

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
OPTIONS = LoraOptions(rank=4, lora_alpha=8)


def with_lora(
    checkpoint: Checkpoint, options: LoraOptions = OPTIONS, dtype: torch.dtype = torch.float32, seed: int = 7
):
    """A transformer with a fresh adapter."""
    transformer = load_transformer(checkpoint, dtype)
    attach_lora(transformer, options, seed)
    return transformer


def randomize(transformer) -> None:
    """A fresh adapter adds nothing, because its B matrices are zero; give it something to add."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trainable_parameters(transformer).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


@torch.no_grad()
def output(transformer, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a transformer answers to fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    return transformer(
        hidden_states=torch.randn(1, 3, 8, 4, 6, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(1, 7, 32, generator=generator).to(dtype),
        timestep=torch.tensor([500]),
        image_rotary_emb=(torch.ones(18, 32) * 0.8, torch.ones(18, 32) * 0.6),
        return_dict=False,
    )[0]


# --- attaching ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_adapter_trains_and_in_fp32_whatever_the_base_is(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    transformer = with_lora(checkpoint, dtype=dtype)
    expected = {
        f"transformer_blocks.{block}.attn1.{target}.lora_{matrix}.default.weight"
        for block in range(4)
        for target in TARGETS
        for matrix in "AB"
    }
    trained = trainable_parameters(transformer)
    assert set(trained) == expected
    assert {name for name, value in transformer.named_parameters() if value.requires_grad} == expected
    assert {value.dtype for value in trained.values()} == {torch.float32}
    frozen = {value.dtype for name, value in transformer.named_parameters() if name not in expected}
    assert frozen == {dtype}


def test_trainable_parameters_are_the_models_own(checkpoint: Checkpoint) -> None:
    transformer = with_lora(checkpoint)
    parameters = dict(transformer.named_parameters())
    assert all(value is parameters[name] for name, value in trainable_parameters(transformer).items())


def test_base_weights_are_those_of_the_checkpoint_and_a_fresh_adapter_adds_nothing(checkpoint: Checkpoint) -> None:
    plain = load_transformer(checkpoint, torch.float32)
    transformer = with_lora(checkpoint)
    theirs = dict(plain.named_parameters())
    for name, value in transformer.named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, theirs[name.replace(".base_layer", "")])
    assert torch.equal(output(transformer), output(plain))
    randomize(transformer)
    assert not torch.allclose(output(transformer), output(plain), atol=1e-3)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (8, 8.0), (3, 0.5)])
def test_adapter_is_the_one_that_peft_makes_of_the_same_settings(
    checkpoint: Checkpoint, rank: int, alpha: float
) -> None:
    ours = with_lora(checkpoint, LoraOptions(rank=rank, lora_alpha=alpha, target_modules=("to_k", "ff.net.2")), seed=11)
    theirs = load_transformer(checkpoint, torch.float32)
    torch.manual_seed(11)
    theirs.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_k", "ff.net.2"]))
    expected = {name: value for name, value in theirs.named_parameters() if "lora_" in name}
    assert len(expected) == 4 * 2 * 2
    assert set(trainable_parameters(ours)) == set(expected)
    for name, value in trainable_parameters(ours).items():
        assert torch.equal(value, expected[name])
    randomize(ours)
    randomize(theirs)
    assert torch.equal(output(ours), output(theirs))


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}])
def test_variants_are_those_of_peft(checkpoint: Checkpoint, variant: dict[str, Any]) -> None:
    ours = with_lora(checkpoint, LoraOptions(rank=4, lora_alpha=6, **variant), seed=11)
    theirs = load_transformer(checkpoint, torch.float32)
    torch.manual_seed(11)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS), **variant))
    assert set(trainable_parameters(ours)) == set(trainable_parameters(theirs))
    assert any("magnitude" in name for name in trainable_parameters(ours)) == variant.get("use_dora", False)
    plain = with_lora(checkpoint, LoraOptions(rank=4, lora_alpha=6), seed=11)
    for transformer in (ours, theirs, plain):
        randomize(transformer)
    assert torch.equal(output(ours), output(theirs))
    assert not torch.allclose(output(ours), output(plain), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_weights_depend_on_the_seed_alone(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    def first_weights(seed: int, global_seed: int) -> torch.Tensor:
        transformer = load_transformer(checkpoint, dtype)
        torch.manual_seed(global_seed)
        torch.rand(global_seed)
        attach_lora(transformer, OPTIONS, seed)
        return torch.cat([value.flatten() for value in trainable_parameters(transformer).values()])

    expected = first_weights(seed=7, global_seed=1)
    assert expected.abs().sum() > 0
    assert torch.equal(first_weights(seed=7, global_seed=2), expected)
    assert not torch.equal(first_weights(seed=8, global_seed=1), expected)


def test_the_global_generator_is_untouched(checkpoint: Checkpoint) -> None:
    transformer = load_transformer(checkpoint, torch.float32)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    attach_lora(transformer, OPTIONS, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


# --- wrong layers ---


def test_wrong_target_module_is_refused_and_the_layers_are_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError) as error:
        with_lora(checkpoint, LoraOptions(target_modules=("query", "key")))
    message = str(error.value)
    assert message.startswith("--target_modules query key: ")
    for name in (*TARGETS, "proj", "linear"):
        assert name in message  # as one would give it back to the flag


def test_the_layers_that_the_refusal_names_are_accepted(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError) as error:
        with_lora(checkpoint, LoraOptions(target_modules=("query",)))
    names = str(error.value).rpartition("end in ")[2].split(", ")
    assert len(names) > 4
    for name in names:
        assert not name.isdigit(), "a bare number says nothing about the layer"
        assert trainable_parameters(with_lora(checkpoint, LoraOptions(rank=1, target_modules=(name,))))


def test_one_wrong_target_module_among_right_ones_is_refused(checkpoint: Checkpoint) -> None:
    """Training the others in silence is not what was asked for."""
    with pytest.raises(UserError, match="to_w") as error:
        with_lora(checkpoint, LoraOptions(target_modules=("to_q", "to_w")))
    assert "--target_modules" in str(error.value)


def test_layer_of_another_kind_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="--target_modules norm_q") as error:
        with_lora(checkpoint, LoraOptions(target_modules=("norm_q",)))
    assert "linear" in str(error.value)
    assert "no layer" not in str(error.value)  # there is one


# --- saving ---


SCALED = [  # options, and whether their scale is a power of two, by which a product is exact
    ({"rank": 4, "lora_alpha": 8.0}, True),
    ({"rank": 8, "lora_alpha": 2.0}, True),
    ({"rank": 4, "lora_alpha": 4.0}, True),
    ({"rank": 3, "lora_alpha": 0.5}, False),
    ({"rank": 4, "lora_alpha": 4.0, "use_rslora": True}, True),  # 4 / sqrt(4)
    ({"rank": 8, "lora_alpha": 4.0, "use_rslora": True}, False),
    ({"rank": 4, "lora_alpha": 8.0, "use_dora": True}, True),
    ({"rank": 3, "lora_alpha": 5.0, "use_dora": True}, False),
    ({"rank": 16, "lora_alpha": 8.0, "use_dora": True, "use_rslora": True}, True),
]


@pytest.mark.parametrize("has_metadata", [True, False], ids=["with-metadata", "without"])
@pytest.mark.parametrize(("settings", "is_exact"), SCALED, ids=str)
def test_saved_lora_means_the_same_to_stock_diffusers_whatever_it_reads(
    checkpoint: Checkpoint,
    tiny_model: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    is_exact: bool,
    has_metadata: bool,
) -> None:
    """Trap: the LoRA's alpha is not saved.

    A reader that does not know of the metadata takes alpha = rank.
    """
    transformer = with_lora(checkpoint, LoraOptions(**settings))
    randomize(transformer)
    path = save_lora(transformer, tmp_path / "run", checkpoint)
    assert path == tmp_path / "run" / LORA_FILE
    if not has_metadata:
        save_file(load_file(path), path)
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    base = output(pipeline.transformer)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    assert not torch.allclose(base, output(transformer), atol=1e-3)
    if is_exact:
        assert torch.equal(output(pipeline.transformer), output(transformer))
    else:
        assert torch.allclose(output(pipeline.transformer), output(transformer), rtol=0, atol=1e-5)


def test_saved_lora_is_found_by_stock_diffusers_under_its_default_name(
    checkpoint: Checkpoint, tiny_model: Path, tmp_path: Path
) -> None:
    transformer = with_lora(checkpoint)
    randomize(transformer)
    save_lora(transformer, tmp_path)
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(str(tmp_path))
    assert torch.equal(output(pipeline.transformer), output(transformer))


def test_saved_lora_of_a_bf16_base_keeps_the_fp32_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    transformer = with_lora(checkpoint, dtype=torch.bfloat16)
    randomize(transformer)
    tensors = load_file(save_lora(transformer, tmp_path))
    expected = {
        f"transformer.{name.replace('.default', '')}": value
        for name, value in trainable_parameters(transformer).items()
    }
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name] * (2 if "lora_B" in name else 1))  # alpha / rank


@pytest.mark.parametrize("use_rslora", [False, True])
def test_metadata_describes_a_plain_lora_and_names_its_base(
    checkpoint: Checkpoint, tmp_path: Path, use_rslora: bool
) -> None:
    transformer = with_lora(checkpoint, LoraOptions(rank=3, lora_alpha=0.5, use_rslora=use_rslora))
    with safe_open(save_lora(transformer, tmp_path, checkpoint), "pt") as tensors:
        metadata = tensors.metadata()
    assert metadata["base_model"] == checkpoint.folder.name  # of a local model no path of this machine
    assert metadata["cogvideox_factory_version"] == __version__
    described = json.loads(metadata["lora_adapter_metadata"])
    assert described["transformer.r"] == described["transformer.lora_alpha"] == 3
    assert described["transformer.use_rslora"] is False
    assert set(described["transformer.target_modules"]) == set(TARGETS)


def test_a_base_on_the_hub_is_named_as_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = dataclasses.replace(checkpoint, name="THUDM/CogVideoX-5b")
    with safe_open(save_lora(with_lora(checkpoint), tmp_path, base), "pt") as tensors:
        assert tensors.metadata()["base_model"] == "THUDM/CogVideoX-5b"


def test_saving_leaves_one_file_and_the_model_as_it_was(checkpoint: Checkpoint, tmp_path: Path) -> None:
    transformer = with_lora(checkpoint, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in transformer.named_parameters()}
    save_lora(transformer, tmp_path)
    save_lora(transformer, tmp_path)
    assert os.listdir(tmp_path) == [LORA_FILE]
    for name, value in transformer.named_parameters():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def _fail_half_way(part: str | Path, *_: Any, weight_name: str, **__: Any) -> None:
    (Path(part) / weight_name).write_bytes(b"half")
    raise OSError(28, "No space left on device")


def _fail(*_: Any) -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("owner", "name", "failure"),
    [(CogVideoXPipeline, "save_lora_weights", _fail_half_way), (os, "fsync", _fail), (os, "replace", _fail)],
    ids=["while-writing", "while-flushing", "while-renaming"],
)
@pytest.mark.parametrize("is_second", [False, True], ids=["first-save", "over-an-old-file"])
def test_failed_save_leaves_no_part_behind_and_an_old_file_whole(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    failure: Callable[..., None],
    is_second: bool,
) -> None:
    transformer = with_lora(checkpoint)
    old = save_lora(transformer, tmp_path).read_bytes() if is_second else None
    randomize(transformer)
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises(OSError):
        save_lora(transformer, tmp_path)
    assert os.listdir(tmp_path) == ([LORA_FILE] if is_second else [])
    if old is not None:
        assert (tmp_path / LORA_FILE).read_bytes() == old


def test_file_is_flushed_before_it_gets_its_name(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def spy(*arguments: Any, name: str = name, original: Callable[..., None] = original) -> None:
            steps.append(name)
            original(*arguments)

        monkeypatch.setattr(os, name, spy)
    save_lora(with_lora(checkpoint), tmp_path)
    assert steps[:2] == ["fsync", "replace"]


# --- finding ---


def test_find_lora_takes_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / LORA_FILE).touch()
    (tmp_path / "other.safetensors").touch()
    assert find_lora(tmp_path) == tmp_path / "pytorch_lora_weights.safetensors"
    assert find_lora(tmp_path / "other.safetensors") == tmp_path / "other.safetensors"


@pytest.mark.parametrize("name", ["empty", "nothing", "nothing.safetensors"])
def test_find_lora_refuses_what_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no LoRA there") as error:
        find_lora(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "pytorch_lora_weights.safetensors" in str(error.value)

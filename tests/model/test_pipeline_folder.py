"""A pipeline on disk: what stock diffusers loads, what it shares with its base; it is whole or absent."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from diffusers.models.modeling_utils import ModelMixin

from cogvideox_factory.config import ConditioningOptions, ModelOptions
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.model.denoiser import load_transformer
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning
from cogvideox_factory.model.pipeline_folder import is_pipeline, save_pipeline

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def changed_transformer(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
    """The base's transformer with other weights."""
    transformer = load_transformer(checkpoint, dtype)
    for number, parameter in enumerate(transformer.parameters()):
        parameter.data = parameter.data + 0.01 * (number + 1)
    return transformer


def assert_same_weights(ours: Any, theirs: Any) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_diffusers_loads_the_trained_transformer_and_the_bases_other_parts(
    checkpoint: Checkpoint, tiny_model: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    transformer = changed_transformer(checkpoint, dtype)
    save_pipeline(transformer, checkpoint, tmp_path / "run")
    pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "run", dtype={"transformer": dtype})
    base = CogVideoXPipeline.from_pretrained(tiny_model)
    assert_same_weights(pipeline.transformer, transformer)
    assert_same_weights(pipeline.vae, base.vae)
    assert_same_weights(pipeline.text_encoder, base.text_encoder)
    assert pipeline.tokenizer("a red square").input_ids == base.tokenizer("a red square").input_ids
    assert isinstance(pipeline.scheduler, CogVideoXDDIMScheduler) and pipeline.scheduler.config == base.scheduler.config
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*PARTS, "model_index.json"}


def test_weights_of_the_base_are_linked_and_all_else_is_copied(
    checkpoint: Checkpoint, tiny_model: Path, tmp_path: Path
) -> None:
    """Links cost no space; a config that is edited must not change the base."""
    save_pipeline(changed_transformer(checkpoint), checkpoint, tmp_path)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for path in (tmp_path / part).rglob("*"):
            source = tiny_model / path.relative_to(tmp_path)
            assert path.samefile(source) == (path.suffix == ".safetensors"), path
            assert path.read_bytes() == source.read_bytes()


def test_weights_are_copied_where_there_are_no_links(
    checkpoint: Checkpoint, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    save_pipeline(changed_transformer(checkpoint), checkpoint, tmp_path)
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    assert not weights.samefile(tiny_model / "vae" / weights.name)
    CogVideoXPipeline.from_pretrained(tmp_path)


def test_the_hubs_cache_of_links_is_followed_to_its_files(tiny_model: Path, tmp_path: Path) -> None:
    """A link to a blob by a relative path would lead nowhere from another folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    for number, source in enumerate(sorted(path for path in tiny_model.rglob("*") if path.is_file())):
        link = snapshot / source.relative_to(tiny_model)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    base = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(snapshot)))
    save_pipeline(changed_transformer(base), base, tmp_path / "run")
    assert not any(path.is_symlink() for path in (tmp_path / "run").rglob("*"))
    shutil.rmtree(blobs)  # the cache is emptied
    CogVideoXPipeline.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_files_of_a_variant_get_plain_names(tmp_path: Path, is_sharded: bool) -> None:
    pipeline = build_tiny_pipeline(seed=5).to(torch.float16)
    options: dict[str, Any] = {"max_shard_size": "50KB"} if is_sharded else {}
    pipeline.save_pretrained(tmp_path / "base", variant="fp16", **options)
    build_tiny_pipeline(seed=6).save_pretrained(tmp_path / "plain")  # other weights, which lie beside them
    shutil.copytree(tmp_path / "plain", tmp_path / "base", dirs_exist_ok=True)
    base = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "base"), variant="fp16"))
    save_pipeline(changed_transformer(base), base, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*fp16*"))
    assert (len(list((tmp_path / "run/vae").glob("*.safetensors"))) > 1) == is_sharded
    loaded = CogVideoXPipeline.from_pretrained(tmp_path / "run", dtype=torch.float16)
    expected = CogVideoXPipeline.from_pretrained(tmp_path / "base", variant="fp16", dtype=torch.float16)
    assert_same_weights(loaded.vae, expected.vae)
    assert_same_weights(loaded.text_encoder, expected.text_encoder)


def test_a_part_without_the_variant_is_taken_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    base = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(tiny_model)))
    save_pipeline(changed_transformer(base), dataclasses.replace(base, variant="fp16"), tmp_path)
    CogVideoXPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("failing", ["save_pretrained", "fsync", "replace"])
@pytest.mark.parametrize("is_second", [False, True], ids=["first", "over-an-old-one"])
def test_a_save_that_fails_leaves_no_part_and_never_a_mixed_pipeline(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, is_second: bool
) -> None:
    old = changed_transformer(checkpoint)
    if is_second:
        save_pipeline(old, checkpoint, tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    owner: Any = ModelMixin if failing == "save_pretrained" else os
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(OSError):
        save_pipeline(changed_transformer(checkpoint), checkpoint, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    # Once parts begin to be replaced there is no pipeline until all of them are.
    assert is_pipeline(tmp_path) == (is_second and failing != "replace")
    monkeypatch.undo()
    if is_pipeline(tmp_path):
        assert_same_weights(CogVideoXPipeline.from_pretrained(tmp_path).transformer, old)
    save_pipeline(old, checkpoint, tmp_path)
    assert_same_weights(CogVideoXPipeline.from_pretrained(tmp_path).transformer, old)


def test_a_later_save_takes_the_place_of_an_earlier_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("kept: true\n")
    for dtype in (torch.bfloat16, torch.float32):
        transformer = changed_transformer(checkpoint, dtype)
        save_pipeline(transformer, checkpoint, tmp_path)
    assert_same_weights(CogVideoXPipeline.from_pretrained(tmp_path).transformer, transformer)
    assert (tmp_path / "config.yaml").read_text() == "kept: true\n"


def test_how_a_model_takes_its_image_is_in_the_configs(member: Callable[[str], Path], tmp_path: Path) -> None:
    """Stock diffusers then does as training did, without being told."""
    base = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(member("5b-I2V"))))
    conditioning = ConditioningOptions(ignore_learned_positional_embeddings=True, image_latents_scale="divide")
    changed = with_conditioning(base, conditioning)
    assert base.has_learned_positions and not base.vae.get("invert_scale_latents")
    save_pipeline(load_transformer(changed, torch.float32), changed, tmp_path)
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(tmp_path)
    assert pipeline.vae.config.invert_scale_latents is True
    assert pipeline.transformer.patch_embed.use_learned_positional_embeddings is False


def test_the_index_is_the_bases(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_pipeline(load_transformer(checkpoint, torch.float32), checkpoint, tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text()) == {
        name: value for name, value in checkpoint.pipeline.items() if name != "_name_or_path"
    }

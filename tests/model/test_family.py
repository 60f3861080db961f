"""What is said of a checkpoint, against its own config files; and what is refused, with which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cogvideox_factory.config import ConditioningOptions, ModelOptions, UserError
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # a device object needs no GPU
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

# What the published checkpoints' config files say (shared/facts.md, "The family").
TRANSFORMER_1_0 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": None,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
    "max_text_seq_length": 226,
}
TRANSFORMER_1_5 = {**TRANSFORMER_1_0, "patch_size_t": 2, "sample_height": 300, "sample_width": 300, "sample_frames": 81}
VAE = {
    "block_out_channels": [128, 256, 256, 512],
    "latent_channels": 16,
    "temporal_compression_ratio": 4,
    "scaling_factor": 0.7,
}


def open_folder(folder: Path | str, **options: Any) -> Checkpoint:
    return open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(folder), **options))


def write_configs(folder: Path, transformer: dict[str, Any], vae: dict[str, Any]) -> Path:
    """A checkpoint without weights."""
    for component in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / component).mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    (folder / "transformer" / "config.json").write_text(json.dumps(transformer))
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    (folder / "text_encoder" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def copy_of_tiny(tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "copy")


# --- what the config files say ---


def test_mappings_are_the_config_files_as_stock_diffusers_reads_them(checkpoint: Checkpoint, tiny_model: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    for ours, theirs in ((checkpoint.transformer, pipeline.transformer.config), (checkpoint.vae, pipeline.vae.config)):
        public = {name for name in theirs if not name.startswith("_")}
        assert {name: ours[name] for name in public} == json.loads(json.dumps({name: theirs[name] for name in public}))
    assert checkpoint.pipeline["scheduler"] == ["diffusers", type(pipeline.scheduler).__name__]
    assert checkpoint.folder == tiny_model
    assert checkpoint.name == str(tiny_model)


def test_factors_are_those_of_the_stock_pipeline(checkpoint: Checkpoint, tiny_model: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    assert checkpoint.spatial_factor == pipeline.vae_scale_factor_spatial == 8
    assert checkpoint.size_divisor == pipeline.vae_scale_factor_spatial * pipeline.transformer.config.patch_size == 16
    assert checkpoint.frame_batch == pipeline.vae.num_sample_frames_batch_size == 8
    assert checkpoint.scaling_factor == pipeline.vae_scaling_factor_image == 0.7


@pytest.mark.parametrize(
    ("transformer", "vae", "expected"),
    [
        pytest.param(
            TRANSFORMER_1_0,
            {**VAE, "scaling_factor": 1.15258426},
            {
                "native_size": (49, 480, 720),
                "native_fps": 8,
                "latent_frame_multiple": 1,
                "scaling_factor": 1.15258426,
            },
            id="2b",
        ),
        pytest.param(
            TRANSFORMER_1_0,
            VAE,
            {"native_size": (49, 480, 720), "native_fps": 8, "latent_frame_multiple": 1, "scaling_factor": 0.7},
            id="5b",
        ),
        pytest.param(
            TRANSFORMER_1_5,
            VAE,
            {"native_size": (81, 768, 1360), "native_fps": 16, "latent_frame_multiple": 2, "scaling_factor": 0.7},
            id="1.5-5B",
        ),
    ],
)
def test_published_models_have_their_native_size_and_rate(
    tmp_path: Path, transformer: dict[str, Any], vae: dict[str, Any], expected: dict[str, Any]
) -> None:
    checkpoint = open_folder(write_configs(tmp_path / "model", transformer, vae))
    assert {name: getattr(checkpoint, name) for name in expected} == expected
    assert (checkpoint.spatial_factor, checkpoint.size_divisor, checkpoint.frame_batch) == (8, 16, 8)
    assert checkpoint.max_text_tokens == 226


def test_numbers_come_from_the_configs_and_none_is_typed_in(tmp_path: Path) -> None:
    transformer = {
        **TRANSFORMER_1_0,
        "patch_size": 4,
        "sample_height": 20,
        "sample_width": 36,
        "sample_frames": 33,
        "max_text_seq_length": 224,
    }
    vae = {
        "block_out_channels": [8, 16],
        "latent_channels": 4,
        "temporal_compression_ratio": 8,
        "scaling_factor": 0.25,
    }
    checkpoint = open_folder(write_configs(tmp_path / "model", transformer, vae))
    assert checkpoint.spatial_factor == 2
    assert checkpoint.size_divisor == 8
    assert checkpoint.frame_batch == 16
    assert checkpoint.native_size == (33, 40, 72)
    assert checkpoint.max_text_tokens == 224
    assert checkpoint.scaling_factor == 0.25


def test_frames_in_a_patch_come_from_patch_size_t(tmp_path: Path) -> None:
    checkpoint = open_folder(write_configs(tmp_path / "model", {**TRANSFORMER_1_5, "patch_size_t": 3}, VAE))
    assert checkpoint.latent_frame_multiple == 3
    without_the_key = {name: value for name, value in TRANSFORMER_1_0.items() if name != "patch_size_t"}
    old = open_folder(write_configs(tmp_path / "old", without_the_key, VAE))  # written by an older diffusers
    assert (old.latent_frame_multiple, old.native_size, old.native_fps) == (1, (49, 480, 720), 8.0)


@pytest.mark.parametrize("name", ["CogVideoX-5b", "CogVideoX-5b-I2V"])
@pytest.mark.parametrize(
    ("in_channels", "latent_channels", "expected"), [(16, 16, False), (32, 16, True), (16, 8, True)]
)
def test_image_to_video_is_told_by_the_channels_never_by_the_name(
    tmp_path: Path, name: str, in_channels: int, latent_channels: int, expected: bool
) -> None:
    transformer = {**TRANSFORMER_1_0, "in_channels": in_channels}
    checkpoint = open_folder(write_configs(tmp_path / name, transformer, {**VAE, "latent_channels": latent_channels}))
    assert checkpoint.is_image_to_video is expected
    assert checkpoint.pipeline_class is (CogVideoXImageToVideoPipeline if expected else CogVideoXPipeline)
    assert checkpoint.task == ("image-to-video" if expected else "text-to-video")


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("ignore_learned_positional_embeddings", ConditioningOptions(ignore_learned_positional_embeddings=True)),
        ("image_latents_scale", ConditioningOptions(image_latents_scale="divide")),
    ],
)
def test_what_is_for_image_to_video_is_refused_for_text_to_video(
    tmp_path: Path, flag: str, options: ConditioningOptions
) -> None:
    text = open_folder(write_configs(tmp_path / "text", TRANSFORMER_1_0, VAE))
    with pytest.raises(UserError, match=f"--{flag}: is for image-to-video models"):
        with_conditioning(text, options)
    assert with_conditioning(text, ConditioningOptions()) == text
    with_conditioning(
        open_folder(write_configs(tmp_path / "image", {**TRANSFORMER_1_0, "in_channels": 32}, VAE)), options
    )


@pytest.mark.parametrize(
    ("choice", "inverts", "expected"),
    [
        ("checkpoint", False, 0.7),
        ("checkpoint", True, 1 / 0.7),
        ("multiply", True, 0.7),
        ("divide", False, 1 / 0.7),
    ],
)
def test_scale_of_the_images_latents_is_the_configs_unless_another_is_asked_for(
    tmp_path: Path, choice: Any, inverts: bool, expected: float
) -> None:
    vae = {**VAE, "invert_scale_latents": inverts}
    checkpoint = open_folder(write_configs(tmp_path / "model", {**TRANSFORMER_1_0, "in_channels": 32}, vae))
    changed = with_conditioning(checkpoint, ConditioningOptions(image_latents_scale=choice))
    assert changed.image_scaling_factor == pytest.approx(expected)
    assert changed.scaling_factor == 0.7  # of the video, always multiplied


# --- the type of the weights ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_dtype_is_that_of_the_saved_file(copy_of_tiny: Path, dtype: torch.dtype) -> None:
    transformer = CogVideoXTransformer3DModel.from_pretrained(copy_of_tiny, subfolder="transformer")
    transformer.to(dtype).save_pretrained(copy_of_tiny / "transformer")
    checkpoint = open_folder(copy_of_tiny)
    assert checkpoint.weights_dtype == dtype
    assert checkpoint.dtype_for(None, CUDA) == dtype


def test_weights_dtype_is_read_from_a_sharded_file(copy_of_tiny: Path) -> None:
    transformer = CogVideoXTransformer3DModel.from_pretrained(copy_of_tiny, subfolder="transformer")
    (copy_of_tiny / WEIGHTS).unlink()
    transformer.to(torch.bfloat16).save_pretrained(copy_of_tiny / "transformer", max_shard_size="1MB")
    assert len(list((copy_of_tiny / "transformer").glob("*.safetensors"))) > 1
    assert open_folder(copy_of_tiny).weights_dtype == torch.bfloat16


@pytest.mark.parametrize(("variant", "expected"), [(None, torch.float32), ("fp16", torch.float16)])
def test_weights_dtype_is_that_of_the_variant_in_use(
    copy_of_tiny: Path, variant: str | None, expected: torch.dtype
) -> None:
    transformer = CogVideoXTransformer3DModel.from_pretrained(copy_of_tiny, subfolder="transformer")
    transformer.to(torch.float16).save_pretrained(copy_of_tiny / "transformer", variant="fp16")
    assert (copy_of_tiny / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = CogVideoXTransformer3DModel.from_pretrained(copy_of_tiny, subfolder="transformer", variant=variant)
    are_rounded = all(torch.equal(weight, weight.half().float()) for weight in loaded.parameters())
    assert are_rounded == (expected == torch.float16)  # the file that stock diffusers takes
    assert open_folder(copy_of_tiny, variant=variant).weights_dtype == expected


def test_weights_dtype_without_safetensors_is_fp32(tmp_path: Path) -> None:
    assert open_folder(write_configs(tmp_path / "model", TRANSFORMER_1_0, VAE)).weights_dtype == torch.float32


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize(
    ("choice", "expected"),
    [("fp32", torch.float32), ("no", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_dtype_for_a_choice_is_that_choice_everywhere(
    checkpoint: Checkpoint, choice: str, expected: torch.dtype, device: torch.device
) -> None:
    assert checkpoint.dtype_for(choice, device) == expected


def test_dtype_for_no_choice_is_the_files_on_a_gpu_and_fp32_on_a_cpu(tmp_path: Path) -> None:
    """Trap: a T5 in fp32 on a GPU."""
    folder = write_configs(tmp_path / "model", TRANSFORMER_1_0, VAE)
    save_file({"weight": torch.zeros(2, dtype=torch.bfloat16)}, folder / WEIGHTS)
    checkpoint = open_folder(folder)
    assert checkpoint.dtype_for(None, CUDA) == torch.bfloat16
    assert checkpoint.dtype_for(None, CPU) == torch.float32


# --- the fingerprint ---


def test_fingerprint_stays_when_the_folder_is_copied(checkpoint: Checkpoint, copy_of_tiny: Path) -> None:
    copied = open_folder(copy_of_tiny)
    for component in ("vae", "text_encoder", "tokenizer", "transformer"):
        assert copied.fingerprint(component) == checkpoint.fingerprint(component)


def test_fingerprint_is_different_for_each_component(checkpoint: Checkpoint) -> None:
    components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    assert len({checkpoint.fingerprint(component) for component in components}) == len(components)


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_fingerprint_changes_with_one_weight_of_a_small_file(
    copy_of_tiny: Path, checkpoint: Checkpoint, position: str
) -> None:
    path = copy_of_tiny / "text_encoder" / "model.safetensors"
    content = bytearray(path.read_bytes())
    weights_start = 8 + int.from_bytes(content[:8], "little")
    count = (len(content) - weights_start) // 4
    index = {"first": 0, "middle": count // 2, "last": count - 1}[position]
    content[weights_start + 4 * index] ^= 1  # the last bit of one number
    path.write_bytes(content)
    assert open_folder(copy_of_tiny).fingerprint("text_encoder") != checkpoint.fingerprint("text_encoder")


@given(size=st.integers(1, 3 * 65536), place=st.floats(0, 1, exclude_max=True))
@example(size=3 * 65536, place=0.4)
def test_fingerprint_sees_every_byte_of_a_file_of_three_samples(
    tmp_path_factory: pytest.TempPathFactory, size: int, place: float
) -> None:
    """Three samples of 64 KiB are promised: a file no larger than that has no blind spot."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "vae").mkdir()
    checkpoint = Checkpoint("", folder, None, {}, {}, {})
    content = bytearray(size)
    (folder / "vae" / "weights").write_bytes(content)
    before = checkpoint.fingerprint("vae")
    content[int(place * size)] = 1
    (folder / "vae" / "weights").write_bytes(content)
    assert checkpoint.fingerprint("vae") != before


def test_fingerprint_of_a_large_file_sees_its_start_middle_and_end(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    checkpoint = Checkpoint("", tmp_path, None, {}, {}, {})
    size = 1 << 20
    seen = set()
    for index in (None, 0, size // 2, size - 1):
        content = bytearray(size)
        if index is not None:
            content[index] = 1
        (tmp_path / "vae" / "weights").write_bytes(content)
        seen.add(checkpoint.fingerprint("vae"))
    (tmp_path / "vae" / "weights").write_bytes(bytes(size + 1))
    seen.add(checkpoint.fingerprint("vae"))
    assert len(seen) == 5


def test_fingerprint_changes_with_the_config(copy_of_tiny: Path, checkpoint: Checkpoint) -> None:
    path = copy_of_tiny / "vae" / "config.json"
    path.write_text(path.read_text().replace('"scaling_factor": 0.7', '"scaling_factor": 0.8'))
    changed = open_folder(copy_of_tiny)
    assert changed.scaling_factor == 0.8
    assert changed.fingerprint("vae") != checkpoint.fingerprint("vae")
    assert changed.fingerprint("text_encoder") == checkpoint.fingerprint("text_encoder")


def test_fingerprint_changes_with_the_name_of_a_file_and_not_with_hidden_files(
    copy_of_tiny: Path, checkpoint: Checkpoint
) -> None:
    (copy_of_tiny / "vae" / ".gitattributes").write_text("left by a download")
    assert open_folder(copy_of_tiny).fingerprint("vae") == checkpoint.fingerprint("vae")
    (copy_of_tiny / "vae" / "config.json").rename(copy_of_tiny / "vae" / "configuration.json")
    assert checkpoint.fingerprint("vae") != Checkpoint("", copy_of_tiny, None, {}, {}, {}).fingerprint("vae")


def test_fingerprint_follows_the_links_of_the_hubs_cache(tiny_model: Path, tmp_path: Path) -> None:
    """The Hub's cache holds links to files named by their hash."""
    linked, copied = tmp_path / "linked", tmp_path / "copied"
    for number, path in enumerate(sorted((tiny_model / "vae").iterdir())):
        for folder in (linked, copied):
            (folder / "vae").mkdir(parents=True, exist_ok=True)
        blob = tmp_path / f"blob-{number}"
        shutil.copy(path, blob)
        (linked / "vae" / path.name).symlink_to(blob)
        shutil.copy(path, copied / "vae" / path.name)
    prints = [Checkpoint("", folder, None, {}, {}, {}).fingerprint("vae") for folder in (linked, copied)]
    assert prints[0] == prints[1]
    blob = tmp_path / "blob-1"
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    assert Checkpoint("", linked, None, {}, {}, {}).fingerprint("vae") != prints[0]


def test_fingerprint_stays_when_another_variant_is_downloaded_beside(
    copy_of_tiny: Path, checkpoint: Checkpoint
) -> None:
    """A set prepared from the default weights still fits after `--variant fp16` was tried once."""
    weights = load_file(copy_of_tiny / "vae" / "diffusion_pytorch_model.safetensors")
    other = copy_of_tiny / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({name: value.half() for name, value in weights.items()}, other)
    assert open_folder(copy_of_tiny).fingerprint("vae") == checkpoint.fingerprint("vae")
    assert open_folder(copy_of_tiny, variant="fp16").fingerprint("vae") != checkpoint.fingerprint("vae")


# --- what is refused ---


def refusal(name: Path | str) -> str:
    """The message of the refusal, which always says what was asked for."""
    with pytest.raises(UserError) as error:
        open_folder(name)
    message = str(error.value)
    assert f"--pretrained_model_name_or_path {name}" in message
    assert "\n" not in message
    return message


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "no such folder" in refusal(tmp_path / "model.safetensors")


def test_folder_without_model_index_is_refused_with_the_name_of_what_is_missing(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "it has no model_index.json" in message
    assert "save_pretrained" in message


def test_another_pipeline_class_is_refused_by_its_name(copy_of_tiny: Path) -> None:
    path = copy_of_tiny / "model_index.json"
    path.write_text(path.read_text().replace("CogVideoXPipeline", "StableDiffusionPipeline"))
    assert "StableDiffusionPipeline" in refusal(copy_of_tiny)


def test_code_that_comes_with_a_model_is_refused(copy_of_tiny: Path) -> None:
    path = copy_of_tiny / "model_index.json"
    (copy_of_tiny / "scheduler/others.py").write_text("raise SystemExit('was run')")
    path.write_text(json.dumps({**json.loads(path.read_text()), "scheduler": ["others", "Scheduler"]}))
    assert "scheduler is of others, and code that comes with a model is not run" in refusal(copy_of_tiny)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_component_is_refused_by_its_name(copy_of_tiny: Path, component: str) -> None:
    shutil.rmtree(copy_of_tiny / component)
    assert f"lacks {component};" in refusal(copy_of_tiny)


def test_a_text_encoder_without_its_config_is_refused(copy_of_tiny: Path) -> None:
    (copy_of_tiny / "text_encoder/config.json").unlink()
    assert "lacks text_encoder/config.json;" in refusal(copy_of_tiny)


def test_all_missing_components_are_named_at_once(copy_of_tiny: Path) -> None:
    for component in ("vae", "scheduler"):
        shutil.rmtree(copy_of_tiny / component)
    assert "lacks vae, scheduler;" in refusal(copy_of_tiny)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize(
    ("content", "said"), [(b'{"in_channels": ', "unreadable"), (b"\xff\xfe", "unreadable"), (None, "it has no")]
)
def test_broken_or_missing_json_is_refused_with_the_files_name(
    copy_of_tiny: Path, file: str, content: bytes | None, said: str
) -> None:
    if content is None:
        (copy_of_tiny / file).unlink()
    else:
        (copy_of_tiny / file).write_bytes(content)
    assert f"{said} {file}" in refusal(copy_of_tiny)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
def test_json_that_is_no_mapping_is_refused_with_the_files_name(copy_of_tiny: Path, file: str) -> None:
    (copy_of_tiny / file).write_text("[]")
    assert file in refusal(copy_of_tiny)


# --- the Hub ---

Download = Callable[..., str]
HUB_NAME = "someone/some-model"


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/api/models/x"))


@pytest.mark.parametrize(
    "error",
    [
        RepositoryNotFoundError("401 Client Error.\nRepository Not Found", response=response(401)),
        GatedRepoError("403 Client Error.\nAccess is restricted", response=response(403)),
        RevisionNotFoundError("404 Client Error.\nRevision Not Found", response=response(404)),
        LocalEntryNotFoundError("cannot find the file in the cache"),
        OfflineModeIsEnabled("offline mode is on"),
        OSError("Cannot load model: model is not cached locally"),
        ValueError("no file of variant fp64"),
        httpx2.ConnectTimeout("timed out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hub_name_that_cannot_be_had_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    message = refusal(HUB_NAME)
    assert str(error).splitlines()[0] in message
    assert "Hugging Face Hub" in message


@pytest.mark.parametrize("name", ["../missing", "a/b/c", "missing", "/missing", "a b/c", "a/b/"])
def test_what_cannot_be_a_hub_name_is_never_looked_for_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert "no such folder" in refusal(name)


def test_hub_name_is_downloaded_with_revision_variant_and_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(tiny_model)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    checkpoint = open_folder(HUB_NAME, revision="abc", variant="fp16", cache_dir=tmp_path)
    assert calls == [(HUB_NAME, {"revision": "abc", "variant": "fp16", "cache_dir": tmp_path})]
    assert (checkpoint.name, checkpoint.folder, checkpoint.variant) == (HUB_NAME, tiny_model, "fp16")
    assert not checkpoint.is_local
    assert checkpoint.transformer["num_layers"] == 4


def test_a_download_is_told_before_it_starts_once_a_machine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_model: Path
) -> None:
    told: list[list[str]] = []  # by the time of each download

    def download(*_: Any, **__: Any) -> str:
        told.append(list(caplog.messages))
        return str(tiny_model)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    named = ModelOptions(pretrained_model_name_or_path=HUB_NAME)
    with caplog.at_level("INFO"):
        open_checkpoint(named)
        open_checkpoint(named, with_weights=False)
        open_folder(tiny_model)
        monkeypatch.setenv("LOCAL_RANK", "1")
        open_checkpoint(named)
    start = f"download   {HUB_NAME} from the Hugging Face Hub, unless its cache here has it: "
    lines = [f"{start}up to tens of gigabytes", f"{start}its configs, a few megabytes"]
    assert told == [lines[:1], lines, lines] and caplog.messages == lines


def test_a_folder_is_local_and_wins_over_the_hub(
    monkeypatch: pytest.MonkeyPatch, copy_of_tiny: Path, tmp_path: Path
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.chdir(copy_of_tiny.parent.parent)
    relative = f"{copy_of_tiny.parent.name}/{copy_of_tiny.name}"
    assert open_folder(relative).is_local
    monkeypatch.setenv("HOME", str(copy_of_tiny.parent))
    from_home = open_folder("~/copy")
    assert from_home.is_local
    assert from_home.folder == copy_of_tiny

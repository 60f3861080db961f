"""The prepared set against stock diffusers on frames decoded by plain PyAV, and against killed and repeated runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXEncoder3D
from PIL import Image, ImageOps
from safetensors.torch import load_file

from cogvideox_factory.config import DataOptions, EncodingOptions, ModelOptions, UserError
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.data.video import write_video
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.memory import text_encoder
from cogvideox_factory.memory.block_swap import swap_blocks
from cogvideox_factory.model.encoders import TextEncoder, VideoEncoder, to_unit_range
from cogvideox_factory.model.family import Checkpoint, open_checkpoint
from cogvideox_factory.prepare import check_prepared, prepare
from cogvideox_factory.resolve import resolve_data_options
from cogvideox_factory.stopping import Stopped, StopRequest

CPU = torch.device("cpu")
# A tenth of a second a clip; with this little to decode, starting processes for it would be most of the work.
SMALL = ("--frame_buckets", "9", "--height_buckets", "32", "--width_buckets", "48", "--num_decode_workers", "0")
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> CogVideoXPipeline:
    return CogVideoXPipeline.from_pretrained(tiny_model)


@pytest.fixture
def folder(tmp_path: Path, clips: Path) -> Path:
    """A data set of the first three rendered clips, named a.mp4, b.mp4 and c.mp4."""
    root = tmp_path / "data"
    root.mkdir()
    captions = (clips / "prompts.txt").read_text().splitlines()
    sources = (clips / "videos.txt").read_text().splitlines()
    for name, source in zip("abc", sources, strict=False):
        shutil.copy(clips / source, root / f"{name}.mp4")
    write_lists(root, dict(zip(("a.mp4", "b.mp4", "c.mp4"), captions, strict=False)))
    return root


def write_lists(root: Path, captions: dict[str, str]) -> None:
    (root / "videos.txt").write_text("".join(f"{name}\n" for name in captions), encoding="utf-8")
    (root / "prompts.txt").write_text("".join(f"{text}\n" for text in captions.values()), encoding="utf-8")


def read_lists(root: Path) -> dict[str, str]:
    names, texts = ((root / name).read_text(encoding="utf-8").splitlines() for name in ("videos.txt", "prompts.txt"))
    return dict(zip(names, texts, strict=True))


@pytest.fixture
def run(cli: Callable[..., tuple[int, str, str]], tiny_model: Path) -> Iterator[Run]:
    """Call `prepare` at a small size: exit code and standard error.

    One thread: these clips are so small that threads only wait for each other on a busy machine.
    """

    def call(root: Path, output: Path, *flags: str, size: tuple[str, ...] = SMALL) -> tuple[int, str]:
        code, out, messages = cli(
            *("prepare", "--pretrained_model_name_or_path", tiny_model, "--data_root", root),
            *("--output_dir", output, *size, *flags),
        )
        assert out == "" and "Traceback" not in messages
        return code, messages

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield call
    torch.set_num_threads(threads)


class Counts:
    """How often encoders are loaded and what they are given."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.text_loads = self.video_loads = self.videos = 0
        self.captions: list[str] = []
        load_text, load_video = TextEncoder.load, VideoEncoder.load
        encode_text, encode_video = TextEncoder.encode, VideoEncoder.encode

        def text_load(*arguments: Any, **options: Any) -> TextEncoder:
            self.text_loads += 1
            return load_text(*arguments, **options)

        def video_load(*arguments: Any, **options: Any) -> VideoEncoder:
            self.video_loads += 1
            return load_video(*arguments, **options)

        def text(encoder: TextEncoder, prompt: str) -> torch.Tensor:
            self.captions.append(prompt)
            return encode_text(encoder, prompt)

        def video(encoder: VideoEncoder, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            self.videos += 1
            return encode_video(encoder, pixels)

        patch.setattr(TextEncoder, "load", text_load)
        patch.setattr(VideoEncoder, "load", video_load)
        patch.setattr(TextEncoder, "encode", text)
        patch.setattr(VideoEncoder, "encode", video)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    with monkeypatch.context() as patch:
        yield Counts(patch)


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


def tensor_files(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*.safetensors")}


def latents_of(output: Path, entry: Entry) -> dict[str, torch.Tensor]:
    return load_file(output / entry.files["latents"][0])


def decoded(path: Path, chosen: list[int], cover: tuple[int, int], bucket: tuple[int, int]) -> list[Image.Image]:
    """Frames of a file by number, scaled to `cover` and cut around the centre to `bucket` (heights and widths)."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    top, left = (cover[0] - bucket[0]) // 2, (cover[1] - bucket[1]) // 2
    images = []
    for number in chosen:
        scaled = frames[number].reformat(
            width=cover[1], height=cover[0], format="rgb24", interpolation=Interpolation.BICUBIC
        )
        images.append(scaled.to_image().crop((left, top, left + bucket[1], top + bucket[0])))
    return images


@torch.no_grad()
def stock_latents(pipeline: CogVideoXPipeline, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Mean and log-variance as diffusers' own pre-processing and VAE give them."""
    pixels = pipeline.video_processor.preprocess_video(images).to(pipeline.vae.dtype)
    distribution = pipeline.vae.encode(pixels).latent_dist
    return {"mean": distribution.mean[0], "logvar": distribution.logvar[0]}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)


def test_latents_at_the_checkpoints_own_size_equal_those_of_stock_diffusers(
    run: Run, folder: Path, tmp_path: Path, stock: CogVideoXPipeline
) -> None:
    write_lists(folder, {"a.mp4": "one", "c.mp4": "two"})
    assert run(folder, tmp_path / "set", size=())[0] == 0
    entries = PreparedSet(tmp_path / "set").read_index()
    assert [entry.source for entry in entries] == ["a.mp4", "c.mp4"]
    different = []
    for entry in entries:
        images = decoded(folder / entry.source, list(range(17)), (64, 96), (64, 96))
        expected = stock_latents(stock, images)
        assert expected["mean"].shape == (8, 5, 8, 12) and expected["mean"].std() > 0.01
        assert_close(latents_of(tmp_path / "set", entry), expected)
        different.append(expected["mean"])
    assert (different[0] - different[1]).abs().max() > 1e-2  # so that one clip cannot stand for another


@pytest.mark.parametrize(
    ("flags", "chosen", "cover", "bucket"),
    [
        (("--width_buckets", "32"), list(range(9)), (32, 48), (32, 32)),  # cropped left and right
        (("--height_buckets", "32", "--width_buckets", "64"), list(range(9)), (43, 64), (32, 64)),  # above and below
        (("--width_buckets", "32", "--video_reshape_mode", "none"), list(range(9)), (32, 32), (32, 32)),
        (("--fps", "4"), list(range(0, 18, 2)), (32, 48), (32, 48)),
        (("--skip_frames_start", "5", "--skip_frames_end", "3"), list(range(5, 14)), (32, 48), (32, 48)),
    ],
)
def test_cropped_resampled_and_shortened_clips_equal_those_of_stock_diffusers(
    run: Run, folder: Path, tmp_path: Path, stock: CogVideoXPipeline, flags, chosen, cover, bucket
) -> None:
    write_lists(folder, {"c.mp4": "one"})
    size = tuple(item for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] not in flags for item in pair)
    code, messages = run(folder, tmp_path / "set", *flags, size=size)
    assert code == 0, messages
    (entry,) = PreparedSet(tmp_path / "set").read_index()
    assert tuple(entry.bucket) == (9, *bucket)
    expected = stock_latents(stock, decoded(folder / "c.mp4", chosen, cover, bucket))
    assert_close(latents_of(tmp_path / "set", entry), expected)


def test_prompt_embeddings_equal_those_of_the_stock_pipeline_bit_for_bit(
    run: Run, folder: Path, tmp_path: Path, stock: CogVideoXPipeline
) -> None:
    captions = {"a.mp4": "a red square moving left", "b.mp4": "A cat, 2.5 m long!", "c.mp4": "红色"}
    write_lists(folder, captions)
    assert run(folder, tmp_path / "set")[0] == 0
    prepared = PreparedSet(tmp_path / "set")
    files = {entry.caption: entry.files["prompt"][0] for entry in prepared.read_index()}
    assert list(files) == list(captions.values()) and len(set(files.values())) == 3
    for prompt, file in {**files, "": prepared.read_settings()["empty_prompt"]}.items():
        with torch.no_grad():
            expected = stock.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0]
        stored = prepared.read_tensors(file)["prompt_embeds"]
        assert stored.dtype == expected.dtype and torch.equal(stored, expected), prompt


def test_layer_by_layer_the_embeddings_are_the_same_and_are_not_made_again(
    run: Run, folder: Path, tmp_path: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lists(folder, {"c.mp4": "a red square moving left"})
    assert run(folder, tmp_path / "whole")[0] == 0
    swaps: list[int] = []
    monkeypatch.setattr(
        text_encoder, "swap_blocks", lambda *given, **blocks: swaps.append(swap_blocks(*given, **blocks).num_resident)
    )
    assert run(folder, tmp_path / "swapped", "--offload_text_encoder")[0] == 0
    assert swaps == [2] and counts.text_loads == 2
    assert tensor_files(tmp_path / "swapped") == tensor_files(tmp_path / "whole")
    assert run(folder, tmp_path / "swapped")[0] == 0
    assert counts.text_loads == 2


def test_bf16_sees_the_pixels_and_gives_the_embeddings_of_stock_diffusers(
    run: Run, folder: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock scales pixels in fp32 and rounds once; to round twice shifts half of the grey levels, by up to a half."""
    write_lists(folder, {"c.mp4": "a red square"})
    seen = []
    forward = CogVideoXEncoder3D.forward

    def look(encoder: CogVideoXEncoder3D, pixels: torch.Tensor, **caches: Any) -> Any:
        seen.append(pixels.clone())
        return forward(encoder, pixels, **caches)

    with monkeypatch.context() as patch:
        patch.setattr(CogVideoXEncoder3D, "forward", look)
        assert run(folder, tmp_path / "set", "--dtype", "bf16")[0] == 0
    (entry,) = PreparedSet(tmp_path / "set").read_index()
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model, dtype=torch.bfloat16)
    images = decoded(folder / "c.mp4", list(range(9)), (32, 48), (32, 48))
    with torch.no_grad():
        embeds = pipeline.encode_prompt("a red square", do_classifier_free_guidance=False)[0][0]
    assert torch.equal(load_file(tmp_path / "set" / entry.files["prompt"][0])["prompt_embeds"], embeds)
    ours = latents_of(tmp_path / "set", entry)
    for name, value in stock_latents(pipeline, images).items():
        assert ours[name].dtype == torch.bfloat16
        assert (ours[name] - value).abs().max() < 0.05  # convolutions in bf16 depend on the layout in memory
    assert len(seen) == 1 and seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], pipeline.video_processor.preprocess_video(images).bfloat16())


def test_a_second_run_encodes_nothing_and_loads_no_encoder(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "set"
    assert run(folder, output)[0] == 0
    assert report(output) == {"clips": 3, "encoded": 3, "reused": 0, "skipped": []}
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*.safetensors")}
    assert len(before) == 3 + 4  # and the empty prompt

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(VideoEncoder, "load", refuse)
    monkeypatch.setattr(TextEncoder, "load", refuse)
    code, messages = run(folder, output)
    assert code == 0 and "0 encoded, 3 reused, 0 skipped" in messages
    assert report(output) == {"clips": 3, "encoded": 0, "reused": 3, "skipped": []}
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*.safetensors")}


def test_a_changed_caption_encodes_only_the_caption(run: Run, folder: Path, tmp_path: Path, counts: Counts) -> None:
    output = tmp_path / "set"
    assert run(folder, output)[0] == 0
    assert sorted(counts.captions) == sorted(["", *read_lists(folder).values()]) and counts.videos == 3
    before = PreparedSet(output).read_index()
    write_lists(folder, {**read_lists(folder), "b.mp4": "a new caption"})
    assert run(folder, output)[0] == 0
    assert counts.captions[4:] == ["a new caption"]
    assert (counts.videos, counts.video_loads, counts.text_loads) == (3, 1, 2)
    after = PreparedSet(output).read_index()
    assert after[1].caption == "a new caption" and after[1].files["prompt"] != before[1].files["prompt"]
    assert after[1].files["latents"] == before[1].files["latents"] and after[1].key != before[1].key
    assert [after[0], after[2]] == [before[0], before[2]]


def test_a_changed_file_of_the_same_name_is_encoded_again(
    run: Run, folder: Path, tmp_path: Path, counts: Counts, stock: CogVideoXPipeline
) -> None:
    output = tmp_path / "set"
    assert run(folder, output)[0] == 0
    before = PreparedSet(output).read_index()
    stat = (folder / "a.mp4").stat()
    shutil.copy(folder / "c.mp4", tmp_path / "other.mp4")
    content = (tmp_path / "other.mp4").read_bytes() + b"\0" * 8  # another file, also by its content
    (folder / "a.mp4").write_bytes(content)
    os.utime(folder / "a.mp4", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(folder, output)[0] == 0
    assert report(output) == {"clips": 3, "encoded": 1, "reused": 2, "skipped": []}
    assert (counts.videos, counts.text_loads) == (4, 1)
    after = PreparedSet(output).read_index()
    assert after[0].files["latents"] != before[0].files["latents"] and after[1:] == before[1:]
    expected = stock_latents(stock, decoded(folder / "c.mp4", list(range(9)), (32, 48), (32, 48)))
    assert_close(latents_of(output, after[0]), expected)


def test_names_of_every_sort_are_kept_apart(run: Run, folder: Path, tmp_path: Path, stock: CogVideoXPipeline) -> None:
    """Trap: names cut at the first dot, and equal names of two folders, share a file."""
    names = {"one/clip.mp4": "a.mp4", "two/clip.mp4": "b.mp4", "two/红色 方块.v1.2.mp4": "c.mp4"}
    captions = {name: f"一个 caption of {name}" for name in names}
    for name, source in names.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / source, folder / name)
    write_lists(folder, captions)
    output = tmp_path / "a set.v2 名"
    code, messages = run(folder, output)
    assert code == 0, messages
    index = PreparedSet(output).read_index()
    assert {entry.source: entry.caption for entry in index} == captions
    assert len({entry.key for entry in index}) == len({entry.files["latents"] for entry in index}) == 3
    for entry in index:
        expected = stock_latents(stock, decoded(folder / names[entry.source], list(range(9)), (32, 48), (32, 48)))
        assert_close(latents_of(output, entry), expected)
    assert (output / "index.jsonl").read_text(encoding="utf-8").count("红色 方块") == 2


def spoil(folder: Path) -> dict[str, str]:
    """Put clips that cannot be used beside two good ones; what the report must say of each."""
    (folder / "corrupt.mp4").write_bytes(b"not a video at all" * 100)
    frames = np.full((5, 32, 48, 3), 90, dtype=np.uint8)
    write_video(folder / "short.mp4", frames, 8)
    shutil.copy(folder / "b.mp4", folder / "mute.mp4")
    captions = read_lists(folder)
    good = {name: captions[name] for name in ("a.mp4", "c.mp4")}
    bad = {"missing.mp4": "x", "corrupt.mp4": "x", "short.mp4": "x", "mute.mp4": ""}
    # An empty caption at the end of the list would be an empty last line.
    write_lists(folder, {"a.mp4": good["a.mp4"], **bad, "c.mp4": good["c.mp4"]})
    return {
        "missing.mp4": "no such file",
        "corrupt.mp4": "cannot be read as a video",
        "short.mp4": "is too short: 5 frames at 8 fps, the smallest bucket has 9",
        "mute.mp4": "has no caption",
    }


def test_clips_that_cannot_be_used_are_named_with_the_reason_and_the_others_kept(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    """Trap: a fault is printed, its clip not named, and the rest lost."""
    reasons = spoil(folder)
    code, messages = run(folder, tmp_path / "set")
    assert code == 0
    written = report(tmp_path / "set")
    assert (written["clips"], written["encoded"], written["reused"]) == (6, 2, 0)
    assert [item["path"] for item in written["skipped"]] == list(reasons)
    for item in written["skipped"]:
        assert reasons[item["path"]] in item["reason"]
        assert f"skipped {item['path']}: {item['reason']}" in messages
    assert [entry.source for entry in PreparedSet(tmp_path / "set").read_index()] == ["a.mp4", "c.mp4"]


@pytest.mark.parametrize("name", ["missing.mp4", "corrupt.mp4", "short.mp4", "mute.mp4"])
def test_strict_stops_at_the_first_of_them(run: Run, folder: Path, tmp_path: Path, name: str) -> None:
    reasons = spoil(folder)
    captions = read_lists(folder)
    write_lists(folder, {name: captions[name], "a.mp4": captions["a.mp4"]})
    code, messages = run(folder, tmp_path / "set", "--strict")
    assert code == 2 and name in messages and reasons[name] in messages
    assert not (tmp_path / "set/index.jsonl").exists()


@pytest.mark.parametrize("strict", [False, True])
def test_a_clip_that_breaks_off_in_the_middle_is_found_while_decoding(
    run: Run, folder: Path, tmp_path: Path, strict: bool
) -> None:
    generator = np.random.default_rng(0)  # noise does not compress, so that half of the file is half of the frames
    write_video(folder / "b.mp4", generator.integers(0, 255, (25, 64, 96, 3), dtype=np.uint8), 8)
    content = bytearray((folder / "b.mp4").read_bytes())
    content[len(content) // 4 :] = bytes(len(content) - len(content) // 4)  # the packets' list stays whole
    (folder / "b.mp4").write_bytes(content)
    code, messages = run(folder, tmp_path / "set", *(("--strict",) if strict else ()))
    assert "b.mp4" in messages
    if strict:
        assert code == 2
    else:
        assert code == 0
        assert [item["path"] for item in report(tmp_path / "set")["skipped"]] == ["b.mp4"]
        assert [entry.source for entry in PreparedSet(tmp_path / "set").read_index()] == ["a.mp4", "c.mp4"]


def test_a_set_without_a_usable_clip_is_a_users_error_naming_the_first_reason(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    write_lists(folder, {"gone.mp4": "x"})
    code, messages = run(folder, tmp_path / "set")
    assert code == 2 and "no usable clip among 1" in messages and "gone.mp4: no such file" in messages
    assert report(tmp_path / "set")["skipped"] == [{"path": "gone.mp4", "reason": "no such file"}]
    assert not (tmp_path / "set/index.jsonl").exists()


def test_sizes_that_do_not_divide_are_rounded_to_the_nearest_and_told(run: Run, folder: Path, tmp_path: Path) -> None:
    size = ("--frame_buckets", "9", "--height_buckets", "37", "--width_buckets", "44")
    code, messages = run(folder, tmp_path / "set", size=size)
    assert code == 0
    assert "--height_buckets 37: not a multiple of 16, 32 is used" in messages
    assert "--width_buckets 44: not a multiple of 16, 48 is used" in messages
    assert {tuple(entry.bucket) for entry in PreparedSet(tmp_path / "set").read_index()} == {(9, 32, 48)}
    assert "not a multiple" not in run(folder, tmp_path / "set")[1]


@pytest.mark.parametrize(("frames", "nearest"), [("50", ("49", "56")), ("10", ("9", "16")), ("23", ("17", "24"))])
def test_a_number_of_frames_that_the_vae_cannot_encode_is_refused_naming_the_nearest(
    run: Run, folder: Path, tmp_path: Path, frames: str, nearest: tuple[str, str]
) -> None:
    code, messages = run(folder, tmp_path / "set", size=("--frame_buckets", "9", frames))
    assert code == 2 and f"--frame_buckets {frames}" in messages
    assert f"nearest are {nearest[0]} and {nearest[1]}" in messages
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("frames", [8, 9, 16, 17, 48, 49, 81])
def test_numbers_of_frames_that_the_vae_encodes_are_taken(checkpoint: Checkpoint, frames: int) -> None:
    resolved = resolve_data_options(DataOptions(frame_buckets=(frames, frames)), checkpoint)
    assert resolved["frame_buckets"] == (frames,)


def test_sizes_and_rate_that_are_not_given_are_the_checkpoints(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert resolve_data_options(DataOptions(), checkpoint) == {
        "frame_buckets": (17,),
        "height_buckets": (64,),
        "width_buckets": (96,),
        "fps": 8.0,
    }
    build_tiny_pipeline(sample_frames=9, sample_height=6, sample_width=10).save_pretrained(tmp_path)
    other = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(tmp_path)))
    assert resolve_data_options(DataOptions(), other) == {
        "frame_buckets": (9,),
        "height_buckets": (48,),
        "width_buckets": (80,),
        "fps": 8.0,
    }
    newer = replace(other, transformer={**other.transformer, "patch_size_t": 2, "sample_frames": 81})
    assert resolve_data_options(DataOptions(), newer) == {
        "frame_buckets": (81,),
        "height_buckets": (768,),
        "width_buckets": (1360,),
        "fps": 16.0,
    }
    given = DataOptions(frame_buckets=(9, 8), height_buckets=(32, 64, 30), width_buckets=(16,), fps=5.0)
    assert resolve_data_options(given, checkpoint) == {
        "frame_buckets": (9, 8),
        "height_buckets": (32, 64),
        "width_buckets": (16,),
        "fps": 5.0,
    }


def resolved(folder: Path, checkpoint: Checkpoint) -> DataOptions:
    data = DataOptions(data_root=folder, frame_buckets=(9,), height_buckets=(32,), width_buckets=(48,))
    return replace(data, **resolve_data_options(data, checkpoint))


def test_a_request_to_stop_ends_the_work_before_the_next_clip_is_read(
    folder: Path, tmp_path: Path, checkpoint: Checkpoint, counts: Counts
) -> None:
    stop = StopRequest()
    stop.requested = True
    with pytest.raises(Stopped):
        prepare(checkpoint, resolved(folder, checkpoint), EncodingOptions(), PreparedSet(tmp_path / "set"), CPU, stop)
    assert counts.captions == [] and counts.videos == 0


@pytest.mark.parametrize(("encoder", "captions", "videos"), [(TextEncoder, 1, 0), (VideoEncoder, 4, 1)])
def test_a_request_to_stop_keeps_what_is_encoded(
    folder: Path,
    tmp_path: Path,
    checkpoint: Checkpoint,
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
    encoder: Any,
    captions: int,
    videos: int,
) -> None:
    data, prepared, stop = resolved(folder, checkpoint), PreparedSet(tmp_path / "set"), StopRequest()
    encode = encoder.encode

    def ask_then_encode(self: Any, given: Any) -> Any:
        stop.requested = True
        return encode(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", ask_then_encode)
        with pytest.raises(Stopped, match="start again to go on"):
            prepare(checkpoint, data, EncodingOptions(), prepared, CPU, stop)
    assert (len(counts.captions), counts.videos) == (captions, videos)
    assert len(tensor_files(tmp_path / "set")) == captions + videos
    assert not (tmp_path / "set/index.jsonl").exists()
    entries = prepare(checkpoint, data, EncodingOptions(), prepared, CPU, StopRequest())
    assert entries == prepared.read_index() and len(entries) == 3
    assert (len(counts.captions), counts.videos) == (4, 3)  # nothing twice
    assert report(tmp_path / "set") == {"clips": 3, "encoded": 3 - videos, "reused": videos, "skipped": []}


def test_sigterm_stops_the_command_with_code_75_after_the_clip_in_hand(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = VideoEncoder.encode
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def ask_then_encode(encoder: VideoEncoder, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return encode(encoder, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(VideoEncoder, "encode", ask_then_encode)
        code, messages = run(folder, tmp_path / "set")
    assert code == 75 and "kept; start again to go on" in messages
    assert len(list((tmp_path / "set/latents").iterdir())) == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert run(folder, tmp_path / "set")[0] == 0
    assert report(tmp_path / "set") == {"clips": 3, "encoded": 2, "reused": 1, "skipped": []}


@pytest.mark.parametrize("nth", [3, 6])
def test_a_run_killed_in_the_middle_of_a_write_and_repeated_equals_one_made_in_one_go(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    assert run(folder, tmp_path / "whole")[0] == 0
    flush, writes = os.fsync, []

    def die_at_the_nth(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) == nth:
            raise KeyboardInterrupt
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die_at_the_nth)
        assert run(folder, tmp_path / "parts")[0] == 130
    whole, parts = tensor_files(tmp_path / "whole"), tensor_files(tmp_path / "parts")
    assert nth - 1 <= len(parts) < len(whole) == 7 and parts.items() <= whole.items()
    assert not (tmp_path / "parts/index.jsonl").exists()
    leftover = tmp_path / "parts/latents/.half.safetensors.1.part"  # what a power cut would leave
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")
    with monkeypatch.context() as patch:
        counts = Counts(patch)
        assert run(folder, tmp_path / "parts")[0] == 0
    assert len(counts.captions) + counts.videos == len(whole) - len(parts)
    assert tensor_files(tmp_path / "parts") == whole
    for name in ("index.jsonl", "settings.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_every_option_that_changes_the_tensors_gives_other_files(run: Run, folder: Path, tmp_path: Path) -> None:
    write_lists(folder, {"a.mp4": "a red square"})
    output = tmp_path / "set"
    seen: dict[str, set[tuple[str, ...]]] = {"latents": set(), "prompt": set()}
    for flags, changed in (
        ((), {"latents", "prompt"}),
        (("--dtype", "bf16"), {"latents", "prompt"}),
        (("--use_tiling",), {"latents"}),
        (("--max_sequence_length", "16"), {"prompt"}),
        (("--fps", "4"), {"latents"}),
        (("--skip_frames_start", "1"), {"latents"}),
        (("--random_flip", "1"), {"latents"}),
        (("--video_reshape_mode", "none"), set()),  # this clip has the shape of its bucket
        (("--dtype", "fp32"), set()),  # as on a CPU without the flag
        (("--max_sequence_length", "226"), set()),  # the checkpoint's
    ):
        code, messages = run(folder, output, *flags)
        assert code == 0, messages
        (entry,) = PreparedSet(output).read_index()
        assert {kind for kind in seen if entry.files[kind] not in seen[kind]} == changed, flags
        for kind in seen:
            seen[kind].add(entry.files[kind])
        prompt = load_file(output / entry.files["prompt"][0])["prompt_embeds"]
        assert prompt.shape == (16 if "16" in flags else 226, 32)
        assert prompt.dtype == latents_of(output, entry)["mean"].dtype
        assert prompt.dtype == (torch.bfloat16 if "bf16" in flags else torch.float32)


def test_tiling_is_really_switched_on(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lists(folder, {"a.mp4": "a red square"})
    vaes = []
    encode = VideoEncoder.encode

    def look(encoder: VideoEncoder, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        vaes.append((encoder.vae.use_tiling, encoder.vae.dtype))
        return encode(encoder, pixels)

    monkeypatch.setattr(VideoEncoder, "encode", look)
    assert run(folder, tmp_path / "plain")[0] == 0
    assert run(folder, tmp_path / "tiled", "--use_tiling", "--dtype", "bf16")[0] == 0
    assert vaes == [(False, torch.float32), (True, torch.bfloat16)]


def test_a_set_of_other_encoders_is_refused_and_prepared_anew_beside_the_old(
    run: Run, folder: Path, tmp_path: Path, checkpoint: Checkpoint, cli: Callable[..., tuple[int, str, str]]
) -> None:
    write_lists(folder, {"a.mp4": "a red square"})
    output = tmp_path / "set"
    assert run(folder, output)[0] == 0
    before = tensor_files(output)
    assert check_prepared(checkpoint, PreparedSet(output))["fps"] == 8.0
    build_tiny_pipeline(seed=9).save_pretrained(tmp_path / "other")
    other = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "other")))
    with pytest.raises(UserError, match="another vae"):
        check_prepared(other, PreparedSet(output))
    code, _, messages = cli(
        *("prepare", "--pretrained_model_name_or_path", tmp_path / "other", "--data_root", folder),
        *("--output_dir", output, *SMALL),
    )
    assert code == 0, messages
    assert report(output)["encoded"] == 1 and before.items() <= tensor_files(output).items()
    assert check_prepared(other, PreparedSet(output))
    with pytest.raises(UserError, match="another vae"):
        check_prepared(checkpoint, PreparedSet(output))


def test_a_clip_listed_twice_or_copied_is_encoded_once(run: Run, folder: Path, tmp_path: Path, counts: Counts) -> None:
    shutil.copy(folder / "a.mp4", folder / "copy.mp4")
    write_lists(folder, {"a.mp4": "a red square", "copy.mp4": "another caption"})
    assert run(folder, tmp_path / "set")[0] == 0
    assert counts.videos == 1
    assert len(PreparedSet(tmp_path / "set").read_index()) == 2


# Views: what is random while decoding is stored, to be drawn by the training


def test_random_crops_and_flips_are_encoded_as_views_that_equal_stock_diffusers_on_the_cropped_frames(
    run: Run, folder: Path, tmp_path: Path, stock: CogVideoXPipeline
) -> None:
    write_lists(folder, {"a.mp4": "a red square"})
    flags = ("--video_reshape_mode", "random", "--random_flip", "0.5", "--num_variants", "3")
    size = (*SMALL[:3], "32", "--width_buckets", "32", *SMALL[6:])  # 96×144 covers it with 32×48: room to the sides
    code, messages = run(folder, tmp_path / "set", *flags, size=size)
    assert code == 0, messages
    (entry,) = PreparedSet(tmp_path / "set").read_index()
    assert len(entry.files["latents"]) == 3 and len(set(entry.files["latents"])) > 1
    frames = decoded(folder / "a.mp4", list(range(9)), (32, 48), (32, 48))
    found = set()
    for file in entry.files["latents"]:
        stored = load_file(tmp_path / "set" / file)
        matches = []
        for left in range(17):
            cropped = [image.crop((left, 0, left + 32, 32)) for image in frames]
            for is_flipped in (False, True):
                images = [ImageOps.mirror(image) for image in cropped] if is_flipped else cropped
                error = max(
                    float((stored[name] - value).abs().max()) for name, value in stock_latents(stock, images).items()
                )
                matches += [(left, is_flipped)] if error < 1e-4 else []
        assert matches
        found.add(matches[0])
    assert len(found) == len(set(entry.files["latents"])) and {flip for _, flip in found} == {False, True}
    assert run(folder, tmp_path / "set", *flags, size=size)[0] == 0
    assert report(tmp_path / "set")["reused"] == 1  # drawn by the clip, the same again


def test_a_flip_of_centred_clips_costs_two_encodings_however_many_views_there_are(
    run: Run, folder: Path, tmp_path: Path, counts: Counts
) -> None:
    assert run(folder, tmp_path / "set", "--random_flip", "0.5", "--num_variants", "8")[0] == 0
    for entry in PreparedSet(tmp_path / "set").read_index():
        files = entry.files["latents"]
        assert len(files) == 8 and sorted(files.count(file) for file in set(files)) == [4, 4]
    assert counts.videos == 6


def test_several_excerpts_of_a_clip_are_entries_of_their_own(
    run: Run, folder: Path, tmp_path: Path, stock: CogVideoXPipeline
) -> None:
    write_lists(folder, {"a.mp4": "a red square"})  # 25 frames at 8 fps
    flags = ("--frame_extraction", "slide", "--excerpt_stride", "8")
    assert run(folder, tmp_path / "set", *flags)[0] == 0
    entries = PreparedSet(tmp_path / "set").read_index()
    assert [entry.start for entry in entries] == [0.0, 1.0, 2.0]
    assert len({entry.key for entry in entries}) == 3
    for number, entry in enumerate(entries):
        frames = decoded(folder / "a.mp4", list(range(8 * number, 8 * number + 9)), (32, 48), (32, 48))
        assert_close(latents_of(tmp_path / "set", entry), stock_latents(stock, frames))
    assert report(tmp_path / "set") == {"clips": 1, "encoded": 1, "reused": 0, "skipped": []}


# Image-to-video: draws of the noised first frame


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an image-to-video checkpoint, with the same encoders."""
    path = tmp_path_factory.mktemp("image-model")
    build_tiny_pipeline(seed=0, num_layers=1, in_channels=16).save_pretrained(path)
    return path


@pytest.mark.slow
def test_image_to_video_stores_draws_of_the_noised_first_frame_and_reuses_the_videos(
    run: Run,
    folder: Path,
    tmp_path: Path,
    image_model: Path,
    cli: Callable[..., tuple[int, str, str]],
    stock: CogVideoXPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trap: cached latents of the image without the noise that training on clips has."""
    output = tmp_path / "set"
    write_lists(folder, {"a.mp4": "a red square"})
    assert run(folder, output)[0] == 0
    image_checkpoint = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(image_model)))
    with pytest.raises(UserError, match="lacks the first frames"):
        check_prepared(image_checkpoint, PreparedSet(output))
    pixels: list[torch.Tensor] = []
    encode = AutoencoderKLCogVideoX.encode

    def look(vae: AutoencoderKLCogVideoX, given: torch.Tensor) -> Any:
        pixels.append(given.clone())
        return encode(vae, given)

    arguments = ("prepare", "--pretrained_model_name_or_path", image_model, "--data_root", folder)
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKLCogVideoX, "encode", look)
        code, _, messages = cli(*arguments, "--output_dir", output, *SMALL, "--num_image_draws", "200")
    assert code == 0, messages
    *noised, without_noise = pixels
    assert [tuple(given.shape) for given in pixels] == [(1, 3, 1, 32, 48)] * 201  # the video is not encoded again
    assert check_prepared(image_checkpoint, PreparedSet(output))
    (entry,) = PreparedSet(output).read_index()
    (image_file,) = entry.files["images"]
    stored = load_file(output / image_file)
    assert stored["mean"].shape == (200, 8, 4, 6)
    (first,) = decoded(folder / "a.mp4", [0], (32, 48), (32, 48))
    clean = stock.video_processor.preprocess(first)[0]
    sigmas = []
    assert torch.equal(to_unit_range(without_noise[0, :, 0]), clean)
    with torch.no_grad():
        assert torch.allclose(
            encode(stock.vae, clean[None, :, None]).latent_dist.mean[0, :, 0], stored["first"], atol=1e-5
        )
    for given, mean in zip(noised, stored["mean"], strict=True):
        with torch.no_grad():
            assert torch.allclose(encode(stock.vae, given).latent_dist.mean[0, :, 0], mean, atol=1e-5)
        noise = given[0, :, 0] - clean
        sigmas.append(float(noise.std()))
        assert abs(float(noise.mean())) < 0.1 * sigmas[-1]
    logs = torch.tensor(sigmas).log()
    assert abs(float(logs.mean()) + 3.0) < 0.15 and abs(float(logs.std()) - 0.5) < 0.1  # of 200 draws
    before = tensor_files(output)
    assert cli(*arguments, "--output_dir", output, *SMALL, "--num_image_draws", "200")[0] == 0
    assert tensor_files(output) == before and report(output)["reused"] == 1
    again = tmp_path / "again"
    assert cli(*arguments, "--output_dir", again, *SMALL, "--num_image_draws", "200")[0] == 0
    assert tensor_files(again).items() <= before.items()  # the same noise wherever it is made


def test_a_folder_that_cannot_be_written_to_is_named(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, messages = run(folder, tmp_path / "file/set")
    assert code == 2 and f"--output_dir {tmp_path / 'file/set'}" in messages and "choose another folder" in messages


def test_what_is_damaged_is_made_anew_and_the_rest_is_not(
    folder: Path, tmp_path: Path, checkpoint: Checkpoint, counts: Counts
) -> None:
    data, prepared = resolved(folder, checkpoint), PreparedSet(tmp_path / "set")

    def run() -> list[Entry]:
        entries = prepare(checkpoint, data, EncodingOptions(), PreparedSet(prepared.folder), CPU, StopRequest())
        return entries

    first = run()
    before = tensor_files(prepared.folder)
    for file in (first[0].files["latents"][0], first[1].files["prompt"][0]):
        content = bytearray((prepared.folder / file).read_bytes())
        content[-1] ^= 1
        (prepared.folder / file).write_bytes(content)
    counts.captions.clear()
    counts.videos = 0
    assert run() == first
    assert (len(counts.captions), counts.videos) == (1, 1)
    assert tensor_files(prepared.folder) == before

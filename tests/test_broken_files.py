"""`prepare` on all that stands in real folders: each file is used, or named with a reason that fits; none is lost."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import rendered_videos
from safetensors.torch import load_file

from cogvideox_factory.cli import main
from cogvideox_factory.data.store import Entry, PreparedSet

SMALL = ("--frame_buckets", "9", "--height_buckets", "32", "--width_buckets", "48")
Command = Callable[..., tuple[int, str, str]]


def pictures(seed: int, count: int = 12, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Coarse noise, in which no two seeds look alike and which does not compress to nothing."""
    shape = (count, -(-height // 8), -(-width // 8), 3)
    blocks = np.random.default_rng(seed).integers(20, 235, shape, dtype=np.uint8)
    return list(blocks.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width])


def video_file(path: Path, images: Sequence[np.ndarray], **more: Any) -> Path:
    """A video as people have them: 8 frames a second, some loss."""
    return rendered_videos.video_file(path, images, **{"rate": 8, "options": {}, **more})


def cut_in_half(path: Path, images: Sequence[np.ndarray], *, faststart: bool) -> None:
    video_file(path, images, container_options={"movflags": "+faststart"} if faststart else {})
    content = path.read_bytes()
    moov, mdat = content.find(b"moov"), content.find(b"mdat")
    assert (0 < moov < mdat < len(content) // 2) if faststart else (0 < mdat < len(content) // 2 < moov)
    path.write_bytes(content[: len(content) // 2])


def sound_file(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


def joined_file(path: Path, seed: int) -> None:
    """Two raw streams, the second of another shape; the reader finds it only while it decodes."""
    for number, size in enumerate([(48, 64), (64, 48)]):
        video_file(path.with_suffix(f".{number}.h264"), pictures(seed, 16, *size))
    parts = [path.with_suffix(f".{number}.h264") for number in range(2)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def file_without_ending(path: Path, seed: int) -> None:
    video_file(path.with_suffix(".mp4"), pictures(seed))
    path.with_suffix(".mp4").rename(path)


def turned(stream: Any) -> None:
    stream.set_display_rotation(90)


VARIABLE = [0.0, 0.1, 0.12, 0.5, 0.55, 0.6, 1.0, 1.1, 1.3, 1.31, 1.4, 1.6]
GOOD: dict[str, Callable[[Path, int], object]] = {
    "plain.mp4": lambda path, seed: video_file(path, pictures(seed)),
    "odd size.mkv": lambda path, seed: video_file(path, pictures(seed, 12, 33, 47), codec="ffv1", pixels="yuv444p"),
    "odd size.mp4": lambda path, seed: video_file(path, pictures(seed, 12, 47, 33), pixels="yuv444p"),
    "turned.mp4": lambda path, seed: video_file(path, pictures(seed, 12, 64, 48), change_stream=turned),
    "variable rate.mp4": lambda path, seed: video_file(path, pictures(seed), seconds=VARIABLE),
    "10 bit.mp4": lambda path, seed: video_file(path, pictures(seed), pixels="yuv420p10le"),
    "raw.h264": lambda path, seed: video_file(path, pictures(seed, 40)),
    "no stamps.avi": lambda path, seed: video_file(path, pictures(seed), codec="mpeg4"),
    "slow.webm": lambda path, seed: video_file(path, pictures(seed), codec="libvpx", rate=5),
    "a.name.with.dots.v1.2.mp4": lambda path, seed: video_file(path, pictures(seed)),
    "пробел и 红色 🐈.mp4": lambda path, seed: video_file(path, pictures(seed)),
    "one/clip.mp4": lambda path, seed: video_file(path, pictures(seed)),
    "two/clip.mp4": lambda path, seed: video_file(path, pictures(seed)),
    "no ending": lambda path, seed: file_without_ending(path, seed),
}
BAD: dict[str, tuple[Callable[[Path, int], object], str]] = {
    "half, moov first.mp4": (
        lambda path, seed: cut_in_half(path, pictures(seed, 60), faststart=True),
        r"is cut off: holds \d+ of 60 frames",
    ),
    "half, moov last.mp4": (
        lambda path, seed: cut_in_half(path, pictures(seed, 60), faststart=False),
        r"cannot be read as a video \(.+\)",
    ),
    "empty.mp4": (lambda path, seed: path.write_bytes(b""), r"cannot be read as a video \(.+\)"),
    "sound.mp4": (lambda path, seed: sound_file(path), "has no picture"),
    "one frame.mp4": (
        lambda path, seed: video_file(path, pictures(seed, 1)),
        "is too short: 1 frames at 8 fps, the smallest bucket has 9",
    ),
    "short.mp4": (
        lambda path, seed: video_file(path, pictures(seed, 8)),
        "is too short: 8 frames at 8 fps, the smallest bucket has 9",
    ),
    "text.mp4": (
        lambda path, seed: path.write_text("This is no video.\n" * 50),
        r"cannot be read as a video \(.+\)",
    ),
    "changing.h264": (lambda path, seed: joined_file(path, seed), "changes its picture from 64x48 to 48x64 midway"),
    "folder.mp4": (lambda path, seed: path.mkdir(), "no such file"),
    "missing.mp4": (lambda path, seed: None, "no such file"),
    "gone/пропал.mp4": (lambda path, seed: None, "no such file"),
}
NAMES = sorted([*GOOD, *BAD])


def write_lists(root: Path, names: Sequence[str]) -> None:
    (root / "videos.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (root / "prompts.txt").write_text("a caption\n" * len(names))


def prepare_command(model: Path, root: Path, output: Path, *flags: str) -> list[str]:
    places = {"--pretrained_model_name_or_path": model, "--data_root": root, "--output_dir": output}
    return ["prepare", *(str(item) for pair in places.items() for item in pair), *SMALL, *flags]


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


def skipped(output: Path) -> dict[str, str]:
    return {item["path"]: item["reason"] for item in report(output)["skipped"]}


def tensor_files(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of all the good files and all the bad ones."""
    root = tmp_path_factory.mktemp("corpus")
    for seed, name in enumerate(NAMES):
        (GOOD[name] if name in GOOD else BAD[name][0])(root / name, seed)
    write_lists(root, NAMES)
    return root


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_model: Path) -> Path:
    """What `prepare` makes of it."""
    folder = tmp_path_factory.mktemp("prepared") / "set"
    assert main(prepare_command(tiny_model, corpus, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def index(output: Path) -> dict[str, Entry]:
    return {entry.source: entry for entry in PreparedSet(output).read_index()}


def test_no_file_is_lost(output: Path, index: dict[str, Entry]) -> None:
    assert list(index) == [name for name in NAMES if name in GOOD]
    assert list(skipped(output)) == [name for name in NAMES if name in BAD]
    counts = report(output)
    assert (counts["clips"], counts["encoded"], counts["reused"]) == (len(NAMES), len(GOOD), 0)
    assert len(counts["skipped"]) == len(BAD)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_reported_with_a_reason_that_fits(output: Path, name: str) -> None:
    assert re.fullmatch(BAD[name][1], skipped(output)[name])


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_has_latents_of_its_own(output: Path, index: dict[str, Entry], name: str) -> None:
    entry = index[name]
    assert tuple(entry.bucket) == (9, 32, 48)
    (file,) = entry.files["latents"]
    tensors = load_file(output / file)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "mean": (8, 3, 4, 6),
        "logvar": (8, 3, 4, 6),
    }
    for other, its_entry in index.items():
        if other != name:
            (its_file,) = its_entry.files["latents"]
            assert its_file != file and its_entry.key != entry.key
            assert (load_file(output / its_file)["mean"] - tensors["mean"]).abs().max() > 1e-2


def test_a_second_run_encodes_nothing_and_finds_the_same(
    cli: Command, corpus: Path, output: Path, tiny_model: Path, tmp_path: Path
) -> None:
    again = tmp_path / "set"
    shutil.copytree(output, again)
    code, out, messages = cli(*prepare_command(tiny_model, corpus, again))
    assert (code, out) == (0, "") and "Traceback" not in messages
    counts = report(again)
    assert (counts["encoded"], counts["reused"]) == (0, len(GOOD))
    assert skipped(again) == skipped(output)
    for name, reason in skipped(again).items():
        assert f"skipped {name}: {reason}\n" in messages
    assert f"{len(NAMES)} clips: 0 encoded, {len(GOOD)} reused, {len(BAD)} skipped" in messages
    assert tensor_files(again) == tensor_files(output)
    assert (again / "index.jsonl").read_bytes() == (output / "index.jsonl").read_bytes()


def test_in_one_process_the_same_is_made(
    cli: Command, corpus: Path, output: Path, tiny_model: Path, tmp_path: Path
) -> None:
    code, out, messages = cli(*prepare_command(tiny_model, corpus, tmp_path / "set", "--num_decode_workers", "0"))
    assert (code, out) == (0, "") and "Traceback" not in messages
    assert report(tmp_path / "set") == report(output)
    assert (tmp_path / "set/index.jsonl").read_bytes() == (output / "index.jsonl").read_bytes()
    assert tensor_files(tmp_path / "set").keys() == tensor_files(output).keys()


@pytest.mark.parametrize("name", BAD)
def test_strict_ends_in_one_line_and_keeps_what_is_encoded(
    cli: Command, corpus: Path, output: Path, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    root, kept = tmp_path / "data", tmp_path / "set"
    root.symlink_to(corpus)
    shutil.copytree(output, kept)
    lists = tmp_path / "clips.jsonl"
    lists.write_text("".join(json.dumps({"video": video, "text": "a caption"}) + "\n" for video in ("plain.mp4", name)))
    flags = ("--strict", "--dataset_file", str(lists))
    code, out, messages = cli(*prepare_command(tiny_model, root, kept, *flags))
    assert (code, out) == (2, "") and "Traceback" not in messages
    lines = re.split(r"[\r\n]+", messages)
    told = [line for line in lines if line and not re.match(r"(Reading|Encoding) |--\w+_buckets ", line)]
    (message,) = told
    assert re.fullmatch(rf"cogvideox-factory: error: {re.escape(name)}: {BAD[name][1]} \(--strict .+\)", message)
    assert tensor_files(kept) == tensor_files(output)
    for file in ("index.jsonl", "report.json"):
        assert (kept / file).read_bytes() == (output / file).read_bytes()


def test_strict_keeps_the_clips_that_were_encoded_before_the_broken_one(
    cli: Command, corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ("plain.mp4", "changing.h264"):
        shutil.copy(corpus / name, root / name)
    write_lists(root, ["plain.mp4", "changing.h264"])
    flags = ("--num_decode_workers", "1")  # which keeps the order
    code, _, messages = cli(*prepare_command(tiny_model, root, tmp_path / "set", "--strict", *flags))
    assert code == 2 and "changing.h264: changes its picture" in messages and "Traceback" not in messages
    assert len(list((tmp_path / "set/latents").iterdir())) == 1
    assert not (tmp_path / "set/index.jsonl").exists()
    assert cli(*prepare_command(tiny_model, root, tmp_path / "set", *flags))[0] == 0
    counts = report(tmp_path / "set")
    assert (counts["encoded"], counts["reused"], len(counts["skipped"])) == (0, 1, 1)


@pytest.mark.parametrize("place", ["anywhere", "in the headers"])
def test_a_file_with_random_damage_is_used_or_skipped(
    cli: Command, tiny_model: Path, tmp_path: Path, place: str
) -> None:
    root = tmp_path / "data"
    video_file(root / "good.mp4", pictures(0, 20), container_options={"movflags": "+faststart"})
    good = (root / "good.mp4").read_bytes()
    end = len(good) if place == "anywhere" else good.find(b"mdat")
    names = [f"{number}.mp4" for number in range(20)]
    for name in names:
        choose = random.Random(f"{place} {name}")
        content = bytearray(good)
        for position in choose.sample(range(end), 20):
            content[position] ^= choose.randrange(1, 256)
        (root / name).write_bytes(content)
    write_lists(root, ["good.mp4", *names])
    code, out, messages = cli(*prepare_command(tiny_model, root, tmp_path / "set"))
    assert (code, out) == (0, "") and "Traceback" not in messages
    used = [entry.source for entry in PreparedSet(tmp_path / "set").read_index()]
    lost = skipped(tmp_path / "set")
    assert "good.mp4" in used and sorted([*used, *lost]) == sorted(["good.mp4", *names])
    assert lost and all(lost.values())

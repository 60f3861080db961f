"""`inspect` on clips that have one thing wrong or nothing, and its sheet against the frames that training reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from transformers import T5Tokenizer

from cogvideox_factory import inspection
from cogvideox_factory.config import DataOptions
from cogvideox_factory.data.clips import Clip
from cogvideox_factory.data.excerpts import read_excerpts
from cogvideox_factory.data.video import read_frames, write_video
from cogvideox_factory.demo.world import Scene
from cogvideox_factory.inspection import spread

LONG_CAPTION = "a red square moving left on a dark background " * 30 + "and it's blue"
Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(cli: Callable[..., tuple[int, str, str]], tiny_model: Path, tmp_path: Path) -> Inspect:
    """Call `inspect` on a folder: exit code, standard output, standard error. Files are written to tmp_path/out."""

    def call(root: Path, *flags: str | Path) -> tuple[int, str, str]:
        code, out, messages = cli(
            *("inspect", "--pretrained_model_name_or_path", tiny_model, "--data_root", root),
            *("--output_dir", tmp_path / "out", "--num_decode_workers", "0", *flags),
        )
        assert "Traceback" not in messages
        return code, out, messages

    return call


def scene(seed: int) -> np.ndarray:
    """Frames of a slow pan over soft shapes: 12 of 96×144."""
    coarse = np.random.default_rng(seed).integers(20, 235, (8, 16, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((200, 96), Image.Resampling.BICUBIC))
    return np.stack([picture[:, index : index + 144] for index in range(12)])


def write_changing_picture(path: Path) -> None:
    """A transport stream that starts as a clip of 96×144 and goes on as one of 144×96."""
    content = b""
    for number, frames in enumerate((scene(1), scene(2).swapaxes(1, 2))):
        part = path.with_name("part.ts")
        with av.open(str(part), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"bf": "0"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for index, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture.pts = index + 12 * number
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        content += part.read_bytes()
        part.unlink()
    path.write_bytes(content)


def write_records(root: Path, records: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"video": video, "text": text}) for video, text in records]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip for every kind of problem; each is named by it, and has nothing else wrong."""
    root = tmp_path_factory.mktemp("faults")
    still = np.repeat(scene(3)[:1], 25, axis=0)
    videos: dict[str, tuple[np.ndarray, float]] = {
        "good.mp4": (Scene("red", "square", "moving left", "dark").render(), 8),
        "short.mp4": (Scene("red", "circle", "moving left", "dark").render()[:10], 8),
        "silent.mp4": (Scene("red", "triangle", "moving left", "dark").render(), 8),
        "small.mp4": (Scene("blue", "square", "moving left", "dark").render()[:, ::3, ::3], 8),
        "slow.mp4": (Scene("blue", "circle", "moving left", "dark").render()[::2], 4),
        "cut.mp4": (np.concatenate([scene(1)[:9], scene(2)[:11]]), 8),
        "black.mp4": (np.full_like(still, 2), 8),
        "static.mp4": (still, 8),
        "long.mp4": (Scene("blue", "triangle", "moving left", "dark").render(), 8),
        "same-a.mp4": (Scene("green", "square", "moving left", "dark").render(), 8),
        "same-b.mp4": (Scene("green", "circle", "moving left", "dark").render(), 8),
        "original.mp4": (Scene("green", "triangle", "moving left", "dark").render(), 8),
        "listed.mp4": (Scene("yellow", "square", "moving left", "dark").render(), 8),
    }
    for name, (frames, fps) in videos.items():
        write_video(root / name, frames, fps)
    shutil.copy(root / "original.mp4", root / "copy.mp4")
    (root / "broken.mp4").write_bytes(b"no video at all" * 100)
    write_changing_picture(root / "changing.ts")
    with wave.open(str(root / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    texts = {"silent.mp4": "", "long.mp4": LONG_CAPTION, "same-a.mp4": "the same", "same-b.mp4": "the same"}
    names = [*videos, "copy.mp4", "missing.mp4", "broken.mp4", "changing.ts", "sound.wav"]
    records = [(name, texts.get(name, f"this is {name}")) for name in names]
    write_records(root, [*records, ("listed.mp4", "once more")])
    return root


EXPECTED = {
    "unreadable": [("missing.mp4",), ("broken.mp4",), ("changing.ts",), ("sound.wav",)],
    "too_short": [("short.mp4",)],
    "caption_empty": [("silent.mp4",)],
    "too_few_pixels": [("small.mp4",)],
    "repeated_frames": [("slow.mp4",)],
    "cut": [("cut.mp4",)],
    "black": [("black.mp4",)],
    "static": [("static.mp4",)],
    "caption_too_long": [("long.mp4",)],
    "caption_duplicate": [("same-a.mp4", "same-b.mp4")],
    "same_clip_twice": [("original.mp4", "copy.mp4"), ("listed.mp4",)],
}


def test_every_kind_of_problem_is_found_and_nothing_else(
    inspect: Inspect, faults: Path, tiny_model: Path, tmp_path: Path
) -> None:
    code, out, _ = inspect(faults, "--json")
    assert code == 0
    report = json.loads(out)
    assert report == json.loads((tmp_path / "out" / "inspection.json").read_text())
    found: dict[str, list[tuple[str, ...]]] = {}
    reasons: dict[str, str] = {}
    for problem in report["problems"]:
        assert set(problem) == {"kind", "paths", "reason", "remedy", "is_fatal"} and problem["remedy"]
        assert problem["is_fatal"] == (problem["kind"] in ("unreadable", "too_short", "caption_empty"))
        found.setdefault(problem["kind"], []).append(tuple(problem["paths"]))
        reasons[problem["paths"][0]] = problem["reason"]
    assert found == EXPECTED
    assert (report["clips"], report["usable"], report["excerpts"]) == (19, 13, 13)

    assert reasons["missing.mp4"] == "no such file" and reasons["sound.wav"] == "has no picture"
    assert reasons["broken.mp4"].startswith("cannot be read as a video")
    assert reasons["changing.ts"] == "changes its picture from 144x96 to 96x144 midway"
    assert reasons["short.mp4"].startswith("is too short: 10 frames at 8 fps")
    assert "48x32" in reasons["small.mp4"] and "2.00 times" in reasons["small.mp4"]
    assert "4 frames a second" in reasons["slow.mp4"] and "--fps 8" in reasons["slow.mp4"]
    assert reasons["cut.mp4"] == f"a new scene begins at {9 / 8:.2f} s"
    assert "from 0.00 to 2.00 s" in reasons["black.mp4"]
    assert "“the same”" in reasons["same-a.mp4"]
    assert reasons["original.mp4"].startswith("2 files") and reasons["listed.mp4"] == "is listed 2 times"

    tokenizer = T5Tokenizer.from_pretrained(tiny_model, subfolder="tokenizer")
    seen = tokenizer(LONG_CAPTION, truncation=True, max_length=226).input_ids  # as the pipeline does it
    quoted = reasons["long.mp4"].split("“")[1].removesuffix("”")
    assert seen[-1] == tokenizer.eos_token_id and quoted.endswith("and it's blue")
    assert f"{tokenizer.decode(seen[:-1])} {quoted}" == LONG_CAPTION
    assert f"{len(tokenizer(LONG_CAPTION).input_ids)} tokens" in reasons["long.mp4"]


def test_nothing_is_wrong_with_the_rendered_clips(inspect: Inspect, clips: Path, tmp_path: Path) -> None:
    code, out, messages = inspect(clips, "--strict")
    assert code == 0 and "12 clips, 12 usable; 12 excerpts; 0 problems" in out
    report = json.loads((tmp_path / "out" / "inspection.json").read_text())
    bucket = {"bucket": "17x64x96", "frames": 17, "height": 64, "width": 96, "clips": 12, "excerpts": 12}
    assert report["buckets"] == [{**bucket, "cropped_share": 0, "upscaled": 0, "seconds": 12 * 17 / 8}]
    assert report["problems"] == []
    assert "Looking at clips" in messages  # bars go to standard error


def test_a_caption_that_just_fits_is_whole_and_one_token_more_is_cut(
    inspect: Inspect, clips: Path, tiny_model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(next((clips / "videos").iterdir()), root / "a.mp4")
    write_records(root, [("a.mp4", "red red red red red")])
    assert "too long" not in inspect(root, "--max_sequence_length", "6")[1]  # the sixth is the end token
    _, out, _ = inspect(root, "--max_sequence_length", "5")
    assert "has 6 tokens, of which 5 are read; this is not: “red”" in out


def test_the_text_holds_the_table_files_reasons_and_remedies(inspect: Inspect, faults: Path, tmp_path: Path) -> None:
    code, out, _ = inspect(faults, "--height_buckets", "64", "96", "--width_buckets", "96")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["bucket", "clips", "excerpts", "cropped", "upscaled", "seconds"]
    # All are 3:2, so the bucket of 64x96 is theirs but for that of small.mp4, which is too small for either.
    assert lines[1].split() == ["17x64x96", "13", "13", "0", "%", "1", f"{13 * 17 / 8:.1f}"]
    assert "19 clips, 13 usable, 6 skipped; 13 excerpts" in out
    heading = next(index for index, line in enumerate(lines) if line.startswith("cannot be read (4, skipped"))
    assert "→" in lines[heading] and lines[heading + 1] == "  missing.mp4: no such file"
    assert "  same-a.mp4, same-b.mp4: 2 clips" in out
    assert "cut inside (1, used nonetheless)" in out
    assert str(tmp_path / "out" / "contact_sheet.png") in out and str(tmp_path / "out" / "contact_sheet.html") in out


def test_of_very_many_problems_of_a_kind_the_first_twenty_are_printed(
    inspect: Inspect, clips: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(next((clips / "videos").iterdir()), root / "a.mp4")
    write_records(root, [("a.mp4", "a"), *((f"gone{number}.mp4", "x") for number in range(23))])
    _, out, _ = inspect(root)
    assert len(re.findall(r"^  gone\d+.mp4: no such file$", out, re.MULTILINE)) == 20
    assert "… and 3 more, see inspection.json" in out
    assert len(json.loads((tmp_path / "out" / "inspection.json").read_text())["problems"]) == 23


def test_strict_ends_with_exit_2_after_everything_was_written(inspect: Inspect, faults: Path, tmp_path: Path) -> None:
    code, out, messages = inspect(faults, "--strict", "--json")
    assert code == 2 and messages.rstrip().endswith("error: 15 problems in 19 clips (--strict)")
    assert len(json.loads(out)["problems"]) == 15
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("contact_sheet.png", "contact_sheet.html", "inspection.json"),
    }


def test_without_a_usable_clip_everything_is_written_before_exit_2(inspect: Inspect, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write_records(root, [("a.mp4", "a"), ("b.mp4", "")])
    code, out, messages = inspect(root)
    assert code == 2 and "no usable clip among 2; the first: a.mp4: no such file" in messages
    assert "b.mp4: has no caption" in out
    assert json.loads((tmp_path / "out" / "inspection.json").read_text())["usable"] == 0
    with Image.open(tmp_path / "out" / "contact_sheet.png") as picture:
        picture.load()
    assert "no such file" in (tmp_path / "out" / "contact_sheet.html").read_text()


def test_several_excerpts_of_a_clip_are_told_apart(inspect: Inspect, tmp_path: Path) -> None:
    """Black for its first 9 frames, then still, then a scene that is cut at frame 18 + 4."""
    root = tmp_path / "data"
    root.mkdir()
    black = np.zeros((9, 96, 144, 3), np.uint8)
    still = np.repeat(scene(5)[:1], 9, axis=0)
    moving = np.concatenate([scene(6)[:4], scene(7)[:5]])
    write_video(root / "a.mp4", np.concatenate([black, still, moving]), 8)
    write_records(root, [("a.mp4", "three excerpts")])
    flags = ("--frame_buckets", "9", "--frame_extraction", "slide", "--json")
    report = json.loads(inspect(root, *flags)[1])
    assert report["excerpts"] == 3 and report["buckets"][0]["clips"] == 1
    reasons = {problem["kind"]: problem["reason"] for problem in report["problems"]}
    assert reasons == {
        "black": "nearly no light from 0.00 to 1.00 s",
        "static": f"nothing moves from {9 / 8:.2f} to {17 / 8:.2f} s",
        "cut": f"a new scene begins at {22 / 8:.2f} s",
    }
    page = (tmp_path / "out" / "contact_sheet.html").read_text()
    badges = [re.findall("<b>(.*?)</b>", article) for article in page.split("<article>")[1:]]
    assert badges == [["black"], ["nothing moves"], ["cut inside"]]


# The contact sheet


def find_frame(page: np.ndarray, frame: np.ndarray) -> tuple[int, int]:
    """Top and left of the only place where a page holds exactly this picture."""
    height, width = frame.shape[:2]
    middle = frame[height // 2]
    places = []
    for top, left in zip(*np.nonzero((page == frame[height // 2, 0]).all(-1)), strict=True):
        if np.array_equal(page[top, left : left + width], middle):
            top -= height // 2
            if np.array_equal(page[top : top + height, left : left + width], frame):
                places.append((int(top), int(left)))
    assert len(places) == 1
    return places[0]


def read_page(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("size", [(64, 96), (96, 64)], ids=["landscape", "portrait"])
@pytest.mark.parametrize("flip", ["0", "1"])
def test_frames_on_the_sheet_are_those_of_the_excerpt(
    inspect: Inspect, clips: Path, tmp_path: Path, size: tuple[int, int], flip: str
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(sorted((clips / "videos").iterdir())[0], root / "a.mp4")
    write_records(root, [("a.mp4", "a red square")])
    height, width = map(str, size)
    flags = ("--height_buckets", height, "--width_buckets", width, "--random_flip", flip)
    assert inspect(root, *flags)[0] == 0
    data = DataOptions(
        frame_buckets=(17,), height_buckets=(size[0],), width_buckets=(size[1],), fps=8, random_flip=float(flip)
    )
    (excerpt,) = read_excerpts(Clip(root / "a.mp4", "a.mp4", "a red square"), data)
    frames = read_frames(excerpt.request)[:, :, :: -1 if flip == "1" else 1]
    page = read_page(tmp_path / "out" / "contact_sheet.png")
    places = [find_frame(page, frames[index]) for index in (0, 2, 5, 7, 9, 11, 14, 16)]
    assert len({top for top, _ in places}) == 1
    gaps = np.diff([left for _, left in places])
    assert (gaps == gaps[0]).all() and gaps[0] > size[1]
    text = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == [
        f"{index / 8:.2f} s" for index in (0, 2, 5, 7, 9, 11, 14, 16)
    ]
    assert text.count(f'width="{size[1]}" height="{size[0]}"') == 8
    assert ("mirrored" in text) == (flip == "1")


def test_a_wide_clip_shows_its_middle_and_mirrored_where_it_is_flipped(inspect: Inspect, tmp_path: Path) -> None:
    """Of a picture of 96×288 the bucket of 64×96 shows the middle half: a sixth red, two thirds green, a sixth blue."""
    root = tmp_path / "data"
    root.mkdir()
    frames = np.zeros((17, 96, 288, 3), np.uint8)
    for third, colour in enumerate(((220, 0, 0), (0, 220, 0), (0, 0, 220))):
        frames[:, :, third * 96 : third * 96 + 96] = colour
    write_video(root / "a.mp4", frames, 8)
    write_records(root, [("a.mp4", "three stripes")])
    for flip, first, last in (("0", 0, 2), ("1", 2, 0)):
        assert inspect(root, "--random_flip", flip)[0] == 0
        page = read_page(tmp_path / "out" / "contact_sheet.png").astype(int)
        strong = page.max(-1) - np.sort(page, -1)[..., 1] > 120  # pixels of one strong colour
        row = strong.sum(1).argmax()
        left = int(np.nonzero(strong[row])[0][0])
        colours = page[row, left : left + 96].argmax(-1)
        edges = [int(edge) for edge in np.nonzero(np.diff(colours))[0] + 1]
        assert np.allclose(edges, [16, 80], atol=1)
        assert (colours[0], colours[40], colours[-1]) == (first, 1, last)


def test_rows_are_spread_over_the_data_set(inspect: Inspect, clips: Path, tmp_path: Path) -> None:
    assert inspect(clips, "--num_rows", "3")[0] == 0
    page = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert "3 of 12 excerpts shown" in page
    numbers = [int(number) for number in re.findall(r"<h2>videos/(\d+)-", page)]
    assert numbers == [2, 6, 10] and page.count("<figure>") == 3 * 8


@pytest.mark.parametrize("num_items", [0, 1, 5, 12])
@pytest.mark.parametrize("count", [1, 3, 5, 40])
def test_spread_is_even(num_items: int, count: int) -> None:
    chosen = spread(list(range(num_items)), count)
    assert len(chosen) == min(count, num_items)
    if chosen:
        ends = np.diff([-1, *chosen, num_items])
        assert chosen == sorted(set(chosen)) and ends[1:-1].max(initial=0) - ends[1:-1].min(initial=99) <= 1
        assert abs(int(ends[0]) - int(ends[-1])) <= 1


def test_a_broken_clip_leaves_its_row_to_another(inspect: Inspect, clips: Path, faults: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    first, second = sorted((clips / "videos").iterdir())[:2]
    shutil.copy(first, root / "a.mp4")
    shutil.copy(second, root / "c.mp4")
    shutil.copy(faults / "changing.ts", root / "b.ts")
    write_records(root, [("a.mp4", "a"), ("b.ts", "b"), ("c.mp4", "c")])
    inspect(root, "--num_rows", "1")  # that of the middle one
    page = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert "1 of 2 excerpts shown" in page and page.count("<article>") == 1
    assert re.search(r"<td>b\.ts</td><td>changes its picture", page)


def test_the_page_escapes_what_it_shows_and_needs_no_network(inspect: Inspect, clips: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    name = 'a"><img src=x>&.mp4'
    shutil.copy(next((clips / "videos").iterdir()), root / name)
    caption = "<script>alert(1)</script> & \x1b[31m狗"
    write_records(root, [(name, caption), ("<b>gone", "x")])
    code, out, _ = inspect(root)
    assert code == 0 and "\x1b" not in out
    page = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "<b>gone" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page and "狗" in page and "\x1b" not in page
    assert "&lt;b&gt;gone" in page
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="(.*?)"', page))
    assert "http" not in page.replace("http-equiv", "")


def test_memory_of_frames_does_not_grow_with_the_clips(
    inspect: Inspect, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of one excerpt are gone when those of the next but one come."""
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def decode(requests: Any, num_workers: int) -> Any:
        nonlocal most
        for tag, request in requests:
            frames = read_frames(request)
            alive.append(weakref.ref(frames))
            most = max(most, sum(reference() is not None for reference in alive))
            yield tag, frames
            del frames

    monkeypatch.setattr(inspection, "decode_ahead", decode)
    assert inspect(clips)[0] == 0
    assert len(alive) == 12 and most <= 2


# The command


def test_ctrl_c_ends_with_exit_75_and_nothing_written(
    inspect: Inspect, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0
    look_at = inspection.look_at

    def look_and_interrupt(*arguments: Any) -> Any:
        nonlocal looked
        looked += 1
        if looked == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return look_at(*arguments)

    monkeypatch.setattr(inspection, "look_at", look_and_interrupt)
    code, out, messages = inspect(clips)
    assert (code, looked, out) == (75, 2, "") and "nothing was written" in messages
    assert list((tmp_path / "out").iterdir()) == []


def test_clips_are_decoded_by_other_processes(inspect: Inspect, clips: Path) -> None:
    code, out, _ = inspect(clips, "--num_decode_workers", "2", "--strict")
    assert code == 0 and "12 usable" in out


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub that holds the tiny model as THUDM/tiny; the folder that is downloaded to."""
    folder = tmp_path / "downloaded"

    def snapshot_download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert (name, options) == ("THUDM/tiny", {"revision": "main", "cache_dir": None})
        files = [path.relative_to(tiny_model).as_posix() for path in tiny_model.rglob("*") if path.is_file()]
        assert any(file.endswith(".safetensors") for file in files)
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny_model / file, folder / file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder


def test_weights_are_not_downloaded(hub: Path, inspect: Inspect, clips: Path) -> None:
    code, out, _ = inspect(clips, "--pretrained_model_name_or_path", "THUDM/tiny", "--revision", "main")
    assert code == 0 and "12 usable" in out
    files = {path.name for path in hub.rglob("*") if path.is_file()}
    assert {"model_index.json", "config.json", "scheduler_config.json"} <= files
    assert not any(file.endswith((".safetensors", ".bin", ".pt", ".msgpack")) for file in files)


def test_all_that_tokenizers_of_the_published_models_need_is_downloaded() -> None:
    from cogvideox_factory.model.family import FILES_WITHOUT_WEIGHTS

    published = ["tokenizer/spiece.model", "tokenizer/added_tokens.json", "tokenizer/tokenizer_config.json"]
    weights = ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model-00001-of-00002.safetensors"]
    assert list(filter_repo_objects(published + weights, allow_patterns=FILES_WITHOUT_WEIGHTS)) == published


def test_a_model_that_cannot_be_had_is_refused(
    inspect: Inspect, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*arguments: Any, **options: Any) -> str:
        raise OSError("the Hub is away")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    code, _, messages = inspect(clips, "--pretrained_model_name_or_path", "THUDM/tiny")
    assert code == 2 and "THUDM/tiny" in messages and "the Hub is away" in messages
    assert not (tmp_path / "out").exists()

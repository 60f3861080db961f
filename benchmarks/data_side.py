"""What the data side costs: decoding ahead against a bare PyAV loop, and the memory of `prepare`.

Decoding: 49 frames of 480×720 at 8 fps from clips of 640×360 and 1280×720 (30 fps, in turn). The bare loop opens each
file in one process with automatic threads, decodes, and scales the same frames in one pass of swscale; ours is what
`prepare` does, with its processes. Both run in turn in one process, so whatever else the machine does falls on both.

Memory: resident memory of `prepare`, of its own process and of all with the decoders, sampled every 20 ms, on a tiny
model with tiling; with more clips it must stay the same. Shared libraries count in every process.

    python benchmarks/data_side.py [--rounds 7] [--clips 20] [--many_clips 200]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
from av.video.reformatter import Interpolation
from diffusers import AutoencoderKLCogVideoX

from cogvideox_factory.config import DataOptions
from cogvideox_factory.data.clips import Clip
from cogvideox_factory.data.decoding import decode_ahead
from cogvideox_factory.data.excerpts import read_excerpts
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline

FRAMES, HEIGHT, WIDTH, FPS = 49, 480, 720, 8.0
SOURCES = ((360, 640), (720, 1280))
SOURCE_FRAMES, SOURCE_FPS = 195, 30
FEW_FRAMES = 9  # for the comparison of many clips with few, which would take an hour on a CPU otherwise


def write_clip(path: Path, height: int, width: int, seed: int) -> None:
    """A textured picture under a moving window."""
    texture = np.random.default_rng(seed).integers(0, 255, (height // 8 + 8, width // 8 + 32, 3), dtype=np.uint8)
    picture = texture.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=SOURCE_FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(SOURCE_FRAMES):
            window = picture[index // 4 : index // 4 + height, index : index + width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(window), format="rgb24")))
        container.mux(stream.encode())


def decode_plainly(paths: Sequence[Path]) -> None:
    """The bound: the same frames at the same size, by nothing but PyAV."""
    for path in paths:
        chosen = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
        filled = 0
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            scale = max(HEIGHT / stream.height, WIDTH / stream.width)
            height, width = round(stream.height * scale), round(stream.width * scale)
            top, left = (height - HEIGHT) // 2, (width - WIDTH) // 2
            for frame in container.decode(stream):
                if frame.time is not None and frame.time >= filled / FPS - 1e-3:
                    image = frame.to_ndarray(
                        format="rgb24", height=height, width=width, interpolation=Interpolation.BICUBIC
                    )
                    chosen[filled] = image[top : top + HEIGHT, left : left + WIDTH]
                    filled += 1
                    if filled == FRAMES:
                        break
        assert filled == FRAMES


def decode_as_prepare_does(paths: Sequence[Path], data: DataOptions) -> None:
    """Reading the time stamps and hashing the files count, too."""
    excerpts = [excerpt for path in paths for excerpt in read_excerpts(Clip(path, path.name, "a clip"), data)]
    requests = ((number, excerpt.request) for number, excerpt in enumerate(excerpts))
    for _, frames in decode_ahead(requests, data.num_decode_workers):
        assert isinstance(frames, np.ndarray) and frames.shape == (FRAMES, HEIGHT, WIDTH, 3)


def compare_decoding(paths: Sequence[Path], rounds: int) -> list[dict[str, float]]:
    data = DataOptions(frame_buckets=(FRAMES,), height_buckets=(HEIGHT,), width_buckets=(WIDTH,), fps=FPS)
    decode_plainly(paths)  # the files are in the page cache from here on
    results = []
    for number in range(rounds):
        started = time.perf_counter()
        decode_plainly(paths)
        between = time.perf_counter()
        decode_as_prepare_does(paths, data)
        bare, ours = between - started, time.perf_counter() - between
        results.append({"bare_ms": 1000 * bare / len(paths), "ours_ms": 1000 * ours / len(paths), "ratio": ours / bare})
        print(f"round {number + 1}: bare {results[-1]['bare_ms']:.0f} ms a clip, ours {results[-1]['ours_ms']:.0f} ms")
    return results


def memory_of_prepare(model: Path, clips: Path, output: Path, frames: int) -> dict[str, float]:
    """Peak resident MiB of a `prepare`: of its process, and of it with its decoders."""
    command = [
        *(sys.executable, "-m", "cogvideox_factory", "prepare", "--pretrained_model_name_or_path", str(model)),
        *("--data_root", str(clips), "--output_dir", str(output), "--use_tiling", "--fps", str(FPS)),
        *("--frame_buckets", str(frames), "--height_buckets", str(HEIGHT), "--width_buckets", str(WIDTH)),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    own = together = 0
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            resident = [parent.memory_info().rss, *(child.memory_info().rss for child in parent.children())]
        except psutil.NoSuchProcess:
            continue
        own, together = max(own, resident[0]), max(together, sum(resident))
        time.sleep(0.02)
    assert process.returncode == 0
    return {"own_mib": own / 2**20, "with_decoders_mib": together / 2**20}


def build_model(folder: Path) -> None:
    """The demo's model with a thinner VAE: at this size the demo's takes half a minute a clip on two cores."""
    build_tiny_pipeline(num_layers=1).save_pretrained(folder)
    AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,
        sample_height=96,
        sample_width=160,
    ).save_pretrained(folder / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="0: no comparison of decoding")
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--many_clips", type=int, default=200, help="0: no measuring of memory")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("av", "numpy", "torch", "diffusers")},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        count = max(arguments.clips, arguments.many_clips)
        for number in range(count):
            path = root / "many" / f"{number:03}.mp4"
            path.parent.mkdir(exist_ok=True)
            if number < arguments.clips:
                write_clip(path, *SOURCES[number % 2], seed=number)
            else:  # another file, also by its content
                original = path.with_name(f"{number % arguments.clips:03}.mp4")
                path.write_bytes(original.read_bytes() + number.to_bytes(8, "big"))
            path.with_suffix(".txt").write_text(f"clip {number}")
        few = root / "few"
        few.mkdir()
        for number in range(arguments.clips):
            for ending in (".mp4", ".txt"):
                shutil.copy(root / "many" / f"{number:03}{ending}", few)
        if arguments.rounds:
            rounds = compare_decoding(sorted(few.glob("*.mp4")), arguments.rounds)
            ratios = [item["ratio"] for item in rounds]
            result |= {"decoding": rounds, "median_ratio": statistics.median(ratios)}
            print(f"ratio: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
        if arguments.many_clips:
            build_model(root / "model")
            memory = {}
            for name, clips, frames in (
                (f"{arguments.clips} clips of {FRAMES} frames", few, FRAMES),
                (f"{arguments.clips} clips of {FEW_FRAMES} frames", few, FEW_FRAMES),
                (f"{arguments.many_clips} clips of {FEW_FRAMES} frames", root / "many", FEW_FRAMES),
            ):
                memory[name] = memory_of_prepare(root / "model", clips, root / name, frames)
                print(name, {key: round(value) for key, value in memory[name].items()})
            result["memory"] = memory
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

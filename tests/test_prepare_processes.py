"""Several processes on one prepared set, and processes that are killed: the set equals one made in one go."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.data.store import PreparedSet

SIZE = ("--frame_buckets", "9", "--height_buckets", "32", "--width_buckets", "48")


def command(model: Path, clips: Path, output: Path, *flags: str) -> list[str]:
    paths = ("--pretrained_model_name_or_path", model, "--data_root", clips, "--output_dir", output)
    return ["-m", "cogvideox_factory", "prepare", *map(str, paths), *SIZE, *flags]


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def content(folder: Path) -> dict[str, bytes]:
    """Every file that makes up the set; `report.json` tells of the last run only."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "report.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, clips: Path) -> Path:
    """A set made in one go by this process, which decodes by itself."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(command(tiny_model, clips, folder, "--num_decode_workers", "0")[2:]) == 0
    assert len(PreparedSet(folder).read_index()) == 12
    return folder


@pytest.mark.slow
def test_a_set_after_kills_at_random_moments_equals_one_made_in_one_go(
    tmp_path: Path, tiny_model: Path, clips: Path, whole: Path
) -> None:
    output = tmp_path / "set"
    draw = random.Random(0)
    killed = 0
    for _ in range(3):
        process = start(command(tiny_model, clips, output))
        # Killed once it has written so many files more.
        goal = len(list(output.rglob("*.safetensors"))) + draw.randint(0, 5)
        while process.poll() is None and len(list(output.rglob("*.safetensors"))) < goal:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
        psutil.wait_procs(children, timeout=30)
        assert not any(child.is_running() for child in children)  # decoders end with their parent
    assert killed >= 2
    process = start(command(tiny_model, clips, output))
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    for part in output.rglob(".*.part"):  # too young for the program to be sure that their writers are dead
        part.unlink()
    assert content(output) == content(whole)


@pytest.mark.slow
def test_two_processes_on_one_folder_leave_a_whole_set(
    tmp_path: Path, tiny_model: Path, clips: Path, whole: Path
) -> None:
    output = tmp_path / "set"
    both = [start(command(tiny_model, clips, output, "--num_decode_workers", str(number))) for number in (1, 2)]
    for process in both:
        _, messages = process.communicate(timeout=120)
        assert process.returncode == 0, messages
    assert content(output) == content(whole)


@pytest.mark.slow
def test_processes_of_one_launch_share_out_the_clips_and_write_one_index(
    tmp_path: Path, tiny_model: Path, clips: Path, whole: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    output = tmp_path / "set"
    launch = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    # As torchrun does, without its own imports; decoders too would spend their time on those.
    arguments = command(tiny_model, clips, output, "--num_decode_workers", "0")
    both = [start(arguments, RANK=rank, LOCAL_RANK=rank, **launch) for rank in ("0", "1")]
    messages = ""
    for process in both:
        messages += process.communicate(timeout=180)[1]
        assert process.returncode == 0, messages
    assert content(output) == content(whole)
    report = json.loads((output / "report.json").read_text())
    assert report == {"clips": 12, "encoded": 12, "reused": 0, "skipped": []}
    assert messages.count("12 clips: 12 encoded") == 1


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

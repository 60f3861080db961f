"""Decoding in other processes: the frames that plain decoding gives, and one answer a request, whatever crashes."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest

from cogvideox_factory.data.decoding import decode_ahead
from cogvideox_factory.data.video import Box, FrameRequest, Timeline, VideoError, read_timeline

COUNT, HEIGHT, WIDTH = 6, 48, 64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five videos of six frames, all different."""
    folder = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0).integers(20, 235, (5, COUNT, HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    paths = []
    for number, images in enumerate(noise):
        path = folder / f"{number}.mp4"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", rate=8, options={"crf": "10"})
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for image in images.repeat(8, axis=1).repeat(8, axis=2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        paths.append(path)
    return paths


def plainly_decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def request_for(path: Path) -> FrameRequest:
    """All frames of a file, as they are."""
    timeline = Timeline(np.arange(COUNT) / 8, COUNT / 8, HEIGHT, WIDTH)
    return FrameRequest(path, timeline, timeline.times, HEIGHT, WIDTH, Box(0, 0, HEIGHT, WIDTH))


class Evaluated:
    """What a process gets that unpickles this is whatever the expression gives there."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (self.expression,)


def request_doing(expression: str, path: Path) -> FrameRequest:
    """A good request, but the process that is sent it evaluates an expression first."""
    stand_in: Any = Evaluated(f"({expression}, __import__('pathlib').Path({str(path)!r}))[1]")
    return replace(request_for(path), path=stand_in)


def child_processes() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = child_processes()
    yield
    assert child_processes() <= before


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
def test_any_number_of_processes_gives_the_frames_of_plain_decoding(files: list[Path], workers: int) -> None:
    for path in files:
        assert len(read_timeline(path).times) == COUNT
    decoded = dict(decode_ahead(((path, request_for(path)) for path in files), workers))
    assert decoded.keys() == set(files)
    expected = {path: plainly_decoded(path) for path in files}
    for path, frames in decoded.items():
        assert isinstance(frames, np.ndarray) and frames.dtype == np.uint8
        np.testing.assert_array_equal(frames, expected[path])
    assert not np.array_equal(expected[files[0]], expected[files[1]])


@pytest.mark.parametrize("workers", [0, 1])
def test_up_to_one_process_keeps_the_order(files: list[Path], workers: int) -> None:
    order = [3, 1, 4, 0, 2]
    decoded = decode_ahead(((number, request_for(files[number])) for number in order), workers)
    assert [tag for tag, _ in decoded] == order


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_no_request_gives_no_answer_and_starts_no_process(workers: int) -> None:
    before = child_processes()
    for _ in decode_ahead(iter([]), workers):
        raise AssertionError("an answer to nothing")
    assert child_processes() == before


def test_scaling_cutting_and_choosing_happen_in_the_process_as_they_do_here(files: list[Path]) -> None:
    whole = request_for(files[0])
    request = replace(whole, times=np.array([0.3, 0.3, 0.7]), height=24, width=32, box=Box(3, 5, 10, 20))
    (_, here), (_, there) = (next(iter(decode_ahead(iter([("a", request)]), workers))) for workers in (0, 1))
    assert isinstance(here, np.ndarray) and here.shape == (3, 10, 20, 3)
    np.testing.assert_array_equal(here, there)


# Files that cannot be decoded


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_request_is_answered_once_even_where_most_of_them_fail(
    tmp_path: Path, files: list[Path], workers: int
) -> None:
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    requests: dict[str, FrameRequest] = {}
    for number, path in enumerate(files):
        requests |= {
            f"missing {number}": request_for(tmp_path / f"missing {number}.mp4"),
            f"text {number}": request_for(tmp_path / "text.mp4"),
            f"good {number}": request_for(path),
            f"unreadable {number}": request_for(tmp_path / f"{'long' * 100}.mp4"),  # longer than names may be
        }
    answers = list(decode_ahead(iter(requests.items()), workers))
    assert sorted(tag for tag, _ in answers) == sorted(requests)
    for tag, answer in answers:
        if tag.startswith("good"):
            assert isinstance(answer, np.ndarray)
            np.testing.assert_array_equal(answer, plainly_decoded(requests[tag].path))
        elif tag.startswith("missing"):
            assert isinstance(answer, VideoError) and str(answer) == "no such file"
        elif tag.startswith("text"):
            assert isinstance(answer, VideoError) and str(answer).startswith("cannot be read as a video (")
        else:
            assert isinstance(answer, OSError) and answer.strerror == "File name too long"


CRASHES = {
    "__import__('os')._exit(3)": "exit code 3",
    "__import__('signal').raise_signal(11)": "Segmentation fault",
    "__import__('os').kill(__import__('os').getpid(), 9)": "Killed",  # as the kernel does where memory runs out
}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_costs_the_file_that_caused_it_and_no_other(files: list[Path], workers: int) -> None:
    requests: list[tuple[str, FrameRequest]] = []
    for (expression, reason), path in zip(CRASHES.items(), files, strict=False):
        requests += [(reason, request_doing(expression, path)), (path.name, request_for(path))]
    requests += [(files[4].name, request_for(files[4]))]
    answers = list(decode_ahead(iter(requests), workers))
    assert sorted(tag for tag, _ in answers) == sorted(tag for tag, _ in requests)
    for tag, answer in answers:
        if tag in CRASHES.values():
            assert isinstance(answer, VideoError)
            assert str(answer) == f"the decoder crashed on it ({tag})"
        else:
            np.testing.assert_array_equal(answer, plainly_decoded(files[0].with_name(tag)))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_is_killed_once_for_no_fault_of_the_file_costs_nothing(
    files: list[Path], tmp_path: Path, workers: int
) -> None:
    # As the kernel does where memory runs out: the first process that takes the request dies, the next does not.
    mark = tmp_path / "killed"
    dying = f"__import__('os').path.exists({str(mark)!r}) or (open({str(mark)!r}, 'w'), __import__('os')._exit(9))"
    requests = [("a", request_doing(dying, files[0])), *((path.name, request_for(path)) for path in files[1:])]
    answers = dict(decode_ahead(iter(requests), workers))
    assert mark.exists() and len(answers) == len(files)
    np.testing.assert_array_equal(answers["a"], plainly_decoded(files[0]))
    for path in files[1:]:
        np.testing.assert_array_equal(answers[path.name], plainly_decoded(path))


def test_a_crash_over_a_request_that_is_not_yet_sent_whole_is_a_crash_like_any_other(files: list[Path]) -> None:
    crashing = request_doing("__import__('os')._exit(3)", files[0])
    long_clip = replace(crashing, times=np.linspace(0, 0.7, 2_000_000))  # megabytes, more than a pipe holds
    requests = [("a", request_for(files[1])), ("crash", long_clip), ("b", request_for(files[2]))]
    answers = dict(decode_ahead(iter(requests), 1))
    assert list(answers) == ["a", "crash", "b"]
    assert isinstance(answers["crash"], VideoError) and "crashed on it (exit code 3)" in str(answers["crash"])
    np.testing.assert_array_equal(answers["b"], plainly_decoded(files[2]))


def die(pid: int) -> None:
    """Kill a process and wait until it is dead, leaving it to its parent to collect."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_process_that_dies_between_two_clips_costs_neither(files: list[Path]) -> None:
    before = child_processes()
    killed = []

    def requests() -> Iterator[tuple[int, FrameRequest]]:
        for number, path in enumerate(files):
            for pid in child_processes() - before:  # it has delivered the last clip and waits for this one
                die(pid)
                killed.append(pid)
            yield number, request_for(path)

    answers = list(decode_ahead(requests(), 1))
    assert len(set(killed)) == 4
    for number, frames in answers:
        np.testing.assert_array_equal(frames, plainly_decoded(files[number]))
    assert len(answers) == 5


@pytest.mark.parametrize("caller_stops", [True, False])
def test_a_process_that_dies_while_it_is_sent_a_request_is_a_crash_like_any_other(
    files: list[Path], caller_stops: bool
) -> None:
    before = child_processes()

    class Deadly:
        def __reduce__(self) -> tuple[Any, ...]:  # evaluated while the request is written to the pipe
            for pid in child_processes() - before:
                die(pid)
            return Path, (str(files[1]),)

    path: Any = Deadly()
    requests = [("a", request_for(files[0])), ("dying", replace(request_for(files[1]), path=path))]
    requests += [("b", request_for(files[2]))]
    with contextlib.closing(decode_ahead(iter(requests), 1)) as decoded:
        assert next(decoded)[0] == "a"
        if caller_stops:
            return  # with a request half written
        tag, answer = next(decoded)
        assert tag == "dying" and str(answer) == "the decoder crashed on it (Killed)"
        tag, answer = next(decoded)
        np.testing.assert_array_equal(answer, plainly_decoded(files[2]))


def test_what_a_library_prints_does_not_come_between_the_frames(
    files: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    printing = "__import__('os').write(1, b'a note') and print('another', flush=True)"
    answers = dict(decode_ahead(iter([("a", request_doing(printing, files[0])), ("b", request_for(files[1]))]), 1))
    for tag, path in zip("ab", files, strict=False):
        np.testing.assert_array_equal(answers[tag], plainly_decoded(path))
    captured = capfd.readouterr()
    assert captured.out == "" and "a note" in captured.err and "another" in captured.err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_all_processes_are_left_to_the_program(files: list[Path], sent: signal.Signals) -> None:
    before = child_processes()
    seen = []

    def requests() -> Iterator[tuple[int, FrameRequest]]:
        for number, path in enumerate(files):
            for pid in child_processes() - before:
                os.kill(pid, sent)
                seen.append(pid)
            yield number, request_for(path)

    answers = dict(decode_ahead(requests(), 1))
    assert len(seen) == 4 and len(set(seen)) == 1
    for number, path in enumerate(files):
        np.testing.assert_array_equal(answers[number], plainly_decoded(path))


# How far ahead


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_request_is_taken_only_when_a_process_is_free_for_it(files: list[Path], workers: int) -> None:
    total = 10
    taken = itertools.count()
    requests = ((next(taken), request_for(files[number % 5])) for number in range(total))
    decoded = decode_ahead(requests, workers)
    num_taken = 0
    for num_answers, _ in enumerate(decoded, start=1):
        num_taken = next(taken)
        taken = itertools.count(num_taken)
        # One each that is being decoded or waits in its process, besides those that were answered.
        assert num_taken == min(total, workers + num_answers)
    assert num_taken == total


def test_nothing_begins_before_the_first_answer_is_asked_for(files: list[Path]) -> None:
    before = child_processes()
    taken = []
    requests = ((taken.append(path), request_for(path)) for path in files)  # type: ignore[func-returns-value]
    decoded = decode_ahead(requests, 2)
    assert taken == [] and child_processes() == before
    next(decoded)
    assert len(taken) == 3 and len(child_processes() - before) == 2
    decoded.close()


# The end


def test_a_caller_who_stops_early_leaves_no_process(files: list[Path]) -> None:
    before = child_processes()
    endless = request_doing("__import__('signal').pause()", files[2])  # it would never answer
    requests = iter([("a", request_for(files[0])), ("b", endless), ("c", endless)])
    with contextlib.closing(decode_ahead(requests, 2)) as decoded:
        assert next(decoded)[0] == "a"
        assert len(child_processes() - before) == 2
    assert child_processes() == before


def test_an_error_of_the_caller_or_of_the_requests_leaves_no_process(files: list[Path]) -> None:
    before = child_processes()

    def requests() -> Iterator[tuple[int, FrameRequest]]:
        yield 0, request_for(files[0])
        yield 1, request_for(files[1])
        assert len(child_processes() - before) == 2
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(decode_ahead(requests(), 2))
    assert child_processes() == before
    with (
        pytest.raises(KeyboardInterrupt),
        contextlib.closing(decode_ahead(((path, request_for(path)) for path in files), 2)) as decoded,
    ):
        for _ in decoded:
            raise KeyboardInterrupt
    assert child_processes() == before


def test_processes_end_by_themselves_where_the_program_is_killed(files: list[Path]) -> None:
    code = (
        "import os, signal, sys, psutil; from test_decoding import *\n"
        "large = replace(request_for(Path(sys.argv[1])), times=np.linspace(0, 0.7, 100))\n"  # more than a pipe holds
        "requests = iter([(number, large) for number in range(9)])\n"
        "decoded = decode_ahead(requests, 2); next(decoded)\n"
        "print(*child_processes(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(files[0])]
    # Standard error is inherited by all of them, so this comes back only when the last one has gone.
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.split()) == 2 and done.stderr == ""


def test_a_process_that_decodes_never_imports_torch(files: list[Path]) -> None:
    refuse = "'torch' in __import__('sys').modules and __import__('os')._exit(7)"
    control = "'av' in __import__('sys').modules and __import__('os')._exit(8)"
    requests = [("torch", request_doing(refuse, files[0])), ("av", request_doing(control, files[0]))]
    answers = dict(decode_ahead(iter(requests), 1))
    np.testing.assert_array_equal(answers["torch"], plainly_decoded(files[0]))
    assert "crashed on it (exit code 8)" in str(answers["av"])

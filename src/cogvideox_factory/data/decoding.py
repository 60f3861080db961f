"""Decodes clips in processes of their own, ahead of whoever takes them.

Each process is sent one request, answers with the frames through its pipe, and waits there until they are taken: at
most one decoded clip a process exists besides the one that the caller holds. A file that crashes the decoder costs
that file, not the run. Rejected: multiprocessing's pools (a dead process breaks them for all, and they import the
caller's main module, torch with it), and shared memory (64 MB is all that a container has of it by default).
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from typing import IO, Generic, TypeVar

import numpy as np

from cogvideox_factory.data.video import FrameRequest, VideoError, read_frames

Tag = TypeVar("Tag")
Decoded = tuple[Tag, np.ndarray | Exception]


def decode_ahead(requests: Iterator[tuple[Tag, FrameRequest]], num_workers: int) -> Generator[Decoded, None, None]:
    """Frames of each request, with its tag, in the order in which they are ready; no order where workers > 1.

    A request is taken from the iterator when a process is free for it. What cannot be decoded comes as its VideoError
    or OSError. With no workers everything happens in this process.
    """
    if num_workers == 0:
        yield from ((tag, _decode(request)) for tag, request in requests)
        return
    ready: queue.Queue[_Worker[Tag]] = queue.Queue()
    num_threads = max(1, (os.cpu_count() or 1) // num_workers)
    workers: list[_Worker[Tag]] = []
    try:
        for _, item in zip(range(num_workers), requests, strict=False):
            workers.append(_Worker(num_threads, ready))
            workers[-1].send(item)
        num_working = len(workers)
        while num_working:
            worker = ready.get()
            result = worker.take()
            if result is None:
                continue
            answer = [(worker.tag, result)]
            del result
            following = next(requests, None)
            if following is None:
                num_working -= 1
            else:
                worker.send(following)
            yield answer.pop()  # and keep no hold on it: a clip is many megabytes
    finally:
        for worker in workers:
            worker.stop()


def _decode(request: FrameRequest, num_threads: int = 0) -> np.ndarray | Exception:
    try:
        return read_frames(request, num_threads)
    except (VideoError, OSError) as error:
        return error


class _Worker(Generic[Tag]):
    """A process that decodes, started when it is first needed and again after a crash."""

    tag: Tag

    def __init__(self, num_threads: int, ready: queue.Queue[_Worker[Tag]]):
        self.num_threads, self.ready = num_threads, ready
        self.process: subprocess.Popen[bytes] | None = None
        self.answer = b""

    def send(self, item: tuple[Tag, FrameRequest]) -> None:
        """Let the process decode; it lines up in `ready` when it has an answer."""
        self.tag, self.request = item
        self.is_second_try = False
        self._ask()

    def _ask(self) -> None:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-P", "-m", __name__, str(self.num_threads)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it died over the request, which its empty answer will tell
            pickle.dump(self.request, self.process.stdin)
            self.process.stdin.flush()
        threading.Thread(target=self._await_answer, daemon=True).start()

    def _await_answer(self) -> None:
        assert self.process and self.process.stdout
        self.answer = self.process.stdout.read(1)
        self.ready.put(self)

    def take(self) -> np.ndarray | Exception | None:
        """The frames, or why there are none; None where a new process tries again.

        Once: a process may have died for a reason of the machine's, such as its memory, and not of the file.
        """
        assert self.process and self.process.stdout
        if self.answer == _FRAMES:
            frames = np.empty(self.request.shape, np.uint8)
            if _read_whole(self.process.stdout, frames.data.cast("B")):
                return frames
        elif self.answer == _ERROR:
            line = self.process.stdout.readline()
            if line.endswith(b"\n"):  # else it died while it told
                return _error_from_json(line)
        code = self.process.wait()
        self.process = None
        if not self.is_second_try:
            self.is_second_try = True
            self._ask()
            return None
        reason = signal.strsignal(-code) if code < 0 else f"exit code {code}"
        return VideoError(f"the decoder crashed on it ({reason})")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):  # what it has not read of its request
                        pipe.close()


_FRAMES, _ERROR = b"F", b"E"


def _error_as_json(error: Exception) -> bytes:
    """A line for the pipe. No pickle: this process has just read a file that nobody vouches for."""
    if isinstance(error, OSError) and error.errno is not None:
        filename = None if error.filename is None else os.fsdecode(error.filename)
        return json.dumps({"os": [error.errno, error.strerror, filename]}).encode() + b"\n"
    return json.dumps({"video": str(error)}).encode() + b"\n"


def _error_from_json(line: bytes) -> Exception:
    content = json.loads(line)
    return OSError(*content["os"]) if "os" in content else VideoError(content["video"])


def _read_whole(pipe: IO[bytes], target: memoryview) -> bool:
    filled = 0
    while filled < len(target):
        count = pipe.readinto(target[filled:])  # type: ignore[attr-defined]
        if not count:
            return False
        filled += count
    return True


def _serve(num_threads: int) -> None:
    """The life of a worker: until its input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach all processes; the parent decides what to finish
        signal.signal(number, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the frames
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        result = _decode(request, num_threads)
        if isinstance(result, np.ndarray):
            answers.write(_FRAMES)
            answers.write(np.ascontiguousarray(result).data.cast("B"))
        else:
            answers.write(_ERROR)
            answers.write(_error_as_json(result))
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the program was killed, and nobody waits for the answer
        _serve(int(sys.argv[1]))

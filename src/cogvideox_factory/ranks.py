"""What the processes of one run do together: wait for each other, end together, learn of a signal to one of them.

Work that only some of them do, or that takes them unequal times, stands inside `with together(stop):`. They exchange
how it went through the launcher's key-value store, in which they found each other at the start. Rejected: collective
operations. A process that waits in one hears no signal and never learns that the others have failed; and as such
work can take hours, their time limit would have to be so long that a dead machine holds up all others. Instead each
says every few seconds that it lives.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from cogvideox_factory.config import RunError, UserError
from cogvideox_factory.stopping import Stopped, StopRequest

Result = TypeVar("Result")
ENDING = "cogvideox-factory/ending"  # set by a process that has to end
MEETING = "cogvideox-factory/meeting"
# How often a process that waits looks whether the others have come: soon at first, then less often.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.001, 0.25
ALIVE = "cogvideox-factory/alive"
# How often a process says that it lives, and after how long a silence the others take it for dead: longer than any
# operation that lets no other thread run, such as page-locking tens of GiB.
BEAT_SECONDS, SILENCE_SECONDS = 5.0, 300.0
_echoes: weakref.WeakSet[Exception] = weakref.WeakSet()
_next_meeting = itertools.count().__next__  # the processes meet in the same order


def num_ranks() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if num_ranks() > 1 else 0


def share_requests(stop: StopRequest) -> None:
    """From now on a stop that is requested of one process is seen by all, each when it looks the next time, and so is
    that a process lives."""
    if num_ranks() > 1:
        store = _store()
        _start_pulse(store, rank())
        stop.hear = lambda is_requested: _hear(store, is_requested)


@contextlib.contextmanager
def together(stop: StopRequest) -> Iterator[None]:
    """What ends the block on one process ends it on all of them, and none leaves before the others have come.

    A failure anywhere counts more than a stop. A process that has none of its own raises one of the same exit code as
    the first that has, an echo of it. With one process the block simply runs.
    """
    if num_ranks() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    errors = [_read(answer) for answer in _exchange(stop, _written(own), is_ending=own is not None)]
    failures = [error for error in errors if error and error[0] != Stopped.__name__] or list(filter(None, errors))
    if not failures:
        return
    kind, message = failures[0]
    if own is not None and (kind == Stopped.__name__ or not isinstance(own, Stopped)):
        if errors.index(failures[0]) != rank() and _read(_written(own)) == failures[0]:
            _echoes.add(own)
        raise own
    echo: Exception = {"Stopped": Stopped, "UserError": UserError}.get(kind, RunError)(message)
    _echoes.add(echo)
    raise echo from own


def is_echo(error: Exception) -> bool:
    """Whether another process of the run tells of this error, which `together` has raised here too."""
    return error in _echoes


def any_rank(accelerator: Any, *flags: bool) -> tuple[bool, ...]:
    """Whether each of the flags is set on any of the processes: the same answer on all of them, from one reduction of
    as many numbers.

    `accelerator` is accelerate's, or has what is used of it here.
    """
    if accelerator.num_processes == 1:
        return flags
    import torch

    counts = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return tuple(count > 0 for count in accelerator.reduce(counts, "sum").tolist())


def first_rank_first(work: Callable[[], Result], stop: StopRequest) -> Result:
    """Do the work on the first process and then on the others, which find what it has left on the disk."""
    is_first, results = rank() == 0, list[Result]()
    for turn in (is_first, not is_first):
        with together(stop):
            if turn:
                results.append(work())
    return results[0]


def _exchange(stop: StopRequest, mine: str, *, is_ending: bool) -> list[str]:
    """What each process brings to this meeting, in their order."""
    store, place = _store(), f"{MEETING}/{_next_meeting()}"
    if is_ending:
        store.set(ENDING, "1")  # so that the others come soon
    store.set(f"{place}/{rank()}", mine)
    keys = {number: f"{place}/{number}" for number in range(num_ranks())}
    _wait_for(store, keys, stop)
    answers = [store.get(key).decode() for key in keys.values()]
    # The first process may be the one that keeps the store, and may end now: it leaves when the others have read.
    if rank():
        store.set(f"{place}/read/{rank()}", "")
    else:
        _wait_for(store, {number: f"{place}/read/{number}" for number in range(1, num_ranks())}, stop)
    return answers


def _wait_for(store: Any, keys: Mapping[int, str], stop: StopRequest) -> None:
    """Until these keys of these processes are there. Raises RunError where one of them has died before."""
    pause = FIRST_PAUSE_SECONDS
    heard: dict[int, tuple[bytes | None, float]] = {}  # each one's last beat, and when it was another for the last time
    while not store.check(list(keys.values())):
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        _ = stop.requested  # passes on a signal that came to this process
        for number, key in keys.items():
            beat = store.get(f"{ALIVE}/{number}") if store.check([f"{ALIVE}/{number}"]) else None
            if number not in heard or heard[number][0] != beat:
                heard[number] = beat, time.monotonic()
            elif time.monotonic() - heard[number][1] > SILENCE_SECONDS and not store.check([key]):
                raise RunError(
                    f"process {number} of {num_ranks()} has not been heard of for {SILENCE_SECONDS:.0f} seconds: it "
                    "or its machine has died. Start all of them again; a training goes on from its newest checkpoint"
                )


def _start_pulse(store: Any, number: int) -> None:
    """Say every few seconds that this process lives, whatever it is doing. By a count, as machines' clocks differ."""
    own = store.clone()  # a connection that another thread may use at any time

    def beat() -> None:
        with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
            for count in itertools.count():
                own.set(f"{ALIVE}/{number}", str(count))
                time.sleep(BEAT_SECONDS)

    threading.Thread(target=beat, name="pulse", daemon=True).start()


def _hear(store: Any, is_requested: bool) -> bool:
    try:
        if is_requested:
            store.set(ENDING, "1")
        return is_requested or store.check([ENDING])
    except RuntimeError:  # the process that keeps the store is gone; whoever needs it will say so
        return is_requested


def _store() -> Any:
    """The store that torch.distributed was initialised with; there is no public way to it."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _written(error: Exception | None) -> str:
    if error is None:
        return ""
    kind = next((known for known in (Stopped, UserError, RunError) if isinstance(error, known)), None)
    return json.dumps([kind.__name__, str(error)] if kind else ["other", f"{type(error).__name__}: {error}"])


def _read(answer: str) -> tuple[str, str] | None:
    return tuple(json.loads(answer)) if answer else None

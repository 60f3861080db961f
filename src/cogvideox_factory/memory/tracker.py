"""Counts the bytes of all tensors that live, by what they are for, and remembers the peak.

Every operation that torch dispatches passes by, real or on fake tensors alike, and each *storage* that comes out is
counted once, until it is freed. Rejected: reading the resident memory of the process, which says nothing on fake
tensors, counts the libraries, and keeps what the allocator has not given back; and torch's `MemTracker`, which knows
no adapter and no fake host.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations")


@dataclass
class Moment:
    """Bytes at the moment of a stage at which most lived on the device; `host` has a moment of its own."""

    parts: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(eq=False)
class Watch:
    """Bytes at the start, and how many more there were at the highest moment since."""

    start: int
    highest: int = 0


class MemoryTracker(TorchDispatchMode):
    """While it is entered, follows what lives on one device (`parts`, in bytes), and in all other places (`host`).

    What is new belongs to the part of the innermost `part` context, and is an activation outside of any. What is
    there already when the tracker is entered is counted once `add` is told of it.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.parts = dict.fromkeys(PARTS, 0)
        self.host = 0
        self._part = "activations"
        # By the address of the storage, which is not used again before the storage, and with it the entry, is gone.
        self._storages: dict[int, tuple[weakref.ref[Any], str | None, int]] = {}
        self._watches: list[Watch] = []
        self.start_phase()

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        """How much what runs inside takes at its highest moment."""
        watch = Watch(self.current)
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    def start_phase(self) -> None:
        """The peaks are from here on."""
        self.stages: dict[tuple[Any, int], Moment] = {}
        self._stage_name: Any = None
        self.start_stage("start")

    def start_stage(self, name: Any) -> None:
        """A part of the phase begins, whose peak is kept apart under (name, how often the name came before).

        Nothing begins where the stage that runs has this name.
        """
        if name == self._stage_name:
            return
        self._stage_name = name
        count = sum(1 for known, _ in self.stages if known == name)
        self._stage = Moment(dict(self.parts), self.host)
        self.stages[name, count] = self._stage

    @property
    def peak(self) -> int:
        """Bytes on the device at the phase's highest moment."""
        return max(stage.peak for stage in self.stages.values())

    @property
    def peak_parts(self) -> Mapping[str, int]:
        """And by what they are for."""
        return max(self.stages.values(), key=lambda stage: stage.peak).parts

    @property
    def host_peak(self) -> int:
        """Most bytes in other places, at any moment of the phase."""
        return max(stage.host for stage in self.stages.values())

    @property
    def current(self) -> int:
        """Bytes that live on the device now."""
        return sum(self.parts.values())

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What comes to be inside belongs to this part."""
        assert name in PARTS
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def add(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Count tensors that exist, or that are counted under another part, to this one."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is None:
                self._count(storage, self.device_of(tensor), part)
            elif known[1] not in (None, part):
                reference, earlier, num_bytes = known
                self.parts[earlier or ""] -= num_bytes
                self.parts[part] += num_bytes
                self._storages[storage._cdata] = reference, part, num_bytes
        self.note_peak(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = self.run(func, args, kwargs or {})
        is_new = False
        for value in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._storages:
                    self._count(storage, self.device_of(value), self._part)
                    is_new = True
        workspace = self.workspace(func, args)
        if is_new or workspace:
            self.note_peak(workspace)
        return result

    def run(self, func, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        """Where a tensor's content lies."""
        return tensor.device

    def workspace(self, func, args: tuple[Any, ...]) -> int:
        """Bytes that an operation takes on the device besides its results, while it runs."""
        return 0

    def _count(self, storage: torch.UntypedStorage, device: torch.device, part: str) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        is_on_device = device == self.device
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._storages[key] = reference, part if is_on_device else None, num_bytes
        if is_on_device:
            self.parts[part] += num_bytes
        elif device.type != "meta":
            self.host += num_bytes

    def _forget(self, key: int) -> None:
        _, part, num_bytes = self._storages.pop(key)
        if part is None:
            self.host -= num_bytes
        else:
            self.parts[part] -= num_bytes

    def note_peak(self, workspace: int) -> None:
        """Take this moment into account, at which an operation holds so many bytes besides all that is counted."""
        for watch in self._watches:
            watch.highest = max(watch.highest, self.current + workspace - watch.start)
        stage = self._stage
        stage.host = max(stage.host, self.host)
        if self.current + workspace > stage.peak:
            stage.parts = {**self.parts, "activations": self.parts["activations"] + workspace}

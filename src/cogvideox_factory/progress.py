"""Progress bars with the time that is left, on standard error; sparse where that is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(
    items: Iterable[Item] | None = None,
    label: str = "",
    unit: str = "it",
    total: int | None = None,
    done: int = 0,
) -> tqdm[Item]:
    """A bar over `items`, or one that is updated by hand, with `done` of `total` behind it already."""
    seconds_between_updates = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        items,
        desc=label,
        unit=unit,
        total=total,
        initial=done,
        mininterval=seconds_between_updates,
        dynamic_ncols=True,
        file=sys.stderr,
    )

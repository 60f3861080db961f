"""Progress bars with the time that is left, on standard error; sparse where that is no terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from cogvideox_factory.redaction import without_secrets


class AboveBarHandler(logging.Handler):
    """Writes log lines to standard error, above a bar that is being drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(without_secrets(self.format(record)), file=sys.stderr)


def progress_bar(
    items: Iterable[Any] | None,
    label: str,
    unit: str,
    total: int | None = None,
    *,
    done: int = 0,
    is_silent: bool = False,
) -> tqdm:
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
        disable=is_silent,
    )

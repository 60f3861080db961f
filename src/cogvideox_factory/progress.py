"""Progress of a stage with the time that is left: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from cogvideox_factory import messages

SECONDS_BETWEEN_LINES = 10.0
logger = logging.getLogger(__name__)


class ProgressLines(tqdm):
    """A bar that is told in log lines, each complete in itself: nothing is drawn over in a file or a pipe."""

    _told: float = -1  # how many were done when it was last told

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.n == self._told or self.n == self.initial:
            return
        self._told = self.n
        figures = self.format_dict
        rate, elapsed = figures["rate"], figures["elapsed"]
        if rate is None and elapsed:
            rate = (self.n - self.initial) / elapsed
        left = round((self.total - self.n) / rate, 1) if rate and self.total else None
        progress = {"stage": self.desc, "done": self.n, "total": self.total, "seconds_left": left}
        logger.info("%s", self, extra={"fields": {"progress": progress}})


def bars_are_drawn() -> bool:
    """Whether a person watches who wants to see bars."""
    return sys.stderr.isatty() and not messages.are_json() and logger.isEnabledFor(logging.INFO)


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
    given: dict[str, Any] = {"desc": label, "unit": unit, "total": total, "initial": done, "disable": is_silent}
    if bars_are_drawn():
        return tqdm(items, **given, mininterval=0.1, dynamic_ncols=True, file=sys.stderr)
    return ProgressLines(
        items,
        **given,
        mininterval=SECONDS_BETWEEN_LINES,
        miniters=1,  # whether it is time is looked at after every item
        file=io.StringIO(),
        bar_format="{desc}  {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


def show_bars_of_diffusers() -> None:
    """Those with which it loads the parts of a pipeline, where ours are drawn, too."""
    from diffusers.utils import logging as of_diffusers

    (of_diffusers.enable_progress_bar if bars_are_drawn() else of_diffusers.disable_progress_bar)()

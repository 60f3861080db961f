"""What a run shows in TensorBoard, Weights & Biases or Trackio while it goes on.

The libraries are spoken to directly, each in a dozen lines. Rejected: accelerate's trackers, which want their folder
before the options are resolved, cannot go on with a run or purge what it repeats, take no mp4 file, and let a
dashboard that fails end the training.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import av
from PIL import Image

from cogvideox_factory.config import Train, UserError, plain_values
from cogvideox_factory.data.files import write_durably
from cogvideox_factory.sampling import Video
from cogvideox_factory.training.metrics import read_metrics
from cogvideox_factory.training.start_images import with_redacted_images

logger = logging.getLogger(__name__)

LIBRARIES = ("tensorboard", "wandb", "trackio")
GIF_PIXELS = 320  # of the longer side: an event file holds every picture of the run


class Tracker(Protocol):
    """A dashboard that was opened for a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def video(self, step: int, name: str, file: Path, prompt: str) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a dashboard is told of the run when it is opened."""

    folder: Path  # for files of its own
    project: str
    run: str
    identity: str  # the same whenever this run goes on, and of no other run
    last_step: int  # the step after which this part begins
    config: Mapping[str, Any]


def choose_trackers(report_to: Sequence[str]) -> tuple[str, ...]:
    """The dashboards that --report_to asks for; with nothing asked, TensorBoard where it is installed.

    Raises UserError where one is not installed.
    """
    asked = tuple(dict.fromkeys(report_to))
    if not asked:
        if is_installed("tensorboard"):
            return ("tensorboard",)
        logger.info("no tensorboard here: the course of the training is in metrics.jsonl and the report alone")
        return ()
    if "none" in asked:
        if len(asked) > 1:
            raise UserError(f"--report_to {' '.join(asked)}: none cannot stand beside others")
        return ()
    if "all" in asked:
        installed = tuple(filter(is_installed, LIBRARIES))
        if not installed:
            raise UserError(f"--report_to all: none is installed; pip install {LIBRARIES[0]} (or {LIBRARIES[1:]})")
        return installed
    for name in asked:
        if not is_installed(name):
            raise UserError(f"--report_to {name}: is not installed; pip install {name}")
    return asked


def is_installed(name: str) -> bool:
    """Whether a library can be imported. A folder of this name, as wandb makes one for its runs, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


class Trackers:
    """The dashboards of a run, opened when there is something to show. Used by the first rank only.

    A dashboard that fails, at the start or later, is told once and left out from then on.
    """

    def __init__(self, names: Sequence[str], options: Train):
        assert options.output_dir is not None
        self._names = tuple(names)
        self._options = options
        self._run = options.output_dir
        self._folder = self._run / (options.tracking.logging_dir or "logs") / self._run.absolute().name
        self._last_step = 0
        self._seen_step = 0
        self._active: dict[str, Tracker] | None = None
        self._known: set[str] = set()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._active:
            self._for_each(lambda _, tracker: tracker.close())

    def start_after(self, step: int, options: Train) -> None:
        """This part of the run begins after `step`, with `options` as they are by now.

        Called before metrics.jsonl is cut back to `step`: what an earlier part wrote there after it was shown, and
        is not shown again.
        """
        self._options = options
        self._last_step = step
        self._seen_step = max((line["step"] for line in read_metrics(self._run / "metrics.jsonl")), default=0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show scalars by name, such as train/loss, after optimizer step `step`."""

        def show(name: str, tracker: Tracker) -> None:
            if self._is_new(name, step):
                tracker.scalars(step, values)

        self._for_each(show)

    def log_line(self, line: Mapping[str, Any], group: str = "train") -> None:
        """Show the numbers in a line of metrics.jsonl, or of another file of such lines, under the group's name."""
        values = {f"{group}/{name}": value for name, value in line.items() if isinstance(value, int | float)}
        step = values.pop(f"{group}/step")
        self.log(int(step), values)

    def show_videos(self, step: int, folder: Path, videos: Sequence[Video]) -> None:
        """Show the mp4 files of a validation."""

        def show(name: str, tracker: Tracker) -> None:
            if self._is_new(name, step):
                for video in videos:
                    file = folder / video.file
                    tracker.video(step, f"validation/{file.stem}", file, video.prompt)

        self._for_each(show)

    def _is_new(self, name: str, step: int) -> bool:
        """TensorBoard purges what is repeated; the others keep it, and so must not be given it again."""
        return name == "tensorboard" or name not in self._known or not self._last_step < step <= self._seen_step

    def _for_each(self, call: Callable[[str, Tracker], Any]) -> None:
        if self._active is None:
            self._active = {}
            self._open()
        for name, tracker in list(self._active.items()):
            try:
                call(name, tracker)
            except Exception as error:
                self._leave_out(name, error)

    def _open(self) -> None:
        if not self._names:
            return
        state = self._read_state() if self._last_step or self._seen_step else {}
        identity = str(state.get("identity") or uuid.uuid4().hex[:12])
        self._known = set(state.get("trackers", ()))
        assert self._active is not None
        shown = dataclasses.replace(self._options, validation=with_redacted_images(self._options.validation))
        for name in self._names:
            opening = Opening(
                folder=self._folder,
                project=self._options.tracking.tracker_name,
                run=self._folder.name,
                identity=identity,
                last_step=self._last_step,
                config=plain_values(shown),
            )
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._active[name] = OPEN[name](opening)
            except Exception as error:
                self._leave_out(name, error)
        if not self._active:  # nothing was shown; and the folder may be what failed
            return
        state = {"identity": identity, "trackers": sorted(self._known | self._active.keys())}
        try:
            write_durably(self._folder / "trackers.json", json.dumps(state).encode())
        except OSError as error:
            logger.warning("%s: when the run goes on, dashboards will show it as a new one", error)

    def _read_state(self) -> dict[str, Any]:
        try:
            content = json.loads((self._folder / "trackers.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _leave_out(self, name: str, error: Exception) -> None:
        assert self._active is not None
        self._active.pop(name, None)
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        logger.warning("--report_to %s: %s; the training goes on without it", name, reason)


class TensorBoard:
    """Event files; steps that a later part of the run repeats are purged by the reader."""

    def __init__(self, opening: Opening):
        from torch.utils.tensorboard import SummaryWriter

        purge = opening.last_step + 1 if opening.last_step else 0
        self._writer = SummaryWriter(str(opening.folder), purge_step=purge, flush_secs=30)
        if not opening.last_step:
            lines = (f"    {name}: {value!r}" for name, value in opening.config.items())
            self._writer.add_text("config", "\n".join(lines), 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, file: Path, prompt: str) -> None:
        """An animated GIF as an image: `add_video` makes the same, but needs moviepy and raw frames."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        content, (width, height) = to_gif(file)
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
        events: Any = self._writer.file_writer
        events.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        self._writer.add_text(f"{name}/prompt", f"    {' '.join(prompt.split())}", step)  # indented: not Markdown
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; steps are a metric of ours, as its own counter refuses to go back."""

    def __init__(self, opening: Opening):
        import wandb

        self._run = wandb.init(
            project=opening.project,
            name=opening.run,
            id=opening.identity,
            resume="allow",
            dir=str(opening.folder),
            config=dict(opening.config),
            # Neither the command line, in which a token may stand, nor the terminal's text.
            settings=wandb.Settings(x_disable_meta=True, console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def video(self, step: int, name: str, file: Path, prompt: str) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Video(str(file), caption=prompt, format="mp4")})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, found again by its name."""

    def __init__(self, opening: Opening):
        import trackio

        trackio.init(
            project=opening.project,
            name=f"{opening.run}-{opening.identity}",
            config=dict(opening.config),
            resume="allow",
            embed=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        import trackio

        trackio.log(dict(values), step=step)

    def video(self, step: int, name: str, file: Path, prompt: str) -> None:
        import trackio

        trackio.log({name: trackio.Video(str(file), caption=prompt)}, step=step)

    def close(self) -> None:
        import trackio

        trackio.finish()


OPEN: dict[str, Callable[[Opening], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def to_gif(file: Path) -> tuple[bytes, tuple[int, int]]:
    """A video file as an animated GIF no larger than `GIF_PIXELS`, and its width and height."""
    with av.open(str(file)) as video:
        fps = float(video.streams.video[0].average_rate or 8)
        images = [frame.to_image() for frame in video.decode(video=0)]
    for image in images:
        image.thumbnail((GIF_PIXELS, GIF_PIXELS), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return content.getvalue(), images[0].size

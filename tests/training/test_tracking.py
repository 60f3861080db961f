"""What the dashboards are given: TensorBoard's files are read back, the others are stand-ins that keep what comes."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import io
import itertools
import json
import logging
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from cogvideox_factory.config import HubOptions, Secret, TrackingOptions, Train, UserError, ValidationOptions
from cogvideox_factory.data.video import write_video
from cogvideox_factory.sampling import Video
from cogvideox_factory.training import tracking
from cogvideox_factory.training.metrics import MetricsLog, read_metrics
from cogvideox_factory.training.tracking import Trackers, choose_trackers, to_gif

Cli = Callable[..., tuple[int, str, str]]


class Dashboard:
    """Stands in for the modules wandb and trackio, and keeps what it is given."""

    def __init__(self, name: str):
        self.module = types.ModuleType(name)
        self.module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="here")
        self.started: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.num_finished = 0
        self.fails_from: int | None = None
        members: dict[str, Any] = {
            "init": self.init,
            "log": self.log,
            "finish": self.finish,
            "define_metric": lambda *a, **k: None,
        }
        members |= {"Video": lambda path, **options: (path, options), "Settings": dict}
        for key, value in members.items():
            setattr(self.module, key, value)

    def init(self, **options: Any) -> types.ModuleType:
        self.started.append(options)
        return self.module

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        row = {**values} if step is None else {"step": step, **values}
        if self.fails_from is not None and row["step"] >= self.fails_from:
            raise ConnectionError("the server is gone\nand more")
        self.rows.append(row)

    def finish(self) -> None:
        self.num_finished += 1

    def series(self, name: str) -> list[tuple[int, Any]]:
        return [(row["step"], row[name]) for row in self.rows if name in row]


@pytest.fixture
def dashboards(monkeypatch: pytest.MonkeyPatch) -> dict[str, Dashboard]:
    made = {name: Dashboard(name) for name in ("wandb", "trackio")}
    for name, dashboard in made.items():
        monkeypatch.setitem(sys.modules, name, dashboard.module)
    return made


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make libraries appear as not installed."""

    def call(*names: str) -> None:
        monkeypatch.setattr(tracking, "is_installed", lambda name: name not in names)

    return call


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    monkeypatch.setattr(logging.getLogger("cogvideox_factory"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def options(run: Path, **tracking_options: Any) -> Train:
    hub = HubOptions(hub_token=Secret("hf_do_not_tell"))
    return Train(output_dir=run, hub=hub, tracking=TrackingOptions(**tracking_options))


def write_metrics(run: Path, *steps: int) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


@pytest.fixture
def videos(tmp_path: Path) -> tuple[Path, list[Video]]:
    """A folder with a video that gets brighter."""
    folder = tmp_path / "videos"
    levels = np.linspace(20, 220, 9).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (9, 320, 480, 3))
    write_video(folder / "prompt-00-video-0.mp4", np.ascontiguousarray(frames), 8.0)
    return folder, [Video("prompt-00-video-0.mp4", "a <b>red</b> fox", 1)]


# --- which ---


def test_without_a_wish_tensorboard_is_taken_where_it_is_installed(missing) -> None:
    assert choose_trackers(()) == ("tensorboard",)
    missing("tensorboard")
    assert choose_trackers(()) == ()


def test_what_is_asked_for_is_taken(missing) -> None:
    missing("trackio")
    assert choose_trackers(["none"]) == ()
    assert choose_trackers(["wandb", "tensorboard", "wandb"]) == ("wandb", "tensorboard")
    assert choose_trackers(["all"]) == ("tensorboard", "wandb")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "all"])
def test_what_is_asked_for_and_missing_is_told_with_its_remedy(missing, name: str) -> None:
    missing("tensorboard", "wandb", "trackio")
    with pytest.raises(
        UserError, match=rf"--report_to {name}: .*pip install {'tensorboard' if name == 'all' else name}"
    ):
        choose_trackers([name])
    with pytest.raises(UserError, match="none cannot stand beside"):
        choose_trackers(["none", "wandb"])


def test_a_folder_named_as_a_library_is_no_library(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "trackio_of_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not tracking.is_installed("trackio_of_a_run")
    assert tracking.is_installed("tensorboard")


def test_a_missing_library_ends_train_before_the_model_is_looked_at(cli: Cli, tmp_path: Path, missing) -> None:
    missing("wandb")
    code, _, messages = cli(
        *("train", "--pretrained_model_name_or_path", "no/such-model", "--data_root", tmp_path),
        *("--output_dir", tmp_path / "run", "--report_to", "wandb"),
    )
    assert code == 2 and "pip install wandb" in messages and "no/such-model" not in messages
    assert not (tmp_path / "run").exists()


# --- what they are given ---


def test_every_dashboard_gets_scalars_config_and_videos(tmp_path: Path, dashboards, videos) -> None:
    run = tmp_path / "run"
    with Trackers(("tensorboard", "wandb", "trackio"), options(run, tracker_name="mice")) as trackers:
        trackers.start_after(0, options(run, tracker_name="mice"))
        trackers.show_videos(0, *videos)
        for step in (1, 2):
            trackers.log_line({"step": step, "loss": step / 2, "lr": 1e-4, "note": "text"})
        trackers.log(2, {"held_out/loss": 0.25})
    folder = run / "logs" / "run"
    assert scalars(folder, "train/loss") == [(1, 0.5), (2, 1.0)]
    assert scalars(folder, "held_out/loss") == [(2, 0.25)]
    for name, dashboard in dashboards.items():
        assert dashboard.series("train/loss") == [(1, 0.5), (2, 1.0)]
        assert dashboard.series("held_out/loss") == [(2, 0.25)]
        ((step, (path, given)),) = dashboard.series("validation/prompt-00-video-0")
        assert (step, path, given["caption"]) == (0, str(videos[0] / "prompt-00-video-0.mp4"), "a <b>red</b> fox")
        (started,) = dashboard.started
        assert started["project"] == "mice" and started["config"]["tracker_name"] == "mice", name
        assert "train/note" not in dashboard.rows[1] and dashboard.num_finished == 1
    assert "hf_do_not_tell" not in repr(dashboards["wandb"].started) + repr(dashboards["trackio"].started)
    assert not any(b"hf_do_not_tell" in path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert dashboards["wandb"].started[0]["settings"]["x_disable_meta"]  # it holds the command line


def test_tensorboard_gets_a_video_as_an_animated_picture(tmp_path: Path, videos) -> None:
    with Trackers(("tensorboard",), options(tmp_path / "run")) as trackers:
        trackers.show_videos(3, *videos)
    read = events(tmp_path / "run/logs/run")
    (event,) = read.Images("validation/prompt-00-video-0")
    assert (event.step, event.width, event.height) == (3, 320, 213)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert (image.format, image.size, image.n_frames) == ("GIF", (320, 213), 9)  # type: ignore[attr-defined]
        levels = []
        for index in range(9):
            image.seek(index)
            assert image.info["duration"] in (120, 130)  # 125 ms, which GIF knows in hundredths only
            levels.append(np.asarray(image.convert("L")).mean())
    assert np.allclose(levels, np.linspace(20, 220, 9), atol=4)
    (text,) = read.Tensors("validation/prompt-00-video-0/prompt/text_summary")
    assert text.tensor_proto.string_val[0] == b"    a <b>red</b> fox"
    assert to_gif(videos[0] / videos[1][0].file)[1] == (320, 213)


def test_logging_dir_is_within_the_run_or_where_it_is_said_to_be(tmp_path: Path) -> None:
    for given, expected in ((Path("events"), tmp_path / "run/events/run"), (tmp_path / "all", tmp_path / "all/run")):
        with Trackers(("tensorboard",), options(tmp_path / "run", logging_dir=given)) as trackers:
            trackers.log(1, {"train/loss": 1.0})
        assert scalars(expected, "train/loss") == [(1, 1.0)]


def test_nothing_is_opened_for_nothing(tmp_path: Path, dashboards) -> None:
    with Trackers(("tensorboard", "wandb"), options(tmp_path / "run")) as trackers:
        trackers.start_after(4, options(tmp_path / "run"))
    with Trackers((), options(tmp_path / "run")) as trackers:
        trackers.log(1, {"train/loss": 1.0})
    assert not dashboards["wandb"].started and not (tmp_path / "run/logs/run").exists()


def test_a_signed_address_is_shown_without_what_gives_access(tmp_path: Path, dashboards) -> None:
    images = "a.png:::https://mouse:pass@a.example/b.png?X-Signature=s3cret"
    signed = dataclasses.replace(options(tmp_path / "run"), validation=ValidationOptions(validation_images=images))
    with Trackers(("tensorboard", "wandb", "trackio"), signed) as trackers:
        trackers.log(1, {"train/loss": 1.0})
    for dashboard in dashboards.values():
        assert dashboard.started[0]["config"]["validation_images"] == "a.png:::https://a.example/b.png?…"
    for file in (tmp_path / "run/logs").rglob("*"):
        assert file.is_dir() or b"s3cret" not in file.read_bytes()


# --- going on ---


def test_after_a_resume_steps_go_on_without_repeats(tmp_path: Path, dashboards, monkeypatch) -> None:
    # The reader goes by the names of the files, which begin with the second; parts of a run are never in the same one.
    monkeypatch.setattr(event_file_writer, "time", types.SimpleNamespace(time=itertools.count(1).__next__))
    run = tmp_path / "run"
    names = ("tensorboard", "wandb", "trackio")

    def part(last_step: int, steps: range, seen: range, course: float) -> None:
        write_metrics(run, *seen)
        with Trackers(names, options(run)) as trackers:
            trackers.start_after(last_step, options(run))
            for step in steps:
                trackers.log_line({"step": step, "loss": step + course})

    part(0, range(1, 6), range(0), 0.0)
    part(3, range(4, 8), range(1, 6), 0.0)  # died after step 5, its last checkpoint was that of step 3
    expected = [(step, float(step)) for step in range(1, 8)]
    assert scalars(run / "logs/run", "train/loss") == expected
    for dashboard in dashboards.values():
        assert dashboard.series("train/loss") == expected
    first, second = dashboards["wandb"].started
    assert first["id"] == second["id"] and second["resume"] == "allow"
    first, second = dashboards["trackio"].started
    assert first["name"] == second["name"]
    # TensorBoard's files can be taken back: another course from step 3 shows as such.
    part(3, range(4, 6), range(1, 8), 0.5)
    assert scalars(run / "logs/run", "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5)]
    part(0, range(1, 3), range(0), 0.25)  # begun anew: another run
    assert scalars(run / "logs/run", "train/loss") == [(1, 1.25), (2, 2.25)]
    assert dashboards["wandb"].started[-1]["id"] != second["name"].removeprefix("run-")


def test_a_dashboard_that_joins_later_misses_no_step_from_there_on(tmp_path: Path, dashboards) -> None:
    run = tmp_path / "run"
    for names, last_step, steps in ((("tensorboard",), 0, range(1, 6)), (("tensorboard", "wandb"), 3, range(4, 8))):
        with Trackers(names, options(run)) as trackers:
            trackers.start_after(last_step, options(run))
            for step in steps:
                trackers.log_line({"step": step, "loss": float(step)})
        write_metrics(run, *range(1, 6))
    assert dashboards["wandb"].series("train/loss") == [(step, float(step)) for step in range(4, 8)]


# --- failures ---


def test_a_dashboard_that_fails_is_told_once_and_the_others_go_on(tmp_path: Path, dashboards, warnings) -> None:
    run = tmp_path / "run"
    dashboards["trackio"].fails_from = 2

    def refuse(**options: Any) -> None:
        raise RuntimeError("no login")

    dashboards["wandb"].module.init = refuse
    with Trackers(("wandb", "trackio", "tensorboard"), options(run)) as trackers:
        for step in range(1, 5):
            trackers.log_line({"step": step, "loss": float(step)})
    assert warnings() == [
        "--report_to wandb: no login; the training goes on without it",
        "--report_to trackio: the server is gone; the training goes on without it",
    ]
    assert [step for step, _ in scalars(run / "logs/run", "train/loss")] == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_made_ends_no_training(tmp_path: Path, dashboards, warnings) -> None:
    (tmp_path / "file").write_text("mine")
    with Trackers(("tensorboard", "wandb"), options(tmp_path / "run", logging_dir=tmp_path / "file")) as trackers:
        trackers.log_line({"step": 1, "loss": 1.0})
        trackers.log_line({"step": 2, "loss": 1.0})
    assert [message.split(":")[0] for message in warnings()] == ["--report_to tensorboard", "--report_to wandb"]
    assert all(message.endswith("; the training goes on without it") for message in warnings())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_state_that_cannot_be_written_ends_no_training(tmp_path: Path, warnings) -> None:
    (tmp_path / "run/logs/run/trackers.json").mkdir(parents=True)
    with Trackers(("tensorboard",), options(tmp_path / "run")) as trackers:
        trackers.log_line({"step": 1, "loss": 1.0})
    (message,) = warnings()
    assert "trackers.json" in message and "as a new one" in message
    assert scalars(tmp_path / "run/logs/run", "train/loss") == [(1, 1.0)]


# --- a whole run ---


def test_a_run_that_is_stopped_and_resumed_shows_every_step_once(
    cli: Cli, tiny_model: Path, prepared_folder: Path, tmp_path: Path, dashboards, monkeypatch
) -> None:
    run = tmp_path / "run"
    write = MetricsLog.write

    def write_then_stop(log: MetricsLog, **values: Any) -> None:
        write(log, **values)
        if values["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    command = (
        *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder, "--load_tensors"),
        *("--output_dir", run, "--rank", "4", "--train_batch_size", "2", "--max_train_steps", "4"),
        *("--validation_prompt", "a red square", "--num_inference_steps", "1", "--report_to", "tensorboard", "wandb"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_then_stop)
        assert cli(*command)[0] == 75
    code, _, messages = cli(*command, "--resume_from_checkpoint", "latest")
    assert code == 0, messages
    lines = read_metrics(run / "metrics.jsonl")
    read = events(run / "logs/run")
    for name in ("loss", "lr", "grad_norm", "epoch", "step_seconds", "samples_seen"):
        expected = [(line["step"], line[name]) for line in lines]
        shown = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        assert [step for step, _ in shown] == [1, 2, 3, 4]
        assert np.allclose(shown, expected, rtol=1e-6)  # TensorBoard keeps 32 bits
        assert dashboards["wandb"].series(f"train/{name}") == expected
    assert [event.step for event in read.Images("validation/prompt-00-video-0")] == [0, 4]
    assert dashboards["wandb"].num_finished == 2

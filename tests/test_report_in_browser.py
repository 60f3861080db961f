"""The pages of `report` in headless Chromium: they render on a phone, their videos play in step, nothing is refused."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from test_report import add_metrics, add_prepared, add_videos, make_run

from cogvideox_factory.data.video import write_video
from cogvideox_factory.report import write_comparison, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NUM_FRAMES, FPS = 16, 8
# The page stands in a frame as wide as a phone. What a reader does with it is done from outside: the page's own policy
# admits no script but its own.
FRAME = """<!DOCTYPE html><iframe id="frame" style="width:390px;height:800px"></iframe>
<script>
const until = (node, event) => new Promise(done => node.addEventListener(event, done, { once: true }));
document.getElementById("frame").addEventListener("load", async ({ target }) => {
  const page = target.contentDocument, samples = [...page.querySelectorAll(".sample")];
  const videos = [...page.querySelectorAll("video")];
  await Promise.all(videos.map(video => video.readyState ? null : until(video, "loadedmetadata")));
  videos[0].scrollIntoView(); // of itself, Chromium plays what is in sight only
  if (videos[0].paused) await until(videos[0], "playing");
  const [button, slider] = samples[0].querySelectorAll(".controls > *");
  const shown = { width: page.documentElement.scrollWidth, buttons: [button.textContent] };
  shown.durations = samples.map(sample => [...sample.querySelectorAll("video")].map(video => video.duration));
  shown.sizes = videos.map(video => [video.videoWidth, video.videoHeight]);
  shown.background = getComputedStyle(page.body).backgroundColor;
  shown.curves = [...page.querySelectorAll("path.line")].map(path => path.getBoundingClientRect().width);
  shown.inputHidden = slider.offsetWidth == 0;
  const of_first = [...samples[0].querySelectorAll("video")];
  const sought = Promise.all(of_first.map(video => until(video, "seeked")));
  slider.value = 500;
  slider.dispatchEvent(new Event("input"));
  await sought;
  await new Promise(done => setTimeout(done, 100));
  shown.places = of_first.map(video => video.currentTime);
  shown.paused = of_first.map(video => video.paused);
  shown.buttons.push(button.textContent);
  const started = Promise.all(of_first.map(video => until(video, "playing")));
  button.click();
  await started;
  shown.buttons.push(button.textContent);
  await fetch("/", { method: "POST", body: JSON.stringify(shown) });
});
document.getElementById("frame").src = "/page";
</script>
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs with videos as training writes them, at three steps each."""
    made = make_run(tmp_path / "first", rank=4), make_run(tmp_path / "second", rank=64)
    for run in made:
        add_metrics(run, [1.0, 0.7, 0.5])
        add_prepared(run / "prepared", [[NUM_FRAMES, 64, 96]], [{"path": "short.mp4", "reason": "3 frames"}])
        (run / "validation_loss.jsonl").write_text('{"step": 0, "loss": 1}\n{"step": 3, "loss": 0.8}\n')
        memory = {"kind": "GPU memory", "unit": "GiB", "measured": {"memory_before_training": 5.0}}
        (run / "memory.json").write_text(json.dumps(memory))
        for step in (0, 1, 3):
            video = tmp_path / "video.mp4"
            frames = np.full((NUM_FRAMES, 64, 96, 3), 60 * step, np.uint8)
            write_video(video, frames, FPS)
            add_videos(run, step, *((prompt, 1, video.read_bytes()) for prompt in ("a boat", "a word" + "long" * 40)))
    return made


class Desk(ThreadingHTTPServer):
    """Hands a page and the frame around it to the browser, and takes what was seen."""

    def __init__(self, page: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.files = {"/": FRAME.encode(), "/page": page.read_bytes()}
        self.seen: queue.Queue[str] = queue.Queue()


class _Requests(BaseHTTPRequestHandler):
    server: Desk

    def do_GET(self) -> None:
        content = self.server.files.get(self.path, b"")
        self.send_response(200 if content else 204)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.server.seen.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def seen_in_browser(page: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """What a reader of the page sees and does; fails where the browser complains of anything."""
    assert CHROMIUM is not None
    messages = folder / "messages.txt"
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"),
        *("--disable-background-networking", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"),
    ]
    with Desk(page) as desk, messages.open("w") as log:
        Thread(target=desk.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{desk.server_address[1]}/"
        with subprocess.Popen([*command, *flags, address], stdout=log, stderr=log) as browser:
            try:
                seen = json.loads(desk.seen.get(timeout=30))
            except queue.Empty:
                pytest.fail(f"the browser did not come to the end of the page: {messages.read_text()}")
            finally:
                browser.terminate()
                desk.shutdown()
    assert "CONSOLE" not in messages.read_text(), messages.read_text()
    return seen


def check(seen: dict[str, Any], num_videos: int, num_curves: int) -> None:
    """Of each sample `num_videos`, and `num_curves` that have a size."""
    seconds = pytest.approx(NUM_FRAMES / FPS, abs=0.01)
    assert seen["durations"] == [[seconds] * num_videos] * 2
    assert seen["sizes"] == [[96, 64]] * (2 * num_videos)
    assert seen["width"] <= 390, "the page is wider than a phone"
    assert len(seen["curves"]) == num_curves and min(seen["curves"]) > 100
    assert not seen["inputHidden"]
    assert seen["buttons"] == ["Pause", "Play", "Pause"]
    # The slider stops them all, at the same place.
    assert seen["paused"] == [True] * num_videos
    assert seen["places"] == [pytest.approx(NUM_FRAMES / FPS / 2, abs=0.02)] * num_videos


@pytest.mark.parametrize(("scheme", "background"), [("light", "rgb(252, 252, 251)"), ("dark", "rgb(21, 23, 27)")])
def test_the_page_of_a_run(runs: tuple[Path, Path], tmp_path: Path, scheme: str, background: str) -> None:
    flags = [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    seen = seen_in_browser(write_report(runs[0]), tmp_path, *flags)
    # Before and after, and a film strip of three, of which the script has added two; five curves with the held-out one.
    check(seen, num_videos=5, num_curves=6)
    assert seen["background"] == background


def test_the_page_of_a_comparison(runs: tuple[Path, Path], tmp_path: Path) -> None:
    check(seen_in_browser(write_comparison(runs), tmp_path), num_videos=2, num_curves=10)


def test_what_the_policy_refuses_would_be_heard_of(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = write_report(runs[0])
    page.write_text(page.read_text().replace("</main>", "</main><script>alert(1)</script>"))
    with pytest.raises(AssertionError, match="Content Security Policy"):
        seen_in_browser(page, tmp_path)

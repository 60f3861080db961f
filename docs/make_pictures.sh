#!/usr/bin/env bash
# Makes the pictures of README and docs from a real run: what the demo has learned, its report, rendered by headless
# Chromium, and the contact sheet of a few rendered clips with faults.
set -euo pipefail
cd "$(dirname "$0")/.."
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
.venv/bin/cogvideox-factory demo --output_dir "$run/demo"
cp "$run/demo/before-after.gif" docs/images/before-after.gif
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run \
  --disable-background-networking --user-data-dir="$run/profile" --virtual-time-budget=4000 \
  --window-size=900,1500 --screenshot="docs/images/demo-report.png" "file://$run/demo/run/report.html"
.venv/bin/python - "$run/faulty" <<'PYTHON'
import sys
from pathlib import Path
import numpy as np
from cogvideox_factory.data.video import write_video
from cogvideox_factory.demo.world import FPS, Scene


def render(colour, shape, motion):
    return Scene(colour, shape, motion, "dark").render()


folder = Path(sys.argv[1])
red, blue = render("red", "circle", "moving right"), render("blue", "square", "moving left")
clips = {
    "landscape": (red, "a red circle moving right on a dark background"),
    "portrait": (render("green", "triangle", "moving down").transpose(0, 2, 1, 3), "a green triangle moving right"),
    "two scenes": (np.concatenate([red[:9], 255 - blue[9:]]), "a red circle, then a square on a light background"),
    "frozen": (np.repeat(blue[12:13], 25, axis=0), "a blue square moving left on a dark background"),
    "landscape copy": (red, "a red circle moving right on a dark background"),
}
for name, (frames, caption) in clips.items():
    write_video(folder / f"{name}.mp4", np.ascontiguousarray(frames), FPS)
    (folder / f"{name}.txt").write_text(caption)
PYTHON
.venv/bin/cogvideox-factory inspect --pretrained_model_name_or_path "$run/demo/model" --data_root "$run/faulty" \
  --height_buckets 64 96 --width_buckets 64 96 --output_dir "$run/inspect"
cp "$run/inspect/contact_sheet.png" docs/images/contact-sheet.png
.venv/bin/python - <<'PYTHON'
from PIL import Image

for path in ("docs/images/demo-report.png", "docs/images/contact-sheet.png"):
    picture = Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=128)
    picture.save(path, optimize=True)
PYTHON

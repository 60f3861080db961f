#!/usr/bin/env bash
# Makes the pictures of README and docs from a real run: the demo's report, rendered by headless Chromium, and the
# contact sheet of the demo's clips.
set -euo pipefail
cd "$(dirname "$0")/.."
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
.venv/bin/cogvideox-factory demo --output_dir "$run/demo"
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run \
  --disable-background-networking --user-data-dir="$run/profile" --virtual-time-budget=4000 \
  --window-size=900,1500 --screenshot="docs/images/demo-report.png" "file://$run/demo/run/report.html"
.venv/bin/cogvideox-factory inspect --pretrained_model_name_or_path "$run/demo/model" --data_root "$run/demo/clips" \
  --height_buckets 64 96 --width_buckets 96 --num_rows 4 --output_dir "$run/inspect"
cp "$run/inspect/contact_sheet.png" docs/images/contact-sheet.png
.venv/bin/python - <<'PYTHON'
from PIL import Image
picture = Image.open("docs/images/demo-report.png").convert("P", palette=Image.Palette.ADAPTIVE, colors=128)
picture.save("docs/images/demo-report.png", optimize=True)
PYTHON

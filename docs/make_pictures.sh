#!/usr/bin/env bash
# Makes README's picture from a real run: the demo's report, rendered by headless Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
.venv/bin/cogvideox-factory demo --output_dir "$run/demo"
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run \
  --disable-background-networking --user-data-dir="$run/profile" --virtual-time-budget=4000 \
  --window-size=900,1500 --screenshot="docs/images/demo-report.png" "file://$run/demo/run/report.html"
.venv/bin/python - <<'PYTHON'
from PIL import Image
picture = Image.open("docs/images/demo-report.png").convert("P", palette=Image.Palette.ADAPTIVE, colors=128)
picture.save("docs/images/demo-report.png", optimize=True)
PYTHON

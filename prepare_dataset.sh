#!/usr/bin/env bash
# Encode clips and captions once, so that `cogvideox-factory train --load_tensors` starts at once, also on other
# machines. Run again after clips were added or changed: only those are encoded. Variables can be set from outside.
set -euo pipefail

MODEL=${MODEL:-THUDM/CogVideoX-5b}                    # a name on the Hugging Face Hub, or a folder
DATA_ROOT=${DATA_ROOT:-data/steamboat}                # prompts.txt, videos.txt and the clips
OUTPUT_DIR=${OUTPUT_DIR:-data/steamboat-prepared}     # give this as --data_root to `train --load_tensors`
FRAMES=${FRAMES:-49}                                  # one number or several: "17 49"
HEIGHTS=${HEIGHTS:-480}
WIDTHS=${WIDTHS:-720}

# shellcheck disable=SC2086  # several sizes are several words
cogvideox-factory prepare \
  --pretrained_model_name_or_path "$MODEL" \
  --data_root "$DATA_ROOT" \
  --output_dir "$OUTPUT_DIR" \
  --frame_buckets $FRAMES --height_buckets $HEIGHTS --width_buckets $WIDTHS \
  --use_tiling \
  "$@"

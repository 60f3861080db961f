#!/usr/bin/env bash
# Fine-tune a whole CogVideoX image-to-video model on your clips. Every variable can be set from outside:
#   MODEL=THUDM/CogVideoX1.5-5B-I2V DATA_ROOT=my-clips ./train_image_to_video_sft.sh
# Further options of `cogvideox-factory train --help` can be added behind the script's name and win over those below.
set -euo pipefail

MODEL=${MODEL:-THUDM/CogVideoX-5b-I2V}      # a name on the Hugging Face Hub, or a folder
DATA_ROOT=${DATA_ROOT:-data/steamboat}      # prompts.txt, videos.txt and the clips
OUTPUT_DIR=${OUTPUT_DIR:-runs/i2v-sft}      # the run: pipeline, checkpoints, videos, report.html
FRAMES=${FRAMES:-49}                        # one number or several: "17 49"
HEIGHTS=${HEIGHTS:-480}
WIDTHS=${WIDTHS:-720}
STEPS=${STEPS:-1000}
CHECKPOINTS=${CHECKPOINTS:-2}               # how many are kept; each holds the weights and the optimizer's state
LEARNING_RATE=${LEARNING_RATE:-1e-5}        # a tenth of what a LoRA takes
PROMPT=${PROMPT:-"A black and white animated mouse whistles at the wheel of a steamboat"}
IMAGE=${IMAGE:-first_frame}                 # picture that the validation videos start from, or first_frame of a clip
INFERENCE_STEPS=${INFERENCE_STEPS:-50}      # denoising steps of the validation videos

# shellcheck disable=SC2086  # several sizes are several words
cogvideox-factory train \
  --training_type sft \
  --pretrained_model_name_or_path "$MODEL" \
  --data_root "$DATA_ROOT" \
  --output_dir "$OUTPUT_DIR" \
  --frame_buckets $FRAMES --height_buckets $HEIGHTS --width_buckets $WIDTHS \
  --max_train_steps "$STEPS" --checkpoints_total_limit "$CHECKPOINTS" \
  --learning_rate "$LEARNING_RATE" --lr_scheduler cosine --lr_warmup_steps $((STEPS / 20)) \
  --gradient_checkpointing --use_tiling --enable_tiling --enable_model_cpu_offload \
  --validation_prompt "$PROMPT" --validation_images "$IMAGE" --num_inference_steps "$INFERENCE_STEPS" \
  --resume_from_checkpoint latest \
  "$@"

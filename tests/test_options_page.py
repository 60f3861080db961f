"""docs/options.md says what the declarations say, and the options of the original's scripts are taken."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import COMMANDS, option_values

ROOT = Path(__file__).parent.parent
MAKER = ROOT / "docs/make_options.py"

# Every option of the original project's scripts, as existing scripts spell it, with a value that they use.
ORIGINAL = {
    "train": """
        --pretrained_model_name_or_path THUDM/CogVideoX-5b --revision main --variant fp16 --cache_dir cache
        --data_root data --dataset_file data.csv --video_column video --caption_column text --id_token BW_STYLE
        --height_buckets 256 480 --width_buckets 256 720 --frame_buckets 16 49 --load_tensors --random_flip 0.5
        --dataloader_num_workers 4 --pin_memory --video_reshape_mode center --max_num_frames 49 --fps 8
        --skip_frames_start 0 --skip_frames_end 0
        --validation_prompt a:::b --validation_images a.png --validation_prompt_separator :::
        --num_validation_videos 1 --validation_steps 100 --validation_epochs 10 --guidance_scale 6 --use_dynamic_cfg
        --enable_model_cpu_offload --enable_slicing --enable_tiling --height 480 --width 720
        --seed 42 --rank 64 --lora_alpha 64 --mixed_precision bf16 --output_dir out --train_batch_size 1
        --num_train_epochs 30 --max_train_steps 1000 --checkpointing_steps 500 --checkpoints_total_limit 2
        --resume_from_checkpoint latest --gradient_accumulation_steps 1 --gradient_checkpointing --learning_rate 1e-4
        --scale_lr --lr_scheduler cosine_with_restarts --lr_warmup_steps 400 --lr_num_cycles 1 --lr_power 1
        --noised_image_dropout 0.05 --ignore_learned_positional_embeddings --allow_tf32 --nccl_timeout 1800
        --optimizer adamw --use_8bit --use_torchao --beta1 0.9 --beta2 0.95 --beta3 0.98 --weight_decay 0.001
        --epsilon 1e-8 --max_grad_norm 1.0 --prodigy_decouple --prodigy_use_bias_correction
        --prodigy_safeguard_warmup --use_4bit --use_cpu_offload_optimizer --offload_gradients
        --report_to wandb --tracker_name cogvideox-lora --logging_dir logs --push_to_hub --hub_token hf_x
        --hub_model_id me/my-lora
    """,
    "prepare": """
        --model_id THUDM/CogVideoX-5b --data_root data --dataset_file data.csv --caption_column prompts.txt
        --video_column videos.txt --output_dir out --height_buckets 480 --width_buckets 720 --frame_buckets 49
        --max_num_frames 49 --max_sequence_length 226 --target_fps 8 --batch_size 1 --dtype fp32 --random_flip 0.5
        --id_token BW_STYLE --save_latents_and_embeddings --save_image_latents --use_slicing --use_tiling
        --num_decode_threads 2 --num_artifact_workers 4 --video_reshape_mode center --seed 42
        --skip_frames_start 0 --skip_frames_end 0
    """,
}


@pytest.mark.parametrize("command", list(ORIGINAL))
def test_every_option_of_the_originals_scripts_is_taken(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_command(COMMANDS[command], command, ORIGINAL[command].split())
    values = option_values(options)
    told = capsys.readouterr().err
    for word in ORIGINAL[command].split():
        name = word.removeprefix("--")
        if word.startswith("--") and name not in ("model_id", "target_fps", "num_decode_threads"):  # other names
            assert name in values or f"--{name} is no longer needed: " in told, name


def test_the_page_is_what_the_declarations_say() -> None:
    spec = importlib.util.spec_from_file_location("make_options", MAKER)
    assert spec and spec.loader
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    assert text == maker.page(), "run docs/make_options.py"
    for command in COMMANDS.values():
        for name in option_values(command()):
            assert f"| `--{name}`" in text, name

"""Teaches the transformer of the demo's tiny CogVideoX its world, with the program's own `prepare` and `train`.

    python tools/tiny_model/train_transformer.py --vae models/tiny-vae --output models/tiny

Some scenes are held out: what it makes of their captions is compared with the scenes. The pipeline in half precision
and its figures are then in `learned` in the output folder, to be copied to src/cogvideox_factory/demo/weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

from cogvideox_factory.cli import main as program
from cogvideox_factory.demo.learned_model import build_pipeline
from cogvideox_factory.demo.world import NATIVE_SIZE, Scene, all_scenes, render_clips

NUM_HELD_OUT, NUM_SAMPLED = 96, 24
INFERENCE_STEPS, GUIDANCE_SCALE = 20, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vae", type=Path, required=True, help="folder that train_vae.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of everything; a second call goes on")
    parser.add_argument("--steps", type=int, default=10000, help="of the optimizer, with a batch of 16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    root: Path = arguments.output
    scenes = all_scenes()
    order = np.random.default_rng(arguments.seed).permutation(len(scenes))
    held_out, trained = [[scenes[i] for i in part] for part in np.split(order, [NUM_HELD_OUT])]

    model = root / "untaught"
    if not model.exists():
        vae = AutoencoderKLCogVideoX.from_pretrained(arguments.vae, torch_dtype=torch.float32)
        build_pipeline(arguments.seed, vae.eval()).save_pretrained(model)
    base = ("--pretrained_model_name_or_path", model)
    for name, part in (("trained", trained), ("held-out", held_out)):
        if not (root / name / "prompts.txt").exists():
            render_clips(root / name, part, NATIVE_SIZE)
        call("prepare", *base, "--data_root", root / name, "--output_dir", root / f"prepared-{name}")
    run = root / "run"
    call(
        *("train", *base, "--training_type", "sft", "--output_dir", run, "--seed", str(arguments.seed)),
        *("--load_tensors", "--data_root", root / "prepared-trained"),
        *("--validation_data_root", root / "prepared-held-out", "--validation_loss_steps", "1000"),
        *("--max_train_steps", str(arguments.steps), "--train_batch_size", "16", "--ema_decay", "0.998"),
        *("--learning_rate", "4e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "200"),
        *("--checkpointing_steps", "1000", "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest"),
        *("--validation_prompt", ":::".join(scene.caption for scene in held_out[:4]), "--validation_steps", "5000"),
        *("--num_inference_steps", str(INFERENCE_STEPS), "--guidance_scale", str(GUIDANCE_SCALE)),
    )

    learned = root / "learned"
    shutil.rmtree(learned, ignore_errors=True)
    CogVideoXPipeline.from_pretrained(run, torch_dtype=torch.float16).save_pretrained(learned)
    for path in (learned / "model_index.json", *learned.glob("*/config.json")):  # which say on which machine they lay
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    pipeline = CogVideoXPipeline.from_pretrained(learned, torch_dtype=torch.float32)
    losses = [json.loads(line)["loss"] for line in (run / "validation_loss.jsonl").read_text().splitlines()]
    figures = {
        "autoencoder": json.loads((arguments.vae / "figures.json").read_text()),
        "steps": arguments.steps,
        "held-out loss, first and last": [round(losses[0], 4), round(losses[-1], 4)],
        **measure(pipeline, held_out[:NUM_SAMPLED], arguments.seed),
        "bytes": sum(path.stat().st_size for path in learned.rglob("*") if path.is_file()),
    }
    (root / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def call(*arguments: str | Path) -> None:
    code = program([str(argument) for argument in arguments])
    if code:
        raise SystemExit(code)


def measure(pipeline: CogVideoXPipeline, held_out: list[Scene], seed: int) -> dict[str, Any]:
    """How far its videos of held-out captions are from the scenes, and in what the nearest scene is right.

    Distances are mean absolute differences of pixels from 0 to 255.
    """
    pipeline.set_progress_bar_config(disable=True)
    references = {scene: scene.render(NATIVE_SIZE).astype(np.float32) for scene in all_scenes()}
    distances, right = [], dict.fromkeys((field.name for field in dataclasses.fields(Scene)), 0)
    for scene in held_out:
        frames = pipeline(
            scene.caption,
            num_inference_steps=INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).frames[0]
        away = {other: float(np.abs(frames * 255 - picture).mean()) for other, picture in references.items()}
        distances.append(away[scene])
        nearest = min(away, key=away.__getitem__)
        for name in right:
            right[name] += getattr(nearest, name) == getattr(scene, name)
    return {
        "distance of held-out scenes, of 255": round(float(np.mean(distances)), 2),
        f"right in the nearest scene, of {len(held_out)}": right,
    }


if __name__ == "__main__":
    main()

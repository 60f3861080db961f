"""Trains the video autoencoder of the demo's tiny CogVideoX on clips that it renders, in every style and any colour.

    python tools/tiny_model/train_vae.py --output models/tiny-vae

First on single pictures, of which a step sees many colours, then on crops of clips, where a step is cheap, then on
whole ones, whose statistics its normalisations will see. It goes on where it was stopped. The loss is L1 and L2 of
pixels and, lightly weighted as in latent diffusion (Rombach et al., 2022, https://arxiv.org/abs/2112.10752), the
divergence of the latents from a normal distribution (Kingma and Welling, 2014, https://arxiv.org/abs/1312.6114).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import l1_loss, mse_loss

from cogvideox_factory.demo.learned_model import build_vae
from cogvideox_factory.demo.world import NATIVE_SIZE, SHAPES, STYLES, Pose, Size, all_scenes, distance_to

# Frames, height and width, and clips a step. 9 frames are what the encoder takes at a time.
PHASES = {"pictures": ((1, 32, 48), 24), "crops": ((9, 32, 48), 4), "clips": ((9, 64, 96), 2)}
KL_WEIGHT = 1e-4
LATENT_NOISE = 0.05  # standard deviations, so that what a transformer gets slightly wrong is decoded all the same
SAVE_EVERY = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument(
        "--steps", type=int, nargs=3, default=(1500, 3000, 3000), metavar=tuple(PHASES), help="of each phase"
    )
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="highest: it rises, and falls as a cosine")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(arguments.seed)
    vae = build_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    total = sum(arguments.steps)
    state_file = arguments.output / "state.pt"
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    began, losses = time.monotonic(), []
    while step < total:
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * share_of_rate(step / total)
        phase = np.searchsorted(np.cumsum(arguments.steps), step, side="right")
        size, batch = list(PHASES.values())[phase]
        clips = to_tensor(random_clips(np.random.default_rng((arguments.seed, step)), batch, size))
        torch.manual_seed(arguments.seed * total + step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(clips).latent_dist
            latents = posterior.sample()
            latents = latents + LATENT_NOISE * latents.detach().std() * torch.randn_like(latents)
            decoded = vae.decode(latents).sample
        decoded = decoded.float()
        absolute = l1_loss(decoded, clips)
        loss = absolute + mse_loss(decoded, clips) + KL_WEIGHT * posterior.kl().mean() / latents[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        losses.append(absolute.item())
        if step % SAVE_EVERY == 0 or step == total:
            rate = (time.monotonic() - began) / len(losses)
            print(f"{step:6} of {total}: error {np.mean(losses[-SAVE_EVERY:]):.4f}, {rate:.2f} s a step", flush=True)
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            unfinished = state_file.with_suffix(".part")
            torch.save({**state, "step": step}, unfinished)
            unfinished.replace(state_file)

    figures = finish(vae.eval(), arguments.seed)
    vae.half().save_pretrained(arguments.output)
    (arguments.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


def share_of_rate(progress: float) -> float:
    return min(progress / 0.03, 0.5 + 0.5 * math.cos(math.pi * progress))


@torch.no_grad()
def finish(vae, seed: int) -> dict[str, float]:
    """Set the scaling factor, with which latents of the demo's world have a deviation of one, and measure the errors.

    Errors are mean absolute differences of pixels from 0 to 255, of whole clips in fp32. Training drew its excerpts
    from the same scenes: they say how sharp it is, not how it generalises.
    """
    chosen = np.random.default_rng((seed, 1, 1)).choice(len(all_scenes()), 24, replace=False)
    scenes = [all_scenes()[index] for index in chosen]
    figures, world = {}, []
    for style in STYLES:
        errors = []
        for scene in scenes:
            clip = to_tensor(scene.render(NATIVE_SIZE, style)[None])
            latents = vae.encode(clip).latent_dist.mode()
            decoded = vae.decode(latents).sample.clamp(-1, 1)
            errors.append(l1_loss(decoded, clip).item() * 127.5)
            if style == "flat":
                world.append(latents)
        figures[f"{style}: error of pixels, of 255"] = round(float(np.mean(errors)), 2)
    deviation = torch.cat(world).std().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 4))
    return {**figures, "scaling factor": vae.config.scaling_factor}


def to_tensor(clips: np.ndarray) -> torch.Tensor:
    """uint8 of shape (clips, frames, height, width, 3) → fp32 in ±1 of shape (clips, 3, frames, height, width)."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def random_clips(random: np.random.Generator, count: int, size: Size) -> np.ndarray:
    """Half scenes of the demo's world in its styles, half two shapes that move anyhow, in any colour and style."""
    return np.stack([_crop(random, _clip(random, size[0]), *size[1:]) for _ in range(count)])


def _crop(random: np.random.Generator, clip: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = random.integers(clip.shape[1] - height + 1), random.integers(clip.shape[2] - width + 1)
    return clip[:, top : top + height, left : left + width]


def _clip(random: np.random.Generator, frames: int) -> np.ndarray:
    if random.random() < 0.5:
        return _anything(random, frames)
    scene, style = random.choice(np.array(all_scenes())), random.choice(list(STYLES))
    start = random.integers(NATIVE_SIZE[0] - frames + 1)
    return scene.render(NATIVE_SIZE, style, range(start, start + frames))


def _anything(random: np.random.Generator, count: int) -> np.ndarray:
    """A background that is plain, graded or striped, and two shapes before it, filled, outlined or glowing."""
    _, height, width = NATIVE_SIZE
    y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    colours = random.uniform(0, 255, (8, 3))
    angle = random.uniform(0, 2 * math.pi)
    slope = math.cos(angle) * y + math.sin(angle) * x
    kind = random.integers(4)
    share = slope * 0 if kind < 2 else slope + 0.5 if kind == 2 else 0.5 + 0.5 * np.sin(slope * random.uniform(8, 30))
    background = colours[0] + np.clip(share, 0, 1)[..., None] * (colours[1] - colours[0])
    layers = []
    for layer in range(2):
        start, end = random.uniform(-0.5, 0.5, (2, 2))
        path = np.linspace(start, start + random.uniform(0, 1) * (end - start), count)
        turns = np.linspace(0, random.uniform(-2, 2), count) + random.uniform(0, 2 * math.pi)
        scales = np.linspace(*random.uniform(0.5, 1.7, 2), count)
        shape = list(SHAPES)[random.integers(len(SHAPES))]
        layers.append((shape, path, turns, scales, random.integers(4), random.uniform(1.5, 4, 2), layer))
    frames = []
    for index in range(count):
        picture = background
        for shape, path, turns, scales, fill, (thickness, glow), layer in layers:
            pose = Pose(*path[index], turns[index], scales[index])
            distance = distance_to(shape, pose, height, width)[..., None]
            edge = abs(distance)
            inside, line = np.clip(0.5 - distance, 0, 1), np.clip(thickness + 0.5 - edge, 0, 1)
            first, second = colours[2 + 2 * layer], colours[3 + 2 * layer]
            if fill in (0, 1):
                picture = picture + inside * (first - picture)
            if fill in (1, 2):
                picture = picture + line * (second - picture)
            if fill == 3:
                shine = np.exp(-np.maximum(edge - thickness, 0) / glow)
                picture = picture + shine * (first - picture)
                picture = picture + line * (second - picture)
        frames.append(np.clip(np.round(picture), 0, 255).astype(np.uint8))
    return np.stack(frames)


if __name__ == "__main__":
    main()

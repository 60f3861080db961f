"""One forward pass of the transformer for the whole family: rotary grid, image condition, frame
padding, prediction.

What the transformer is given here is what the stock diffusers pipelines give it (their
`_prepare_rotary_positional_embeddings` and `prepare_latents` are the reference): a LoRA runs there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from cogvideox_factory.model.family import Checkpoint

OFS = 2.0  # what the stock pipeline gives CogVideoX 1.5 image-to-video at every step


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype):
    """The transformer of a checkpoint, frozen."""
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(
        checkpoint.folder, subfolder="transformer", variant=checkpoint.variant, dtype=dtype
    )
    follow_config(transformer, checkpoint)
    round_positions(transformer, dtype)
    return transformer.requires_grad_(False)


def follow_config(transformer, checkpoint: Checkpoint) -> None:
    """Take the learned positions from a transformer whose checkpoint is to do without them.

    It then has rotary positions only, and accepts any size.
    """
    patch_embed = transformer.patch_embed
    if patch_embed.use_learned_positional_embeddings and not checkpoint.has_learned_positions:
        patch_embed.use_learned_positional_embeddings = False
        del patch_embed.pos_embedding
        transformer.register_to_config(use_learned_positional_embeddings=False)  # for whoever saves it


def round_positions(transformer, dtype: torch.dtype) -> None:
    """Keep positions that are added in the type that a transformer computes in; the forward pass converts them to it.

    diffusers keeps those of sines in float64 and converts them in every call: the same to the bit, in four times the
    memory. Learned ones have the type already.
    """
    patch_embed = transformer.patch_embed
    if hasattr(patch_embed, "pos_embedding"):
        patch_embed.pos_embedding = patch_embed.pos_embedding.to(dtype)


def load_scheduler(checkpoint: Checkpoint):
    """The noise schedule of a checkpoint, of the class that its model_index.json names."""
    import diffusers

    scheduler_class = getattr(diffusers, checkpoint.pipeline["scheduler"][1])
    return scheduler_class.from_pretrained(checkpoint.folder, subfolder="scheduler")


def pad_frames(latents_BFCHW: torch.Tensor, multiple: int) -> torch.Tensor:
    """Copies of the first latent frame put before it, until the number of frames is a multiple.

    CogVideoX 1.5 takes latent frames in pairs; inference drops the leading ones again.
    """
    missing = -latents_BFCHW.shape[1] % multiple
    if not missing:
        return latents_BFCHW
    return torch.cat([latents_BFCHW[:, :1].expand(-1, missing, -1, -1, -1), latents_BFCHW], dim=1)


@dataclass(frozen=True)
class Denoiser:
    """Calls a checkpoint's transformer with everything that it wants besides the noisy latents."""

    checkpoint: Checkpoint
    dtype: torch.dtype

    def predict(
        self,
        transformer: Callable[..., tuple[torch.Tensor]],
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        raw_image_latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The model's velocity in fp32, (B, F, C, H, W), for noisy latents of that shape.

        `timesteps` is (B,), `prompt_embeds` is (B, L, D), `raw_image_latents` is (B, C, H, W) for image-to-video
        models. `transformer` is the model, however an engine wraps it.
        """
        frames, height, width = noisy_latents.shape[1], *noisy_latents.shape[3:]
        hidden_states = noisy_latents.to(self.dtype)
        if raw_image_latents is not None:
            hidden_states = torch.cat([hidden_states, self.image_condition(raw_image_latents, frames)], dim=2)
        (velocity,) = transformer(
            hidden_states=hidden_states,
            encoder_hidden_states=prompt_embeds.to(self.dtype),
            timestep=timesteps,
            ofs=hidden_states.new_full((1,), OFS) if self.checkpoint.transformer.get("ofs_embed_dim") else None,
            image_rotary_emb=self.rotary_embedding(frames, height, width, noisy_latents.device),
            return_dict=False,
        )
        return velocity.float()

    def image_condition(self, raw_image_latents: torch.Tensor, frames: int) -> torch.Tensor:
        """(B, C, H, W) → (B, F, C, H, W): the scaled latents of the image in the first frame, zeros in all others.

        They stand in the very first of the frames also where CogVideoX 1.5 puts copies before a clip: the stock
        pipeline does so. Scaled in the model's type, because the stock pipeline rounds in that order.
        """
        image_latents = raw_image_latents.to(self.dtype) * self.checkpoint.image_scaling_factor
        condition = image_latents.new_zeros((image_latents.shape[0], frames, *image_latents.shape[1:]))
        condition[:, 0] = image_latents
        return condition

    def rotary_embedding(
        self, frames: int, height: int, width: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines, (tokens, head_dim) each, for a grid given in latents; None for sin-cos models."""
        config = self.checkpoint.transformer
        if not config.get("use_rotary_positional_embeddings"):
            return None
        patch, patch_t = config["patch_size"], config.get("patch_size_t")
        return _rotary_embedding(
            config["attention_head_dim"],
            (frames if patch_t is None else -(-frames // patch_t), height // patch, width // patch),
            (config["sample_height"] // patch, config["sample_width"] // patch),
            patch_t is not None,
            device,
        )


def forget_positions() -> None:
    """Drop the embeddings that are kept for the next call."""
    _rotary_embedding.cache_clear()


@functools.lru_cache(maxsize=32)
def _rotary_embedding(
    head_dim: int,
    grid: tuple[int, int, int],
    base_grid: tuple[int, int],
    is_slice: bool,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    frames, height, width = grid
    if is_slice:  # CogVideoX 1.5: the corner of one large grid
        return get_3d_rotary_pos_embed(
            head_dim,
            crops_coords=None,
            grid_size=(height, width),
            temporal_size=frames,
            grid_type="slice",
            max_size=base_grid,
            device=device,
        )
    # CogVideoX 1.0: positions of the base grid, stretched over the crop that has the clip's aspect ratio.
    crop = get_resize_crop_region_for_grid((height, width), base_grid[1], base_grid[0])
    return get_3d_rotary_pos_embed(
        head_dim, crops_coords=crop, grid_size=(height, width), temporal_size=frames, device=device
    )

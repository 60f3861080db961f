"""A tiny CogVideoX of random weights: the real classes and the real schedule, small enough for a CPU."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import torch

from cogvideox_factory.demo.world import all_scenes

MAX_TEXT_TOKENS = 226


def build_tiny_pipeline(
    seed: int = 0,
    *,
    vae: Any = None,
    vae_options: Mapping[str, Any] | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    **transformer_options: Any,
):
    """A stock pipeline of 17×64×96 videos; options of its parts can be overridden, and a VAE that exists can be given.

    With twice the latent channels as `in_channels` it is an image-to-video pipeline, otherwise text-to-video.
    """
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        )
        vae = vae or AutoencoderKLCogVideoX(
            **{
                "block_out_channels": (4, 4, 8, 8),  # most of the time that a CPU takes for videos goes into these
                "layers_per_block": 1,
                "latent_channels": 8,
                "norm_num_groups": 4,
                "sample_height": 96,  # tiling cuts half of this into sixths and fifths, which must be whole latents
                "sample_width": 160,
                "scaling_factor": 0.7,
                **(vae_options or {}),
            }
        )
        transformer = CogVideoXTransformer3DModel(
            **{
                "num_attention_heads": 4,
                "attention_head_dim": 32,
                "in_channels": 8,
                "out_channels": 8,
                "time_embed_dim": 64,
                "text_embed_dim": 32,
                "num_layers": 4,
                "sample_height": 8,
                "sample_width": 12,
                "sample_frames": 17,
                "max_text_seq_length": MAX_TEXT_TOKENS,
                "use_rotary_positional_embeddings": True,
                **transformer_options,
            }
        )
    takes_images = transformer.config.in_channels == 2 * vae.config.latent_channels
    pipeline_class = CogVideoXImageToVideoPipeline if takes_images else CogVideoXPipeline
    scheduler = build_scheduler(**(scheduler_options or {}))
    return pipeline_class(tokenizer, text_encoder.eval(), vae.eval(), transformer.eval(), scheduler)


def build_scheduler(**options: Any):
    """The published schedule of CogVideoX-5b, or one that differs from it by the options."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 1.0,
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
            **options,
        }
    )


def build_tokenizer():
    """A T5 tokenizer whose pieces are the words of the demo's world, and single characters for all others."""
    from transformers import T5Tokenizer

    words = sorted({f"▁{word}" for scene in all_scenes() for word in scene.caption.split()})
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -2.0) for piece in words if len(piece) > 1] + [(piece, -6.0) for piece in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TEXT_TOKENS)

"""Writes a CogVideoX pipeline of the published sizes with random weights: for trying the program and for measuring.

Memory and speed do not depend on what the weights are, and nothing is downloaded. The transformer and the VAE have
their real size; the text encoder has the real width, but one layer instead of 24 and a small vocabulary.

    python tools/make_random_model.py --member 2b --output models/random-2b
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from cogvideox_factory.demo.tiny_model import build_scheduler, build_tokenizer

# What differs from the defaults of diffusers' classes, which are those of CogVideoX-2b.
_5B: dict[str, Any] = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
_1_5: dict[str, Any] = {
    **_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": _5B,
    "5b-I2V": {**_5B, "in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5-5B": _1_5,
    "1.5-5B-I2V": {**_1_5, "in_channels": 32, "ofs_embed_dim": 512},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--member", choices=TRANSFORMERS, default="2b", help="which published model has these sizes")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    is_2b = arguments.member == "2b"
    dtype = torch.float16 if is_2b else torch.bfloat16
    transformer = _random(CogVideoXTransformer3DModel, TRANSFORMERS[arguments.member], dtype)
    vae_options = {
        "block_out_channels": (128, 256, 256, 512),
        "latent_channels": 16,
        "layers_per_block": 3,
        "scaling_factor": 1.15258426 if is_2b else 0.7,
        "invert_scale_latents": arguments.member.startswith("1.5"),
    }
    vae = _random(AutoencoderKLCogVideoX, vae_options, dtype)
    tokenizer = build_tokenizer()
    width = transformer.config.text_embed_dim
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=1024, num_layers=1, feed_forward_proj="gated-gelu")
    ).to(dtype)
    pipeline_class = CogVideoXImageToVideoPipeline if arguments.member.endswith("I2V") else CogVideoXPipeline
    scheduler = build_scheduler(snr_shift_scale=3.0 if is_2b else 1.0)
    pipeline_class(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(arguments.output)
    billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    print(f"{arguments.output}: a transformer of {billions:.2f} billion random weights in {dtype}")


def _random(model_class: Any, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model built in its own type, so that it never takes more memory than its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = model_class(**options)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval()


if __name__ == "__main__":
    main()

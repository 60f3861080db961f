"""Writes a CogVideoX pipeline of the published sizes with random weights: for trying the program and for measuring.

Memory and speed do not depend on what the weights are, and nothing is downloaded. The transformer and the VAE have
their real size; the text encoder has the real width, but one layer instead of 24 and a small vocabulary.

    python tools/make_random_model.py --member 2b --output models/random-2b
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from cogvideox_factory.demo.tiny_model import build_tokenizer
from cogvideox_factory.model.published import NAMES, read_configs

MEMBERS = {name.removeprefix("CogVideoX").removeprefix("-"): name for name in NAMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--member", choices=MEMBERS, default="2b", help="which published model has these sizes")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    configs = read_configs(MEMBERS[arguments.member])
    dtype = getattr(torch, configs["text_encoder"]["dtype"])
    transformer = _random(CogVideoXTransformer3DModel, configs["transformer"], dtype)
    vae = _random(AutoencoderKLCogVideoX, configs["vae"], dtype)
    tokenizer = build_tokenizer()
    width = transformer.config.text_embed_dim
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=1024, num_layers=1, feed_forward_proj="gated-gelu")
    ).to(dtype)
    pipeline_class = CogVideoXImageToVideoPipeline if arguments.member.endswith("I2V") else CogVideoXPipeline
    scheduler_class = getattr(diffusers, configs["scheduler"]["_class_name"])
    scheduler = scheduler_class.from_config(configs["scheduler"])
    pipeline_class(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(arguments.output)
    billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    print(f"{arguments.output}: a transformer of {billions:.2f} billion random weights in {dtype}")


def _random(model_class: Any, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model built in its own type, so that it never takes more memory than its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = model_class.from_config(options)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval()


if __name__ == "__main__":
    main()

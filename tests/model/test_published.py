"""The kept configs are complete, and build the models that they describe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogvideox_factory.config import ModelOptions
from cogvideox_factory.model.denoiser import load_scheduler
from cogvideox_factory.model.family import open_checkpoint
from cogvideox_factory.model.published import NAMES, is_published, write_configs

BILLIONS = {  # of the transformers' parameters: 3.15 and 10.38 GiB in half precision
    "CogVideoX-2b": 1.69,
    "CogVideoX-5b": 5.57,
    "CogVideoX-5b-I2V": 5.57,
    "CogVideoX1.5-5B": 5.57,
    "CogVideoX1.5-5B-I2V": 5.57,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_is_what_it_is_known_to_be(name: str, tmp_path: Path) -> None:
    write_configs(name, tmp_path)
    checkpoint = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(tmp_path)))
    assert checkpoint.is_image_to_video == name.endswith("I2V")
    is_1_5 = "1.5" in name
    assert checkpoint.native_size == ((81, 768, 1360) if is_1_5 else (49, 480, 720))
    assert checkpoint.native_fps == (16 if is_1_5 else 8)
    assert checkpoint.weights_dtype == (torch.float16 if name == "CogVideoX-2b" else torch.bfloat16)
    assert checkpoint.scaling_factor == (1.15258426 if name == "CogVideoX-2b" else 0.7)
    assert load_scheduler(checkpoint).config.snr_shift_scale == (3 if name == "CogVideoX-2b" else 1)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer))
    assert sum(value.numel() for value in transformer.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.02)


def test_the_names_of_both_owners() -> None:
    assert is_published("THUDM/CogVideoX-5b") and is_published("zai-org/CogVideoX1.5-5B-I2V")
    assert not is_published("CogVideoX-5b") and not is_published("someone/CogVideoX-5b")

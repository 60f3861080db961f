"""The text encoder whose layers pass through the working memory, against the stock one."""

from __future__ import annotations

import pytest
import torch
from transformers import T5EncoderModel

from cogvideox_factory.config import TextEncoderOptions
from cogvideox_factory.memory.block_swap import swap_of
from cogvideox_factory.memory.text_encoder import place_text_encoder
from cogvideox_factory.model.family import Checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_those_of_the_whole_one(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    whole, swapped = (
        T5EncoderModel.from_pretrained(checkpoint.folder, subfolder="text_encoder", dtype=dtype).requires_grad_(False)
        for _ in range(2)
    )
    place_text_encoder(whole, TextEncoderOptions(), CPU)
    place_text_encoder(swapped, TextEncoderOptions(offload_text_encoder=True), CPU)
    assert swap_of(whole) is None
    swap = swap_of(swapped)
    assert swap is not None
    layers = swapped.encoder.block
    weights = [list(layer.parameters()) for layer in layers]
    assert swap.parameters() == {weight for layer in weights for weight in layer}
    with torch.no_grad():
        for tokens in (torch.tensor([[3, 7, 1, 0]]), torch.tensor([[5, 1]]), torch.tensor([[3, 7, 1, 0]])):
            assert torch.equal(swapped(tokens)[0], whole(tokens)[0])
    assert len(swap.resident()) == min(2, len(layers))

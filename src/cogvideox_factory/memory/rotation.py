"""Rotary positions applied to a few heads at a time while videos are made.

Stock diffusers rotates all queries, and then all keys, in fp32 with several copies of them: the highest moment of a
denoising step. Elementwise arithmetic in parts gives the same bits.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb

NUM_PARTS = 8


class RotationInParts(CogVideoXAttnProcessor2_0):
    """The stock attention of CogVideoX; without gradients its rotation works in parts."""

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Queries and keys are rotated as they come out of their norms, after which stock diffusers would do it."""
        if torch.is_grad_enabled() or image_rotary_emb is None or attn.norm_q is None or attn.norm_k is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        num_text = encoder_hidden_states.shape[1]

        def rotate(norm: torch.nn.Module, inputs: object, heads_BHLD: torch.Tensor) -> None:
            for part in heads_BHLD[:, :, num_text:].chunk(NUM_PARTS, dim=1):
                part.copy_(apply_rotary_emb(part, image_rotary_emb))

        hooks = [norm.register_forward_hook(rotate) for norm in (attn.norm_q, attn.norm_k)]
        try:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        finally:
            for hook in hooks:
                hook.remove()


def rotate_in_parts(transformer) -> None:
    """Let the attention of each block rotate in parts."""
    transformer.set_attn_processor(RotationInParts())

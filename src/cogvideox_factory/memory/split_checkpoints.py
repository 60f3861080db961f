"""Attention and feed-forward of a block under checkpoints of their own, whose inputs wait in the host's memory.

While the feed-forward goes backward, nothing of the attention is there, and nothing is recomputed twice: the states
between the two are kept as well. Without a place for them outside of the device that would take more than it saves.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

from cogvideox_factory.memory.activations import OffloadedCheckpoints


class SplitBlock(CogVideoXBlock):
    """A block that can be called a half at a time. Each takes and gives the states of video (B, L, D) and text."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        half: Literal["attention", "feed-forward"] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the whole block, to the last bit, where no half is named."""
        if half is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
        norm = self.norm1 if half == "attention" else self.norm2
        video, text, video_gate, text_gate = norm(hidden_states, encoder_hidden_states, temb)
        if half == "attention":
            video, text = self.attn1(
                hidden_states=video,
                encoder_hidden_states=text,
                image_rotary_emb=image_rotary_emb,
                **(attention_kwargs or {}),
            )
        else:
            tokens = text.shape[1]
            both = self.ff(torch.cat([text, video], dim=1))
            text, video = both[:, :tokens], both[:, tokens:]
        return hidden_states + video_gate * video, encoder_hidden_states + text_gate * text


class SplitCheckpoints(OffloadedCheckpoints):
    """To be given to `enable_gradient_checkpointing`: calls each half of a block under a checkpoint."""

    def __call__(self, block: torch.nn.Module, *arguments: object, **options: Any) -> object:
        states, rest = arguments[:2], arguments[2:]
        for half in ("attention", "feed-forward"):
            states = super().__call__(block, *states, *rest, half=half, **options)  # type: ignore[assignment]
        return states


def split_blocks(transformer) -> None:
    """Let each block be callable by halves; its layers and their names stay."""
    for block in transformer.transformer_blocks:
        assert type(block) is CogVideoXBlock
        block.__class__ = SplitBlock

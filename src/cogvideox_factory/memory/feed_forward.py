"""The feed-forward of a block in chunks of the sequence, each recomputed in the backward pass.

Its hidden activations, four times as wide as the block's own, are the step's peak; token by token it is independent,
so that only one chunk's need to live at a time.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from torch.utils.checkpoint import checkpoint


class ChunkedFeedForward(FeedForward):
    """A feed-forward that goes through its sequence in `num_chunks` parts."""

    num_chunks: int

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """(B, L, D) → (B, L, D)."""
        forward = super().forward

        def run(chunk: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():  # also in the recompute of a block, within its own checkpoint
                return checkpoint(forward, chunk, use_reentrant=False)
            return forward(chunk)

        return torch.cat([run(chunk) for chunk in hidden_states.chunk(self.num_chunks, dim=1)], dim=1)


def chunk_feed_forward(transformer, num_chunks: int) -> None:
    """Let each block's feed-forward work in chunks; its layers and their names stay."""
    for block in transformer.transformer_blocks:
        assert type(block.ff) is FeedForward
        block.ff.__class__ = ChunkedFeedForward
        block.ff.num_chunks = num_chunks

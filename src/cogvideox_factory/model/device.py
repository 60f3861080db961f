"""The device that works, and giving its memory back."""

from __future__ import annotations

import gc

import torch


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory() -> None:
    """Give the memory of dropped models back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # page-locked memory; torch 2.6 has no call for it
            torch.accelerator.empty_host_cache()

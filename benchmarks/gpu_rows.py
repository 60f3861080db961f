"""The rows of the table of GPU memory: which trainings, and what is known of each beforehand.

Three kinds: the recipes whose memory docs/memory.md tells, the trainings of the table that the original CogVideoX
Factory published (memory_reference.csv: GB on A100s, 49×480×720), and some of these stepped in the original's way.
"""

from __future__ import annotations

import contextlib
import csv
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import Plan
from cogvideox_factory.model import published
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.planning import open_configs, resolve
from cogvideox_factory.planning.traces import NAMES

REFERENCE = Path(__file__).with_name("memory_reference.csv")


@dataclass(frozen=True)
class Row:
    """A training with these options of `train`, and the phases of it that are measured."""

    name: str
    model: str
    flags: tuple[str, ...]
    phases: tuple[str, ...] = ("training",)
    promised: Mapping[str, float] = field(default_factory=dict)  # GiB at the most, of a phase or of the "host"
    published: Mapping[str, str] = field(default_factory=dict)  # the original's own row of its table
    is_original: bool = False  # steps as the original does

    def all_flags(self, tiny: Path | None) -> list[str]:
        """`tiny`: the folder of a shrunken model, whose clips are small too."""
        model = f"THUDM/{self.model}" if tiny is None else str(tiny)
        size = () if tiny is None else ("--frame_buckets", "9", "--height_buckets", "32", "--width_buckets", "48")
        return ["--pretrained_model_name_or_path", model, "--mixed_precision", "bf16", *self.flags, *size]


CHECKPOINTED = ("--gradient_checkpointing", "--feed_forward_chunks", "8")
OFFLOADED = (*CHECKPOINTED, "--offload_activations")
SMALLEST = (*OFFLOADED, "--resident_blocks", "2", "--offload_text_encoder", "--use_tiling", "--enable_tiling")
SFT = (*OFFLOADED, "--training_type", "sft", "--optimizer_in_backward", "--max_grad_norm", "0")
STATES_ON_HOST = ("--use_8bit", "--use_cpu_offload_optimizer")
VIDEOS = ("--enable_tiling", "--enable_model_cpu_offload")

RECIPES = (
    Row("lora-5b", "CogVideoX-5b", CHECKPOINTED, promised={"training": 17.0}),
    Row(
        *("lora-5b-videos", "CogVideoX-5b", (*CHECKPOINTED, *VIDEOS), ("training", "validation", "testing")),
        promised={"training": 17.5, "validation": 17.5, "testing": 17.5},
    ),
    Row(
        *("lora-5b-batch-4", "CogVideoX-5b", (*OFFLOADED, "--train_batch_size", "4")),
        promised={"training": 21.0},
    ),
    Row(
        *("smallest", "CogVideoX-5b", SMALLEST, NAMES),
        promised={"training": 3.5, "preparing": 4.8, "validation": 4.8, "testing": 4.8},
    ),
    Row("lora-1.5", "CogVideoX1.5-5B", OFFLOADED, promised={"training": 16.0}),
    Row("smallest-1.5", "CogVideoX1.5-5B", SMALLEST, promised={"training": 6.0}),
    *(Row(f"lora-5b-{base}", "CogVideoX-5b", (*OFFLOADED, "--quantize_base", base)) for base in ("int8", "nf4")),
    Row("sft-5b", "CogVideoX-5b", (*SFT, *STATES_ON_HOST), promised={"training": 14.0, "host": 46.0}),
    Row(
        *("sft-5b-no-host", "CogVideoX-5b", (*SFT, "--trainable_dtype", "bf16", "--use_8bit", "--split_checkpoints")),
        promised={"training": 22.8},
    ),
    Row("sft-2b", "CogVideoX-2b", (*SFT, *STATES_ON_HOST), promised={"training": 7.5}),
    Row(
        *("sft-2b-no-host", "CogVideoX-2b", (*SFT, "--trainable_dtype", "bf16", "--use_4bit", "--use_torchao")),
        promised={"training": 7.5},
    ),
)

# The original's optimizers in our options; its DeepSpeed rows are of an engine that takes an accelerate configuration.
OPTIMIZERS = {
    "AdamW": ("adamw", ()),
    "AdamW (8-bit bitsandbytes)": ("8bit", ("--use_8bit",)),
    "AdamW + CPUOffloadOptimizer (with gradient offloading)": (
        "offload",
        ("--use_cpu_offload_optimizer", "--offload_gradients"),
    ),
}


def published_rows() -> tuple[list[Row], list[dict[str, str]]]:
    """The rows of the original's table as trainings of ours, and those that do not apply."""
    rows: list[Row] = []
    others: list[dict[str, str]] = []
    with REFERENCE.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["optimizer"] not in OPTIMIZERS:
                others.append(line)
                continue
            short, flags = OPTIMIZERS[line["optimizer"]]
            batch, rank, model = line["train_batch_size"], line["lora_rank"], line["model"]
            name = f"{line['method']}-{model.rpartition('-')[2]}"
            if line["method"] == "lora":
                name, flags = f"{name}-r{rank}", (*flags, "--rank", rank, "--lora_alpha", rank)
            else:  # the original's weights and their updates are plain bf16
                flags = (*flags, "--training_type", "sft", "--trainable_dtype", "bf16")
            name, flags = f"{name}-b{batch}-{short}", (*flags, "--train_batch_size", batch, "--enable_tiling")
            if line["gradient_checkpointing"] == "True":
                name, flags = f"{name}-checkpointed", (*flags, "--gradient_checkpointing")
            rows.append(Row(name, model, flags, published=line))
    return rows, others


def all_rows() -> dict[str, Row]:
    """By name; the original's way of stepping has the name of the same training of ours in its own."""
    rows, _ = published_rows()
    compared = [f"lora-{size}-adamw-checkpointed" for size in ("2b-r64-b1", "5b-r64-b1", "5b-r64-b4")]
    original = [replace(row, name=f"original-{row.name}", is_original=True) for row in rows if row.name in compared]
    return {row.name: row for row in (*RECIPES, *original, *rows)}


@contextlib.contextmanager
def opened(row: Row, is_tiny: bool) -> Iterator[tuple[Plan, Checkpoint]]:
    """The row's options as `train` would fill them in, and its checkpoint, which has configs alone."""
    with tempfile.TemporaryDirectory() as folder:
        if is_tiny:
            write_tiny(row.model, Path(folder))
        flags = row.all_flags(Path(folder) if is_tiny else None)
        options = parse_command(Plan, "plan", flags)
        with open_configs(options) as checkpoint:
            yield resolve(options, checkpoint), checkpoint


def write_tiny(model: str, folder: Path) -> None:
    """The configs of a published model, of which everything is as it is but the sizes."""
    published.write_configs(model, folder)
    sizes: dict[str, dict[str, Any]] = {
        "transformer": {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 3, "time_embed_dim": 32},
        "vae": {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1},
        "text_encoder": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 64},
    }
    sizes["transformer"] |= {"text_embed_dim": 32, "sample_height": 8, "sample_width": 12, "sample_frames": 9}
    sizes["vae"] |= {"sample_height": 96, "sample_width": 160}  # its tiles are whole latents
    for component, changed in sizes.items():
        path = folder / published.FILES[component]
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

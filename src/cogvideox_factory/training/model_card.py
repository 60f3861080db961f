"""README.md of a run: what was trained, on what, and the lines of Python that use it.

It is made to be published: it names no path of this machine, and whatever a user wrote (prompts, names) is escaped
for where it stands: YAML, Markdown or Python. Rejected: templates of a library, in which values are pasted as they
are.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from cogvideox_factory.config import MethodOptions, ObjectiveOptions, OptimizerOptions, Train
from cogvideox_factory.data.files import write_durably
from cogvideox_factory.data.store import Entry
from cogvideox_factory.model.adapters import describe_method
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.run_folder import validation_folder
from cogvideox_factory.sampling import Video
from cogvideox_factory.training.hub import CARD_FILE
from cogvideox_factory.training.metrics import read_metrics
from cogvideox_factory.training.optimizers import resolve_optimizer_options

logger = logging.getLogger(__name__)
MARKER = "<!-- Written by cogvideox-factory. Remove this line, and a later run will leave the file alone. -->"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# Everything that may mean something to Markdown or HTML; a dot within a word makes a link of www.example.org.
SPECIAL = re.compile(r"[^\w\s.,;?!-]|_|\.(?=\S)", re.UNICODE)


@dataclass(frozen=True)
class Trained:
    """What came out of a run."""

    task: Literal["text-to-video", "image-to-video"]
    training_type: Literal["lora", "sft"]
    pipeline_class: str  # of diffusers

    @classmethod
    def of(cls, checkpoint: Checkpoint, training_type: Literal["lora", "sft"]) -> Trained:
        task: Literal["text-to-video", "image-to-video"] = (
            "image-to-video" if checkpoint.is_image_to_video else "text-to-video"
        )
        return cls(task, training_type, checkpoint.pipeline_class.__name__)


def write_model_card(
    run: Path,
    options: Train,
    checkpoint: Checkpoint,
    entries: Sequence[Entry],
    step: int,
    videos: Sequence[Video],
    trained: Trained,
    repository: str | None = None,
) -> bool:
    """Write the card of a run that ended with `step`; whether that was done: a README.md that is not ours stays.

    `repository` is the name on the Hub by which others will load the result, where there is one.
    """
    path = run / CARD_FILE
    if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
        logger.info("%s is not of this program's making and stays as it is", path)
        return False
    folder = validation_folder(run, step).relative_to(run)
    samples = [(video, f"{folder.as_posix()}/{video.file}") for video in videos if (run / folder / video.file).exists()]
    name = run.absolute().name
    base = checkpoint.name if not checkpoint.is_local and HUB_NAME.fullmatch(checkpoint.name) else None
    base_shown = (
        f"[{markdown(base)}](https://huggingface.co/{base})" if base else f"a local model, {_local(checkpoint)}"
    )
    kind = "A LoRA for" if trained.training_type == "lora" else "A fine-tuned version of"
    parts = [
        _front_matter(base, trained, options.data.id_token, samples),
        MARKER,
        f"# {markdown(name)}",
        f"{kind} {base_shown} ({trained.task}), trained for {step} steps with CogVideoX Factory.",
        _trigger(options.data.id_token),
        "## Use it",
        f"```python\n{snippet(options, checkpoint, base, trained, repository)}```",
        _samples(samples),
        "## Training",
        _table(_settings(options) | _losses(run)),
        "## Data",
        _table(_data(options, entries)),
        "## Licence",
        "The licence of the base model also holds for what is made from it. State the licence of this model here, and "
        "as `license` at the top of this file, before you publish it.",
    ]
    write_durably(path, ("\n\n".join(filter(None, parts)) + "\n").encode("utf-8", "replace"))
    return True


def markdown(text: str) -> str:
    """A text that reads as it is in Markdown, also within a table: no markup, no HTML, no line break."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return SPECIAL.sub(lambda match: f"&#{ord(match[0])};", line)


def snippet(
    options: Train, checkpoint: Checkpoint, base: str | None, trained: Trained, repository: str | None = None
) -> str:
    """Python that makes a video with what was trained. A user's texts stand in it as literals."""
    takes_image = trained.task == "image-to-video"
    dtype = {torch.float16: "torch.float16", torch.float32: "torch.float32"}.get(
        checkpoint.weights_dtype, "torch.bfloat16"
    )
    result = repr(repository) if repository else '"."'
    comment = "" if repository else "  # the folder of this file"
    source = base or f"path/to/{checkpoint.folder.name}"
    divides = options.conditioning.image_latents_scale == "divide"
    tokens = options.encoding.max_sequence_length or checkpoint.max_text_tokens
    stock_tokens = inspect.signature(checkpoint.pipeline_class.__call__).parameters["max_sequence_length"].default
    sampling, fps = options.sampling, options.data.fps or checkpoint.native_fps
    if trained.training_type == "lora":
        load = [
            f"pipe = {trained.pipeline_class}.from_pretrained({source!r}, torch_dtype={dtype})",
            f'pipe.load_lora_weights({result}, adapter_name="trained"){comment}',
            'pipe.set_adapters("trained", 1.0)  # 1.0 is what training saw',
        ]
        if options.conditioning.ignore_learned_positional_embeddings:  # a LoRA file cannot carry it
            load.append("pipe.transformer.patch_embed.use_learned_positional_embeddings = False  # as in training")
        if options.conditioning.image_latents_scale != "checkpoint":
            load.append(f"pipe.vae.register_to_config(invert_scale_latents={divides})  # as in training")
    else:
        load = [f"pipe = {trained.pipeline_class}.from_pretrained({result}, torch_dtype={dtype}){comment}"]
    lines = [
        "import torch",
        f"from diffusers import {trained.pipeline_class}",
        f"from diffusers.utils import export_to_video{', load_image' if takes_image else ''}",
        "",
        *load,
        "pipe.enable_model_cpu_offload()",
        "pipe.vae.enable_tiling()",
        "",
        "video = pipe(",
        *(['    image=load_image("first_frame.png"),'] if takes_image else []),
        f"    prompt={_example_prompt(options)!r},",
        f"    num_frames={sampling.num_frames},",
        f"    height={sampling.height},",
        f"    width={sampling.width},",
        f"    num_inference_steps={sampling.num_inference_steps},",
        f"    guidance_scale={sampling.guidance_scale:g},",
        *(["    use_dynamic_cfg=True,"] if sampling.use_dynamic_cfg else []),
        *([f"    max_sequence_length={tokens},  # as in training"] if tokens != stock_tokens else []),
        f"    generator=torch.Generator().manual_seed({options.seed}),",
        ").frames[0]",
        f'export_to_video(video, "video.mp4", fps={fps:g})',
    ]
    return "\n".join(lines) + "\n"


def _example_prompt(options: Train) -> str:
    """The first prompt of the validation, else what one might write."""
    text = options.validation.validation_prompt or ""
    prompts = [part.strip() for part in text.split(options.validation.validation_prompt_separator)]
    prompt = next(filter(None, prompts), "what the video shows")
    token = options.data.id_token
    return f"{token} {prompt}" if token and token not in prompt else prompt


def _front_matter(
    base: str | None, trained: Trained, id_token: str | None, samples: Sequence[tuple[Video, str]]
) -> str:
    """What the Hub reads. No licence: only the user can state it. A base model must be a name on the Hub."""
    is_lora = trained.training_type == "lora"
    tags = [trained.task, "cogvideox", "diffusers-training", *(["lora", "template:sd-lora"] if is_lora else [])]
    content: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter" if is_lora else "finetune"} if base else {}),
        "library_name": "diffusers",
        "pipeline_tag": trained.task,
        "tags": tags,
    }
    if id_token:
        content["instance_prompt"] = _one_line(id_token)
    if samples:
        content["widget"] = [{"text": _one_line(video.prompt), "output": {"url": url}} for video, url in samples]
    # No folding: a line of a folded text could be ---, which ends the front matter.
    return "---\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=2**31) + "---"


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _trigger(id_token: str | None) -> str:
    return f"Every caption began with **{markdown(id_token)}**; prompts should too." if id_token else ""


def _samples(samples: Sequence[tuple[Video, str]]) -> str:
    if not samples:
        return ""
    rows = [f"| {markdown(video.prompt)} | {video.seed} | [video]({url}) |" for video, url in samples]
    return "\n".join(["## Samples", "", "| prompt | seed | |", "|---|---|---|", *rows])


def _settings(options: Train) -> dict[str, Any]:
    """How it was trained: the settings that every run has, and of the others those that are not the defaults."""
    training, optimizer, is_lora = options.training, options.optimizer, options.method.training_type == "lora"
    return {
        "Method": describe_method(options.method, options.lora),
        **({"Layers with a LoRA": ", ".join(options.lora.target_modules)} if is_lora else {}),
        "Optimizer": optimizer.optimizer,
        "Learning rate": f"{optimizer.learning_rate:g}, {optimizer.lr_scheduler}",
        "Warm-up steps": optimizer.lr_warmup_steps,
        "Batch size": training.train_batch_size,
        "Gradient accumulation steps": training.gradient_accumulation_steps,
        "Precision of the base model": training.mixed_precision or "the checkpoint's own",
        **({"Base model quantized to": options.memory.quantize_base} if options.memory.quantize_base else {}),
        "Caption dropout": training.caption_dropout,
        "Seed": options.seed,
        **_not_default(options),
    }


def _not_default(options: Train) -> dict[str, Any]:
    """Options of method, objective and optimizer that differ from their defaults and have no row of their own."""
    optimizer = options.optimizer
    own_row = ("training_type", "trainable_modules", "optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps")
    resolved = resolve_optimizer_options(OptimizerOptions(optimizer=optimizer.optimizer))
    rows = {}
    for group, defaults in (
        (options.method, MethodOptions()),
        (options.objective, ObjectiveOptions()),
        (resolve_optimizer_options(optimizer), resolved),
    ):
        for item in dataclasses.fields(group):
            value = getattr(group, item.name)
            if item.name not in own_row and value != getattr(defaults, item.name):
                rows[f"--{item.name}"] = "yes" if value is True else value
    return rows


def _losses(run: Path) -> dict[str, Any]:
    """The mean loss of the first and of the last tenth of the training; single steps say little."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if isinstance(line.get("loss"), float)]
    if not lines:
        return {}
    tenth = max(1, len(lines) // 10)

    def mean(part: list[dict[str, Any]]) -> str:
        return f"{sum(line['loss'] for line in part) / len(part):.4f}"

    return {
        f"Loss, mean of the first {tenth} steps": mean(lines[:tenth]),
        f"Loss, mean of the last {tenth} steps": mean(lines[-tenth:]),
        "Clips seen": lines[-1].get("samples_seen", ""),
    }


def _data(options: Train, entries: Sequence[Entry]) -> dict[str, Any]:
    buckets = [entry.bucket for entry in entries]
    return {
        "Clips": len({entry.source for entry in entries}),
        "Excerpts of them": len(entries),
        **{f"Excerpts of {bucket} (frames × height × width)": buckets.count(bucket) for bucket in sorted(set(buckets))},
        "Frames a second": f"{options.data.fps:g}" if options.data.fps else "",
        "Word before every caption": options.data.id_token or "none",
    }


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f"| {markdown(name)} | {markdown(str(value))} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])


def _local(checkpoint: Checkpoint) -> str:
    return f"{markdown(checkpoint.folder.absolute().name)} (a folder of the one who trained it)"

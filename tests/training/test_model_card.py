"""The model card: its code runs, and nothing that a user wrote can change what it says."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from cogvideox_factory.config import (
    ConditioningOptions,
    DataOptions,
    EncodingOptions,
    LoraOptions,
    MethodOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    SamplingOptions,
    Train,
    ValidationOptions,
)
from cogvideox_factory.data.store import Entry
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.model.adapters import attach_lora, save_lora
from cogvideox_factory.model.denoiser import load_transformer
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning
from cogvideox_factory.run_folder import validation_folder
from cogvideox_factory.sampling import Video
from cogvideox_factory.training.model_card import MARKER, Trained, markdown, write_model_card

LORA = Trained("text-to-video", "lora", "CogVideoXPipeline")
NASTY = (
    "<script>alert(1)</script> | `code` ```` ![x](http://a.example/b.png) **b** _i_ &amp; www.a.example \"'\\ # $x$ :o:"
)
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, checkpoint: Checkpoint, entries: list[Entry]) -> Write:
    """Write the card of a run of 20 steps and give its text."""

    def call(
        prompts: Sequence[str] = ("a red square",),
        *,
        id_token: str | None = None,
        trained: Trained = LORA,
        base: Checkpoint = checkpoint,
        repository: str | None = None,
        run: Path = tmp_path / "run",
        height: int = 64,
        conditioning: ConditioningOptions | None = None,
        **groups: Any,
    ) -> str:
        folder = validation_folder(run, 20)
        folder.mkdir(parents=True, exist_ok=True)
        videos = [Video(f"prompt-{index:02}-video-0.mp4", prompt, 42) for index, prompt in enumerate(prompts)]
        for video in videos:
            (folder / video.file).touch()
        lines = [{"step": step, "loss": 1.0 / step, "samples_seen": 2 * step} for step in range(1, 21)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = Train(
            data=DataOptions(data_root=tmp_path / "data", fps=8.0, id_token=id_token),
            model=ModelOptions(pretrained_model_name_or_path=str(base.folder)),
            lora=LoraOptions(rank=4, lora_alpha=12),
            conditioning=conditioning or ConditioningOptions(),
            optimizer=OptimizerOptions(learning_rate=3e-4),
            sampling=SamplingOptions(num_frames=9, height=height, width=96, num_inference_steps=2),
            validation=ValidationOptions(validation_prompt=":::".join(prompts) or None),
            output_dir=run,
        )
        options = dataclasses.replace(options, **groups)
        assert write_model_card(run, options, base, entries, 20, videos, trained, repository)
        return (run / "README.md").read_text(encoding="utf-8")

    return call


def front_matter(card: str) -> dict[str, Any]:
    _, block, _ = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(block)


class Page(HTMLParser):
    """Tags and text of the card, as a renderer of Markdown with raw HTML shows it."""

    def __init__(self, card: str):
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.is_in_cell = False
        body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)[2]
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")
            self.is_in_cell = True

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.is_in_cell:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell = self.is_in_cell and tag != "td"


def told_by(card: str) -> dict[str, str]:
    """The rows of the tables of settings and data, after the row of the one sample."""
    cells = Page(card).cells
    return dict(zip(cells[3::2], cells[4::2], strict=False))


def code_of(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return code


# --- the code runs ---


@pytest.mark.parametrize(
    ("task", "training_type"), [("text-to-video", "lora"), ("text-to-video", "sft"), ("image-to-video", "lora")]
)
def test_the_code_runs(
    write: Write, tmp_path: Path, tiny_model: Path, monkeypatch, task: Any, training_type: Any
) -> None:
    from diffusers import CogVideoXImageToVideoPipeline

    run, model = tmp_path / "run", tiny_model
    pipeline_class = "CogVideoXPipeline"
    if task == "image-to-video":
        pipeline_class = "CogVideoXImageToVideoPipeline"
        model = tmp_path / "image-model"
        CogVideoXImageToVideoPipeline(**build_tiny_pipeline(in_channels=16).components).save_pretrained(model)
    base = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(model)))
    if training_type == "lora":
        transformer = load_transformer(base, torch.float32)
        attach_lora(transformer, LoraOptions(rank=4, lora_alpha=12), seed=0)
        save_lora(transformer, run)
    else:
        build_tiny_pipeline(seed=3).save_pretrained(run)
    code = code_of(write(['it\'s a "red" square\\'], base=base, trained=Trained.of(base, training_type)))
    if training_type == "lora":
        assert f"path/to/{model.name}" in code
        code = code.replace(f"path/to/{model.name}", str(model))
    assert "pipe.enable_model_cpu_offload()\n" in code
    code = code.replace("pipe.enable_model_cpu_offload()\n", "")  # needs a GPU
    monkeypatch.chdir(run)  # which the code calls "."
    Image.new("RGB", (96, 64), "red").save("first_frame.png")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["pipe"]).__name__ == pipeline_class
    assert bool(names["pipe"].get_active_adapters()) == (training_type == "lora")
    with av.open("video.mp4") as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (96, 64, 8)
        assert sum(1 for _ in video.decode(video=0)) == 9


def test_the_code_takes_the_image_as_training_did(write: Write, tmp_path: Path, monkeypatch) -> None:
    """Learned positions are for the native size only: without its line, the code would raise at this height."""
    from diffusers import CogVideoXImageToVideoPipeline

    model = tmp_path / "image-model"
    components = build_tiny_pipeline(in_channels=16, use_learned_positional_embeddings=True).components
    CogVideoXImageToVideoPipeline(**components).save_pretrained(model)
    conditioning = ConditioningOptions(ignore_learned_positional_embeddings=True, image_latents_scale="divide")
    plain = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(model)))
    base = with_conditioning(plain, conditioning)
    transformer = load_transformer(base, torch.float32)
    attach_lora(transformer, LoraOptions(rank=4, lora_alpha=12), seed=0)
    save_lora(transformer, tmp_path / "run")
    code = code_of(write(base=base, trained=Trained.of(base, "lora"), height=48, conditioning=conditioning))
    code = code.replace(f"path/to/{model.name}", str(model)).replace("pipe.enable_model_cpu_offload()\n", "")
    monkeypatch.chdir(tmp_path / "run")
    Image.new("RGB", (96, 48), "red").save("first_frame.png")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["video"]) == 9
    assert names["pipe"].vae.config.invert_scale_latents is True is not plain.vae.get("invert_scale_latents")
    without = "".join(line for line in code.splitlines(keepends=True) if "learned_positional" not in line)
    with pytest.raises(ValueError, match="different resolution"):
        exec(compile(without, "README.md", "exec"), {})


def test_the_code_names_the_repository_and_a_base_on_the_hub(write: Write, checkpoint: Checkpoint) -> None:
    base = dataclasses.replace(checkpoint, name="THUDM/CogVideoX-5b")
    card = write(base=base, repository="mice/steamboat")
    assert "pipe = CogVideoXPipeline.from_pretrained('THUDM/CogVideoX-5b', torch_dtype=torch.float32)" in card
    assert "pipe.load_lora_weights('mice/steamboat', adapter_name=" in card
    assert "(https://huggingface.co/THUDM/CogVideoX-5b)" in card
    sft = Trained("text-to-video", "sft", "CogVideoXPipeline")
    card = write(base=base, repository="mice/steamboat", trained=sft)
    assert "from_pretrained('mice/steamboat', torch_dtype=torch.float32)" in card and "load_lora" not in card


# --- what it says ---


def test_front_matter_is_what_the_hub_reads(write: Write, checkpoint: Checkpoint) -> None:
    from huggingface_hub import ModelCard

    base = dataclasses.replace(checkpoint, name="THUDM/CogVideoX-5b")
    expected = {
        "base_model": "THUDM/CogVideoX-5b",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["text-to-video", "cogvideox", "diffusers-training", "lora", "template:sd-lora"],
        "instance_prompt": "MOUSE",
        "widget": [
            {"text": NASTY, "output": {"url": "validation/step-00000020/prompt-00-video-0.mp4"}},
            {"text": "--- : - {a} é 鼠", "output": {"url": "validation/step-00000020/prompt-01-video-0.mp4"}},
        ],
    }
    card = write((NASTY, "---\n: -  {a} é 鼠"), id_token="MOUSE", base=base)
    assert front_matter(card) == expected
    data = ModelCard(card).data.to_dict()  # the Hub's own reader
    assert {name: value for name, value in data.items() if name in expected} == expected
    image_sft = Trained("image-to-video", "sft", "CogVideoXImageToVideoPipeline")
    read = front_matter(write((), base=base, trained=image_sft))
    assert (read["pipeline_tag"], read["base_model_relation"]) == ("image-to-video", "finetune")
    assert "lora" not in read["tags"] and "widget" not in read


def test_settings_data_and_losses(write: Write, entries: list[Entry]) -> None:
    told = told_by(write(("a red square",), id_token="MOUSE"))
    assert told["Method"] == "LoRA, rank 4, alpha 12" and told["Learning rate"] == "0.0003, constant"
    assert told["Layers with a LoRA"] == "to_q, to_k, to_v, to_out.0"
    assert not any(name.startswith("--") for name in told)  # nothing but the defaults
    assert told["Loss, mean of the first 2 steps"] == "0.7500"
    assert told["Loss, mean of the last 2 steps"] == f"{(1 / 19 + 1 / 20) / 2:.4f}"
    assert told["Clips"] == told["Excerpts of them"] == str(len(entries)) == "12"
    assert told["Frames a second"] == "8" and told["Word before every caption"] == "MOUSE"
    (bucket,) = {entry.bucket for entry in entries}
    assert told[f"Excerpts of {bucket} (frames × height × width)"] == "12"


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (
            {"method": MethodOptions(training_type="sft", trainable_modules=("attn1",), ema_decay=0.99)},
            {"Method": "full fine-tuning of attn1", "--ema_decay": "0.99"},
        ),
        (
            {"lora": LoraOptions(rank=4, use_dora=True, use_rslora=True)},
            {"Method": "DoRA (rank-stabilized), rank 4, alpha 64"},
        ),
        (
            {"objective": ObjectiveOptions(timestep_sampling="logit_normal", snr_gamma=5.0)},
            {"--timestep_sampling": "logit_normal", "--snr_gamma": "5.0"},
        ),
        (
            {"optimizer": OptimizerOptions(use_8bit=True, beta2=0.9)},
            {"--use_8bit": "yes", "--beta2": "0.9", "Learning rate": "0.0001, constant"},
        ),
        # As resolved options are: came's own decays are its defaults.
        ({"optimizer": OptimizerOptions(optimizer="came", beta2=0.999, beta3=0.9999)}, {"Optimizer": "came"}),
    ],
)
def test_what_differs_from_the_defaults_is_told(write: Write, groups: dict[str, Any], expected: dict[str, str]) -> None:
    told = told_by(write(**groups))
    assert told | expected == told
    assert {name for name in told if name.startswith("--")} == {name for name in expected if name.startswith("--")}


def test_the_code_gives_the_length_of_the_text_where_it_is_not_the_pipelines(write: Write, checkpoint) -> None:
    assert "max_sequence_length" not in code_of(write())
    of_64 = dataclasses.replace(checkpoint, transformer={**checkpoint.transformer, "max_text_seq_length": 64})
    assert "    max_sequence_length=64," in code_of(write(base=of_64))
    assert "    max_sequence_length=100," in code_of(write(encoding=EncodingOptions(max_sequence_length=100)))
    assert "max_sequence_length" not in code_of(write(encoding=EncodingOptions(max_sequence_length=226)))


def test_nothing_of_this_machine_is_in_it(
    write: Write, tmp_path: Path, tiny_model: Path, checkpoint: Checkpoint, monkeypatch
) -> None:
    card = write()
    for secret in (str(tmp_path), str(tiny_model), str(tiny_model.parent), "/tmp", str(Path.home())):
        assert secret not in card
    assert "base_model" not in front_matter(card)  # a folder is no name on the Hub
    monkeypatch.chdir(tiny_model.parent.parent)  # also where its name looks like one
    looks_so = dataclasses.replace(checkpoint, name=f"{tiny_model.parent.name}/{tiny_model.name}")
    assert looks_so.is_local and "base_model" not in front_matter(write(base=looks_so))


# --- what a user wrote ---


def test_texts_of_a_user_read_as_they_are(write: Write, tmp_path: Path) -> None:
    plain = Page(write())
    nasty = Page(write((NASTY,), id_token="<img src=x onerror=y>", run=tmp_path / "run <b>`x`_y_"))
    assert sorted(set(nasty.tags)) == sorted({*plain.tags, "strong"})  # of the sentence about the token
    assert nasty.cells[0] == NASTY
    assert "script" not in nasty.tags and "img" not in nasty.tags
    assert "Every caption began with <img src=x onerror=y>; prompts" in nasty.text
    assert "run <b>`x`_y_" in nasty.text
    # The code is text too: a literal of one line.
    assert repr(f"<img src=x onerror=y> {NASTY}") in code_of(write((NASTY,), id_token="<img src=x onerror=y>"))


@pytest.mark.parametrize(
    "text",
    [
        *(NASTY, "[x](javascript:alert(1))", "](javascript:alert(1)) [", "<img src=x onerror=alert(1)>"),
        "a | b\n|---|\n| c",
        *(
            "<javascript:alert(1)>",
            "[x]: javascript:alert(1)",
            "\\<script>",
            "&lt;script&gt;",
            "-->",
            "a\nb\r\n\n# c",
            "---",
        ),
        *("\x1b[31mred\x00", "- a", "1. a", "> a", "    a", "a\u2028b", "鼠 é"),
    ],
)
def test_markdown_shows_a_text_in_one_line(text: str) -> None:
    shown = Page(f"---\n---\n| x |\n|---|\n| {markdown(text)} |\n")
    assert shown.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td"]
    printable = "".join(character if character.isprintable() else " " for character in text)
    assert shown.cells == [" ".join(printable.split())]


@pytest.mark.parametrize(
    "text",
    [
        "a\n---\n<script>alert(1)</script>",
        "a\nlicense: other\nbase_model: b",
        "a'\nlicense: other",
        'a"\nlicense: other',
        "!!python/object/apply:os.system [id]",
        "{license: other}",
        "- a: &x\n  *x",
    ],
)
def test_no_text_becomes_a_line_of_the_front_matter(write: Write, text: str) -> None:
    plain, nasty = front_matter(write()), front_matter(write((text,), id_token=text))
    assert nasty.keys() - plain.keys() == {"instance_prompt"}
    line = " ".join(text.split())
    assert nasty["instance_prompt"] == nasty["widget"][0]["text"] == line
    assert {**nasty, "widget": 0, "instance_prompt": 0} == {**plain, "widget": 0, "instance_prompt": 0}


# --- whose file it is ---


def test_a_card_of_ours_is_written_anew_and_one_of_the_user_stays(
    write: Write, tmp_path: Path, checkpoint, entries
) -> None:
    first = write()
    assert MARKER in first and write(("another",)) != first
    path = tmp_path / "run/README.md"
    path.write_text("mine")
    assert not write_model_card(tmp_path / "run", Train(), checkpoint, entries, 20, [], LORA)
    assert path.read_text() == "mine"

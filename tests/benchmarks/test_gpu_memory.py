"""The benchmark of GPU memory with tiny models on a CPU, where what it measures must be what is planned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogvideox_factory.planning.fakes import GPU, FakeTracker
from cogvideox_factory.planning.phases import fake_step

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_memory
import gpu_phases
import gpu_rows

ROWS = gpu_rows.all_rows()


@pytest.fixture
def one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned as on a CPU: host and device are one, and no kernel has a workspace."""
    monkeypatch.setattr(FakeTracker, "workspace", lambda *arguments: 0)
    monkeypatch.setattr(FakeTracker, "device_of", lambda *arguments: GPU)


def check_measured_as_planned(row: gpu_rows.Row) -> dict[str, dict[str, Any]]:
    planned = gpu_memory.plan_row(row, is_tiny=True)
    measured = dict(gpu_phases.measure_row(row, gpu_phases.TinyMeter(), num_steps=2))
    assert list(measured) == list(row.phases)
    for phase, figures in measured.items():
        assert figures["peak"] == pytest.approx(planned[phase]["peak"], rel=0.02), phase
    return measured


@pytest.mark.parametrize(
    ("name", "is_lora"),
    [pytest.param("smallest-1.5", True, marks=pytest.mark.slow), ("sft-2b-b1-adamw-checkpointed", False)],
)
def test_steps_are_measured_as_planned(name: str, is_lora: bool, one_place: None) -> None:
    figures = check_measured_as_planned(ROWS[name])["training"]
    with gpu_rows.opened(ROWS[name], is_tiny=True) as (_, checkpoint), torch.device("meta"):
        config = dict(checkpoint.transformer)
        base = sum(value.numel() for value in CogVideoXTransformer3DModel.from_config(config).parameters())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    in_lora = config["num_layers"] * 4 * 2 * width * 64  # two matrices of rank 64 at each of four square layers
    assert figures["parameters"] == base + (in_lora if is_lora else 0)
    assert figures["trained"] == (in_lora if is_lora else base)
    # 9 frames of 32×48 are 3 latent frames of 4×6, in patches of 2×2; CogVideoX 1.5 takes frames in pairs
    assert figures["tokens"] == 226 + (2 if "1.5" in name else 3) * 2 * 3
    assert all(torch.tensor(figures["losses"]).isfinite()) and figures["seconds"]["step"] > 0


@pytest.mark.slow
def test_all_phases_are_measured_as_planned(one_place: None) -> None:
    check_measured_as_planned(ROWS["smallest"])


def test_the_originals_way_computes_in_autocast() -> None:
    """Its LoRA is of another precision and its base of the same, and stock checkpoints wrap its blocks."""
    row = ROWS["original-lora-5b-r64-b1-adamw-checkpointed"]
    with gpu_rows.opened(row, is_tiny=True) as (options, checkpoint):
        transformer = gpu_phases.as_original(
            *(options, checkpoint, torch.bfloat16, torch.device("cpu")),
            lambda checkpoint, dtype: gpu_phases.with_random_weights(
                lambda: gpu_phases.load_transformer(checkpoint, dtype), torch.device("cpu"), torch.device("cpu")
            ),
        )
        transformer.train()
        seen = []
        layer = transformer.transformer_blocks[0].attn1.to_q.lora_A["default"]
        layer.register_forward_hook(lambda layer, given, output: seen.append((layer.weight.dtype, output.dtype)))
        batch = fake_step(options, checkpoint).batches[0]
        gpu_phases.Denoiser(checkpoint, torch.bfloat16).predict(
            *(transformer, batch.noise, torch.zeros(1, dtype=torch.int64), batch.prompt_embeds)
        ).sum().backward()
    assert seen == [(torch.float32, torch.bfloat16)] * 2, "once in the forward pass, once in the recompute"


def test_rows_have_their_real_size() -> None:
    shapes = {}
    for name in ("lora-5b-batch-4", "smallest-1.5"):
        with gpu_rows.opened(ROWS[name], is_tiny=False) as (options, checkpoint):
            shapes[name] = tuple(fake_step(options, checkpoint).batches[0].raw_latents.shape)
    assert shapes == {"lora-5b-batch-4": (4, 13, 16, 60, 90), "smallest-1.5": (1, 21, 16, 96, 170)}


def test_every_row_of_the_originals_table_is_there_or_named() -> None:
    rows, others = gpu_rows.published_rows()
    assert (len(rows), len(others)) == (57, 8) and len({row.name for row in rows}) == len(rows)
    assert all("DeepSpeed" in line["optimizer"] for line in others)
    listed = gpu_memory.listed(ROWS)
    assert all(f"{row.name}: " in listed for row in rows) and listed.count("DeepSpeed") == 8


def test_out_of_memory_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "training", {"peak": 1.0}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(gpu_memory, "measure_row", measure)
    file = tmp_path / "record.json"
    record = gpu_memory.measure_into(ROWS["lora-5b-videos"], gpu_phases.TinyMeter(), 1, 24.0, file)
    assert record["status"] == "out of memory" and record["phases"] == {"training": {"peak": 1.0}}
    assert json.loads(file.read_text()) == record and record["counted"] == "tensors on a CPU"
    planned = {"lora-5b-videos": {"testing": {"peak": 2.0, "host": 3.0}}}
    over = {"row": "lora-5b", "status": "measured", "phases": {"training": {"peak": 17.5, "seconds": {"step": 4}}}}
    text = gpu_memory.table(ROWS, {"planned": planned, "measured": [record, over]})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    named = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert [(line["row"], line["phase"], line["planned"], line["allocated"], line["status"]) for line in named] == [
        ("lora-5b", "training", "", "17.50", "more than promised"),
        ("lora-5b-videos", "training", "", "1.00", "measured"),
        ("lora-5b-videos", "testing", "2.00", "", "out of memory"),
    ]


@pytest.mark.parametrize("end", ["killed", "too slow"])
def test_a_row_that_dies_leaves_its_phases(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float) -> Any:
        file = Path(command[command.index("--into") + 1])
        file.write_text(json.dumps({"row": "smallest", "status": "killed", "phases": {"training": {"peak": 1.0}}}))
        if end == "too slow":
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=-9)

    monkeypatch.setattr(subprocess, "run", run)
    record = gpu_memory.measure_in_process(ROWS["smallest"], gpu_memory.parse(["--row_minutes", "2"]))
    assert record["phases"] == {"training": {"peak": 1.0}}
    assert record["status"] == ("killed (exit code -9)" if end == "killed" else "stopped after 2 minutes")


def test_a_part_that_is_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(row: gpu_rows.Row, arguments: Any) -> dict[str, Any]:
        asked.append((row.name, row.phases))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"row": row.name, "status": "measured", "phases": {}}

    monkeypatch.setattr(gpu_memory, "measure_in_process", measure)
    given = ["--tiny", "--output", str(tmp_path / "results.json"), "--rows", "sft-5b", "sft-2b"]
    with pytest.raises(KeyboardInterrupt):
        gpu_memory.main(given)
    assert gpu_memory.main([*given, "--missing", "--phases", "testing"]) == 0
    assert asked == [("sft-5b", ("training",)), ("sft-2b", ("training",)), ("sft-2b", ("testing",))]
    measured = json.loads((tmp_path / "results.json").read_text())["measured"]
    assert [record["row"] for record in measured] == ["sft-5b", "sft-2b"]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_memory.main(["--rows", "lora-5b"]) == 2
    assert capsys.readouterr().err.startswith("no CUDA GPU here")
    assert gpu_memory.main(["--rows", "no-such"]) == 2


def test_a_smaller_card_is_what_the_context_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79 * 1024**3, 80 * 1024**3))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    gpu_phases.CudaMeter(None)
    gpu_phases.CudaMeter(24)
    assert shares == [23 / 80]

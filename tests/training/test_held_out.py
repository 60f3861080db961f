"""The held-out loss against a plain loop, and what must not change it: the step, the batch, the processes, a resume."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogvideox_factory.config import LoraOptions
from cogvideox_factory.data import loader
from cogvideox_factory.data.loader import PreparedClips, clip_generator
from cogvideox_factory.data.split import split_entries
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.adapters import attach_lora
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler, load_transformer
from cogvideox_factory.model.family import Checkpoint
from cogvideox_factory.stopping import StopRequest
from cogvideox_factory.training import held_out as module
from cogvideox_factory.training.held_out import FILE, HeldOutLoss
from cogvideox_factory.training.metrics import MetricsLog, read_metrics

CPU = torch.device("cpu")
Make = Callable[..., HeldOutLoss]


class Rank(SimpleNamespace):
    """One of several processes, of which the test adds up what they found."""

    def __init__(self, process_index: int = 0, num_processes: int = 1):
        super().__init__(process_index=process_index, num_processes=num_processes, device=CPU)
        self.is_main_process = process_index == 0

    def reduce(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        assert kind == "sum"
        return tensor


@pytest.fixture
def make(tmp_path: Path, checkpoint: Checkpoint, prepared: PreparedSet, entries: list[Entry]) -> Make:
    def call(
        batch_size: int = 2, rank: Rank | None = None, last_step: int = 0, every_steps: int = 2, **clips: Any
    ) -> HeldOutLoss:
        held_out = clips.pop("entries", entries[:5])
        options = {"seed": 3, "caption_dropout": 0.0, **clips}
        (tmp_path / "run").mkdir(exist_ok=True)
        return HeldOutLoss(
            tmp_path / "run",
            PreparedClips(prepared, held_out, prepared.read_settings()["empty_prompt"], **options),
            batch_size,
            Denoiser(checkpoint, torch.float32),
            load_scheduler(checkpoint),
            rank or Rank(),
            StopRequest(),
            last_step=last_step,
            every_steps=every_steps,
        )

    return call


@pytest.fixture
def transformer(checkpoint: Checkpoint):
    """A model in training mode whose adapter changes something, and whose dropout would too."""
    transformer = load_transformer(checkpoint, torch.float32)
    attach_lora(transformer, LoraOptions(rank=4, lora_alpha=12), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    for part in transformer.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    return transformer.train()


def plain_loop(transformer: Any, model: Path, prepared: PreparedSet, entries: list[Entry]) -> torch.Tensor:
    """(clips, noise levels) with nothing of ours but the names of the numbers: a clip and a noise level at a time."""
    scheduler = CogVideoXDDIMScheduler.from_pretrained(model, subfolder="scheduler")
    pipeline = CogVideoXPipeline.from_pretrained(model)
    rotary = pipeline._prepare_rotary_positional_embeddings(64, 96, 5, CPU)
    rows = []
    for entry in entries:
        stored = prepared.read_tensors(entry.files["latents"][0])
        prompt = prepared.read_tensors(entry.files["prompt"][0])["prompt_embeds"]
        for index, timestep in enumerate((125, 375, 625, 875)):  # the middles of four equal parts
            generator = clip_generator(-1, index, entry.key)
            torch.rand(3, generator=generator)
            shape = stored["mean"].transpose(0, 1).shape
            latents = stored["mean"].transpose(0, 1) + torch.exp(0.5 * stored["logvar"]).transpose(0, 1) * torch.randn(
                shape, generator=generator
            )
            latents, noise = (latents * 0.7)[None], torch.randn(shape, generator=generator)[None]
            timesteps = torch.tensor([timestep])
            with torch.no_grad():
                velocity = transformer(
                    hidden_states=scheduler.add_noise(latents, noise, timesteps),
                    encoder_hidden_states=prompt[None],
                    timestep=timesteps,
                    image_rotary_emb=rotary,
                ).sample
            rows.append((velocity - scheduler.get_velocity(latents, noise, timesteps)).square().mean())
    return torch.stack(rows).reshape(len(entries), 4)


def test_losses_are_those_of_a_plain_loop(
    make: Make, transformer: Any, tiny_model: Path, prepared: PreparedSet, entries: list[Entry], tmp_path: Path
) -> None:
    with make() as held_out:
        losses = held_out.losses(transformer)
        loss = held_out.measure(transformer, 4, 1)
    expected = plain_loop(transformer.eval(), tiny_model, prepared, entries[:5])
    assert losses is not None and losses.dtype == torch.float64
    torch.testing.assert_close(losses.float(), expected, rtol=1e-5, atol=1e-6)
    assert loss == losses.mean().item()
    (line,) = read_metrics(tmp_path / "run" / FILE)
    levels = dict(zip(("0.125", "0.375", "0.625", "0.875"), losses.mean(0).tolist(), strict=True))
    assert line.pop("held_out") and line == {
        "step": 4,
        "epoch": 1,
        "loss": loss,
        "loss_by_quantile": levels,
        "clips": 5,
    }
    base = CogVideoXTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer")
    assert (plain_loop(base, tiny_model, prepared, entries[:5]) - expected).abs().mean() > 1e-3  # the adapter counts


def test_the_same_weights_give_the_same_number_whatever_was_drawn_in_between(make: Make, transformer: Any) -> None:
    """Trap, of the evaluation: neither the run's seed nor the state of any generator has a part in it."""
    first = make().losses(transformer)
    torch.manual_seed(99)
    torch.rand(7)
    before = torch.get_rng_state()
    again = make(seed=1234).losses(transformer)
    assert first is not None and again is not None and torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)  # and it draws nothing from the training's


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_the_batch_size_does_not_change_it(make: Make, transformer: Any, batch_size: int) -> None:
    ours, theirs = make(batch_size).losses(transformer), make(2).losses(transformer)
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_ranks_share_out_the_clips_and_add_up_to_what_one_finds(
    make: Make, transformer: Any, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    """Of three batches at four noise levels each rank computes as many as the others."""
    calls: list[int] = []
    compute = module.velocity_loss

    def counted(*arguments: Any) -> torch.Tensor:
        calls[-1] += 1
        return compute(*arguments)

    monkeypatch.setattr(module, "velocity_loss", counted)
    total = torch.zeros(())
    entry_count = 5
    for index in range(num_ranks):
        calls.append(0)
        part = make(2, Rank(index, num_ranks)).losses(transformer)
        assert part is not None and part.shape == (entry_count, 4)
        assert ((total == 0) | (part == 0)).all()  # nothing is found twice
        total = total + part
    assert calls == [-(-12 // num_ranks)] * num_ranks
    calls.append(0)
    whole = make(2).losses(transformer)
    assert whole is not None and torch.equal(total, whole)


def test_the_model_comes_back_as_it_was_and_keeps_no_graph(make: Make, transformer: Any) -> None:
    transformer.transformer_blocks[1].eval()  # modes can differ within a model
    modes = [part.training for part in transformer.modules()]
    weights = {name: value.clone() for name, value in transformer.state_dict().items()}
    losses = make().losses(transformer)
    assert losses is not None and not losses.requires_grad
    assert [part.training for part in transformer.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(value, weights[name]) for name, value in transformer.state_dict().items())
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_the_model_comes_back_as_it_was_after_a_failure_too(make: Make, transformer: Any, monkeypatch) -> None:
    def failing(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "velocity_loss", failing)
    with pytest.raises(RuntimeError):
        make().losses(transformer)
    assert transformer.training


def test_no_caption_is_dropped_and_the_batch_is_the_trainings(make: Make, transformer: Any, monkeypatch) -> None:
    """What a batch holds comes from the code that training uses, so that a field that is added there is here too."""
    seen = []
    clip = PreparedClips._clip

    def noted(self: PreparedClips, entry: Entry, *arguments: Any) -> Any:
        seen.append(entry.key)
        return clip(self, entry, *arguments)

    monkeypatch.setattr(PreparedClips, "_clip", noted)
    held_out = make()
    assert held_out.losses(transformer) is not None
    assert sorted(seen) == sorted(entry.key for entry in held_out.clips.entries for _ in range(4))


# --- when, and what is written ---


def test_a_signal_cuts_it_short_except_at_the_last_step(make: Make, transformer: Any, tmp_path: Path) -> None:
    with make() as held_out:
        held_out.stop.requested = True
        assert held_out.measure(transformer, 2, 0) is None
        assert held_out.measure(transformer, 3, 0, is_last=True) is not None
    assert [line["step"] for line in read_metrics(tmp_path / "run" / FILE)] == [3]
    assert transformer.training


def test_a_start_measures_what_is_due_and_not_there(make: Make, transformer: Any) -> None:
    with make() as fresh:
        assert fresh.is_due_at_start(0, 9)
        for step in (0, 2, 4):
            assert fresh.is_due(step, 9)
            fresh.measure(transformer, step, 0)
        assert fresh.is_due(9, 9) and not fresh.is_due(3, 9)
    with make(last_step=4) as resumed:
        assert not resumed.is_due_at_start(4, 9)
    with make(last_step=3) as resumed:  # drops step 4
        assert not resumed.is_due_at_start(3, 9)
        assert resumed.is_due_at_start(4, 9)  # a signal came before it was measured
    with make(last_step=3, entries=make().clips.entries[:3]) as others:
        assert others.is_due_at_start(3, 9)  # of these clips there is no value at all


def test_a_start_at_step_0_measures_anew(make: Make, transformer: Any, tmp_path: Path) -> None:
    """What stands there is of a run that died before its first checkpoint, perhaps of another model."""
    for _ in range(2):
        with make() as held_out:
            assert held_out.is_due_at_start(0, 9)
            held_out.measure(transformer, 0, 0)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / FILE)] == [0]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Messages without those of the progress."""
    return [record.message for record in caplog.records if record.name.endswith("held_out")]


def test_other_held_out_clips_are_told_and_have_a_best_of_their_own(
    make: Make, transformer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / FILE
    with make() as held_out:
        first = held_out.measure(transformer, 2, 0)
    path.write_text(path.read_text().replace(f'"loss": {first}', '"loss": 0.001'))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="cogvideox_factory"), make(last_step=2) as held_out_of_first:
        again = held_out_of_first.measure(transformer, 4, 0)
    assert again == first and said(caplog) == [f"held-out   {again:.4f} (best 0.0010 at step 2)"]
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, logger="cogvideox_factory"),
        make(last_step=4, entries=held_out_of_first.clips.entries[1:]) as held_out,
    ):
        other = held_out.measure(transformer, 6, 0)
    told, best = said(caplog)
    assert (
        "held-out clips are not those of before" in told
        and best == f"held-out   {other:.4f} (best {other:.4f} at step 6)"
    )
    assert [line["step"] for line in read_metrics(path)] == [6]
    first_clips, other_clips = held_out_of_first.identity, held_out.identity
    assert [line["step"] for line in read_metrics(path.with_name(f"left-{first_clips}-{FILE}"))] == [2, 4]
    # A third choice takes nothing from the first, which is taken up again when its clips are.
    make(last_step=6, entries=held_out_of_first.clips.entries[2:]).__exit__()
    assert not read_metrics(path)
    assert [line["step"] for line in read_metrics(path.with_name(f"left-{other_clips}-{FILE}"))] == [6]
    with make(last_step=6) as held_out:
        held_out.measure(transformer, 8, 0)
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 8]
    assert not path.with_name(f"left-{first_clips}-{FILE}").exists()


def test_a_loss_that_is_no_number_is_null_in_the_file(
    make: Make, transformer: Any, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(module, "velocity_loss", lambda *_: torch.full((2,), float("nan")))
    with make(entries=make().clips.entries[:4]) as held_out:
        held_out.measure(transformer, 2, 0)
    line = json.loads((tmp_path / "run" / FILE).read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None and set(line["loss_by_quantile"].values()) == {None}


# --- whole runs ---

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(cli: Callable[..., tuple[int, str, str]], tiny_model: Path, prepared_folder: Path) -> Train:
    """Call `train` on the prepared clips: exit code and standard error."""

    def call(run: Path, *flags: str | Path) -> tuple[int, str]:
        code, _, messages = cli(
            *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder),
            *("--load_tensors", "--report_to", "none", "--output_dir", run, "--rank", "4", "--learning_rate", "1e-2"),
            *("--train_batch_size", "2", *flags),
        )
        return code, messages

    return call


@pytest.mark.slow
def test_a_stopped_and_resumed_run_has_the_very_values_of_one_never_stopped(
    train: Train, tmp_path: Path, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first signal comes in the middle of a measurement, the second between two of them."""
    flags = ("--max_train_steps", "7", "--validation_fraction", "0.4", "--validation_loss_steps", "2")
    code, messages = train(tmp_path / "whole", *flags, "--checkpointing_steps", "3")
    assert code == 0, messages
    whole = read_metrics(tmp_path / "whole" / FILE)
    assert [line["step"] for line in whole] == [0, 2, 4, 6, 7]
    trained, held_out = split_entries(entries, 0.4)
    assert f"held out   {len(held_out)} clips of {len(held_out)} videos; {len(trained)} are trained on" in messages
    assert {line["clips"] for line in whole} == {len(held_out)}
    best = min(whole, key=lambda line: line["loss"])
    assert f"held-out   {whole[-1]['loss']:.4f} (best {best['loss']:.4f} at step {best['step']})" in messages

    measure, steps = HeldOutLoss.measure, iter((2, 5))
    stop_after = next(steps)

    def measure_and_be_stopped(self: HeldOutLoss, model: Any, step: int, *arguments: Any, **options: Any) -> Any:
        if step == stop_after == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, model, step, *arguments, **options)

    write = MetricsLog.write

    def write_and_be_stopped(self: MetricsLog, **values: Any) -> None:
        write(self, **values)
        if values["step"] == stop_after == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(HeldOutLoss, "measure", measure_and_be_stopped)
    monkeypatch.setattr(MetricsLog, "write", write_and_be_stopped)
    resumed = (*flags, "--resume_from_checkpoint", "latest")
    for known in ([0], [0, 2, 4]):
        assert train(tmp_path / "parts", *resumed)[0] == 75
        assert [line["step"] for line in read_metrics(tmp_path / "parts" / FILE)] == known
        stop_after = next(steps, 0)
    assert train(tmp_path / "parts", *resumed)[0] == 0
    assert (tmp_path / "parts" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    assert len(read_metrics(tmp_path / "parts/metrics.jsonl")) == 7


def test_held_out_clips_are_never_trained_on(train: Train, tmp_path: Path, entries: list[Entry], monkeypatch) -> None:
    drawn: set[str] = set()

    def noted(seed: int, epoch: int, key: str) -> torch.Generator:
        if seed >= 0:
            drawn.add(key)
        return clip_generator(seed, epoch, key)

    monkeypatch.setattr(loader, "clip_generator", noted)
    flags = ("--num_train_epochs", "1", "--validation_fraction", "0.4", "--checkpointing_steps", "4")
    assert train(tmp_path / "run", *flags)[0] == 0
    trained, _ = split_entries(entries, 0.4)
    assert drawn == {entry.key for entry in trained}
    steps = len(trained) // 2 + len(trained) % 2
    measured = [line["step"] for line in read_metrics(tmp_path / "run" / FILE)]
    assert measured == sorted({*range(0, steps, 4), steps})  # every checkpoint has its value


@pytest.mark.slow
def test_measuring_changes_no_weight_and_another_fraction_is_told(
    train: Train, tmp_path: Path, prepared_folder: Path
) -> None:
    """A second set is held out of the training of the first, which goes on as if nobody had looked."""
    flags = ("--max_train_steps", "3", "--checkpointing_steps", "1")
    assert train(tmp_path / "plain", *flags)[0] == 0
    code, messages = train(tmp_path / "run", *flags, "--validation_data_root", prepared_folder)
    assert code == 0 and "12 of its 12 clips are also trained on" in messages
    plain, measured = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("plain", "run"))
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    assert not (tmp_path / "plain" / FILE).exists()
    again = ("--max_train_steps", "4", "--validation_fraction", "0.4", "--resume_from_checkpoint", "latest")
    code, messages = train(tmp_path / "run", *again)
    assert code == 0 and "clips differ from those of the checkpoint" in messages
    assert "held-out clips are not those of before" in messages
    assert [line["step"] for line in read_metrics(tmp_path / "run" / FILE)] == [3, 4]
    (left,) = (tmp_path / "run").glob(f"left-*-{FILE}")
    assert [line["step"] for line in read_metrics(left)] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_second_set_of_raw_clips_is_prepared_beside_the_first(
    cli: Callable[..., tuple[int, str, str]], tiny_model: Path, clips: Path, tmp_path: Path
) -> None:
    names = [line.strip() for line in (clips / "videos.txt").read_text().splitlines()]
    for folder, chosen in (("first", names[:2]), ("second", names[1:3])):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(chosen):
            shutil.copy(clips / name, tmp_path / folder / f"{folder}-{number}.mp4")
            (tmp_path / folder / f"{folder}-{number}.txt").write_text(f"a caption of the {folder} set")
    flags = ["train", "--pretrained_model_name_or_path", tiny_model, "--data_root", tmp_path / "first", "--output_dir"]
    flags += [tmp_path / "run", "--rank", "4", "--max_train_steps", "1", "--validation_data_root", tmp_path / "second"]
    code, _, messages = cli(*flags)
    assert code == 0, messages
    assert "1 of its 2 clips are also trained on, such as second-0.mp4" in messages
    entries = PreparedSet(tmp_path / "run/prepared-validation").read_index()
    assert [entry.caption for entry in entries] == ["a caption of the second set"] * 2
    assert [line["clips"] for line in read_metrics(tmp_path / "run" / FILE)] == [2, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--validation_fraction", "0.4", "--validation_data_root", "x"), "choose one"),
        (("--validation_loss_steps", "5"), "--validation_loss_steps 5: needs clips that are held out"),
        (("--validation_fraction", "1e-9"), "--validation_fraction 1e-09: holds out none of 12 videos"),
        (("--validation_data_root", "/nowhere"), "--validation_data_root /nowhere: /nowhere is not a prepared set"),
    ],
)
def test_what_cannot_be_held_out_is_refused(train: Train, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    code, messages = train(tmp_path / "run", "--max_train_steps", "1", *flags)
    assert code == 2 and message in messages and "Traceback" not in messages
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_second_folder_that_is_not_there_is_named_before_a_folder_is_made(
    cli: Callable[..., tuple[int, str, str]], tiny_model: Path, clips: Path, tmp_path: Path
) -> None:
    flags = ("--pretrained_model_name_or_path", tiny_model, "--data_root", clips, "--output_dir", tmp_path / "run")
    code, _, messages = cli("train", *flags, "--validation_data_root", tmp_path / "gone")
    assert code == 2 and f"--validation_data_root {tmp_path / 'gone'}: no such folder" in messages
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(train: Train, tmp_path: Path) -> None:
    """Of the untrained model, which is the same on one and on two; three clips, so that one process has none to do."""
    flags = ("--max_train_steps", "1", "--validation_fraction", "0.4", "--validation_loss_steps", "5")
    assert train(tmp_path / "one", *flags)[0] == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "cogvideox_factory", "train", "--config", str(tmp_path / "one/config.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command, "--output_dir", str(tmp_path / "two"), "--train_batch_size", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (read_metrics(tmp_path / run / FILE) for run in ("one", "two"))
    assert [line["step"] for line in two] == [0, 1]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["loss_by_quantile"] == pytest.approx(theirs["loss_by_quantile"], rel=1e-5)

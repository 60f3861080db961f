"""The training run, from options to trained weights: `train` is read from top to bottom.

State that resumes is `TrainState`; what the model goes through before it trains is `build_model`, in that order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from cogvideox_factory.config import RunError, Train, UserError
from cogvideox_factory.data.loader import StepBatches, load_steps
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.memory.set_aside import tensors_in
from cogvideox_factory.memory.strategies import apply, check_memory
from cogvideox_factory.model.adapters import (
    attach,
    export,
    is_lora,
    trainable_parameters,
)
from cogvideox_factory.model.denoiser import Denoiser, load_scheduler, load_transformer
from cogvideox_factory.model.device import free_memory
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning
from cogvideox_factory.ranks import any_rank, first_rank_first, share_requests, together
from cogvideox_factory.run_folder import set_aside_after
from cogvideox_factory.stopping import Stopped, StopRequest, stop_requests
from cogvideox_factory.training.checkpoint import TrainState
from cogvideox_factory.training.ema import WeightAverage, averaged, build_average
from cogvideox_factory.training.engine import (
    backward,
    check_engine,
    first_rank_says,
    has_divided_weights,
    has_masters,
    is_fsdp,
    make_accelerator,
    wrap,
)
from cogvideox_factory.training.fp32_steps import held_weights
from cogvideox_factory.training.gathering import gathered, part_of, whole_parameters
from cogvideox_factory.training.held_out import HeldOutLoss
from cogvideox_factory.training.hub import open_repository
from cogvideox_factory.training.metrics import MemoryMeter, MetricsLog, finite_or_none
from cogvideox_factory.training.model_card import Trained, write_model_card
from cogvideox_factory.training.objective import velocity_loss
from cogvideox_factory.training.optimizers import (
    backward_passes,
    build_optimizer,
    check_optimizer,
    clip_gradients,
    effective_rate,
    updates_in_backward,
)
from cogvideox_factory.training.resuming import resume, schedule_at
from cogvideox_factory.training.run_data import TrainingData, check_data_sets, clips_of, prepare_data
from cogvideox_factory.training.run_options import claim_run_folder, resolve_options, write_config
from cogvideox_factory.training.saving import Saver
from cogvideox_factory.training.skipping import SkippedSteps, told
from cogvideox_factory.training.start_images import open_start_images
from cogvideox_factory.training.step_progress import StepProgress
from cogvideox_factory.training.summary import tell_start
from cogvideox_factory.training.tracking import Trackers, choose_trackers
from cogvideox_factory.training.validation import Validation
from cogvideox_factory.training.versions import write_versions

logger = logging.getLogger(__name__)


def train(options: Train, planned: Mapping[str, float] | None = None) -> Path:
    """Train as the options say, and give the run's folder. `planned` is for its memory.json.

    Raises UserError for what cannot be done as asked, and Stopped after a signal, with everything saved.
    """
    assert options.output_dir is not None
    run = options.output_dir
    tracker_names = choose_trackers(options.tracking.report_to)
    checkpoint = with_conditioning(open_checkpoint(options.model), options.conditioning)
    options = resolve_options(options, checkpoint)
    accelerator = make_accelerator(options, checkpoint)
    check_optimizer(options.optimizer, accelerator)
    check_memory(options, accelerator.num_processes, has_scaler=accelerator.scaler is not None)
    check_engine(options, accelerator)
    device = accelerator.device
    check_data_sets(options)  # what is wrong with one as a whole is said before a folder is made
    trackers = Trackers(tracker_names if accelerator.is_main_process else (), options)
    with trackers, stop_requests() as stop:
        share_requests(stop)
        with together(stop):
            if accelerator.is_main_process:
                claim_run_folder(run, options, checkpoint.folder)
                write_versions(run, device)
                repository = open_repository(options)
        start_images = first_rank_first(lambda: open_start_images(run, options.validation, checkpoint), stop)
        # Data first: the encoders have left the memory before the transformer comes.
        data, held_out_data = prepare_data(options, checkpoint, accelerator, stop)
        validation = Validation(run, options, checkpoint, data.most_frequent_bucket, stop, start_images)
        validation.on_written = trackers.show_videos

        def encode_for_validation() -> None:
            validation.encode_prompts(device)
            validation.keep_images(data.prepared, data.entries, device)

        first_rank_first(encode_for_validation, stop)
        options = dataclasses.replace(options, sampling=validation.sampling)
        memory = MemoryMeter(device, run / "memory.json", planned)
        state = train_steps(options, checkpoint, accelerator, data, held_out_data, validation, memory, trackers, stop)

        # What was learned is now tested as others will use it: from the saved file, by stock diffusers.
        accelerator.free_memory()  # what it holds itself
        free_memory()
        with together(stop):
            if accelerator.is_main_process:
                memory.start_phase()
                if validation.run_from_saved(state.step, device):
                    memory.record("memory_after_testing", memory.peak())
                memory.write()
                if validation.videos and not validation.is_done(state.step):
                    stop.check(f"what was trained is saved in {run}, not all videos of its test; start again for them")
                trained = Trained.of(checkpoint, options.method.training_type)
                name = repository.name if repository else None
                write_model_card(run, options, checkpoint, data.entries, state.step, validation.videos, trained, name)
    if accelerator.is_main_process and repository:  # nobody waits for it
        repository.upload(run, state.step)
    return run


def train_steps(
    options: Train,
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    data: TrainingData,
    held_out_data: TrainingData | None,
    validation: Validation,
    memory: MemoryMeter,
    trackers: Trackers,
    stop: StopRequest,
) -> TrainState:
    """All optimizer steps that are left, then what was trained in the run's folder. Raises Stopped after a signal."""
    assert options.output_dir is not None
    run, device, training = options.output_dir, accelerator.device, options.training
    is_main = accelerator.is_main_process
    sampler = Sampler(
        [entry.bucket for entry in data.entries],
        training.train_batch_size,
        accelerator.num_processes,
        training.gradient_accumulation_steps,
        options.seed,
        training.drop_last,
    )
    dtype = checkpoint.dtype_for(training.mixed_precision, device)
    # FSDP2 brings each part to the device itself.
    transformer = build_model(options, checkpoint, dtype, torch.device("cpu") if is_fsdp(accelerator) else device)
    scheduler = load_scheduler(checkpoint)
    denoiser = Denoiser(checkpoint, dtype)
    trained = trainable_parameters(transformer)
    num_trained = sum(parameter.numel() for parameter in trained.values())
    average = build_average(trained, options.method.ema_decay)

    def export_trained() -> None:
        with whole_parameters(transformer, only_trained=is_lora(transformer), is_kept=is_main), together(stop):
            if is_main:
                with averaged(average):
                    export(transformer, checkpoint, run)

    # How long the training is can depend on where it stands, and the course of the learning rate on how long it is.
    model, optimizer = wrap(
        accelerator,
        transformer,
        build_optimizer(
            *(trained.values(), options.optimizer, sampler.clips_per_step),
            in_backward=options.memory.optimizer_in_backward,
            has_masters=has_masters(accelerator),
        ),
    )
    raw_optimizer = getattr(optimizer, "optimizer", optimizer)  # without what accelerate puts around it
    trained = trainable_parameters(transformer)  # FSDP2 has others
    parameters = list(trained.values())
    state = resume(options, checkpoint, transformer, raw_optimizer, accelerator, data.entries, sampler, average)
    steps_left = sampler.steps_left(state.position, training.num_train_epochs)
    num_steps = training.max_train_steps or state.step + steps_left
    schedule = schedule_at(state.step, raw_optimizer, options.optimizer, num_steps)
    tell_start(*(checkpoint, options, data, held_out_data, num_trained, num_steps, sampler, state.step), memory.planned)
    trackers.start_after(state.step, options)
    if state.step >= num_steps:
        logger.info("nothing left to train: this run is finished")
        export_trained()  # again: what is there may be of fewer steps
        return state
    if is_main:  # only now: a run that is refused or finished keeps its own
        write_config(options)
        for name in ("checkpoints", "validation"):
            set_aside_after(run / name, state.step)

    held_out = (
        HeldOutLoss(
            run,
            clips_of(held_out_data, options, checkpoint, is_held_out=True),
            training.train_batch_size,
            denoiser,
            scheduler,
            accelerator,
            stop,
            last_step=state.step,
            every_steps=options.held_out.validation_loss_steps or training.checkpointing_steps,
            also_to=functools.partial(trackers.log_line, group="held_out"),
        )
        if held_out_data
        else None
    )
    steps = load_steps(
        clips_of(data, options, checkpoint, accelerator.process_index),
        sampler,
        state.position,
        num_workers=training.dataloader_num_workers,
        pin_memory=training.pin_memory and device.type == "cuda",
    )

    saver = Saver(run, training.checkpoints_total_limit, state.step)

    def broken(what: str) -> RunError:
        good = saver.last_good()
        return RunError(f"{what}; the last good state is the {good}. Lower --learning_rate, or set --max_grad_norm")

    def save() -> None:
        with together(stop):
            if not are_finite(parameters):  # a loss can be finite once more when the weights are not
                raise broken(f"weights are not finite after step {state.step}")
        held = gathered(raw_optimizer, is_kept=is_main)
        with whole_parameters(transformer, only_trained=True, is_kept=is_main and is_lora(transformer)), together(stop):
            if is_main:
                state.scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
                saver.save(state, transformer, held, average)
            else:
                saver.saved_step = state.step  # which the first rank sees to

    first_step = saved_step = state.step

    def validate_if_due() -> None:
        is_shared = has_divided_weights(accelerator)  # which take all ranks to make a video
        if not validation.videos or not first_rank_says(
            accelerator, validation.is_due(state.step, state.position.ended_epoch)
        ):
            return
        with together(stop):
            if not (is_main or is_shared):
                return
            if state.step > first_step:
                memory.record("memory_before_validation", memory.peak())
            memory.start_phase()
            with averaged(average):
                held = None if has_masters(accelerator) else held_between_steps(raw_optimizer, average)
                validation.run_in_memory(
                    *(state.step, transformer, scheduler, dtype, device, held),
                    is_shared=is_shared,
                )
            free_memory()
            memory.record("memory_after_validation", memory.peak())
            memory.start_phase()

    memory.record("memory_before_training", memory.current())
    if is_main:
        memory.write()  # now, for whoever is out of memory in the first step, or killed
    validate_if_due()
    if held_out and held_out.is_due_at_start(state.step, num_steps):
        with averaged(average):
            held_out.measure(model, state.step, state.position.last_epoch)
    transformer.train()
    memory.start_phase()
    progress = StepProgress(num_steps, state.step, training.checkpointing_steps, is_silent=not is_main)
    log = MetricsLog(run, state.step, accelerator, also_to=trackers.log_line)
    skipped = SkippedSteps(run, state.step, accelerator, sampler, data.entries)
    failure: Exception | None = None  # of what is read for a step, or of its videos; the steps before it are saved
    is_save_due = False
    with log, held_out or contextlib.nullcontext(), progress, saver, _kept(memory, is_main):
        while state.step < num_steps:
            started = time.perf_counter()
            step = next(steps)
            must_stop, is_lost = any_rank(accelerator, stop.requested or saver.has_failed, isinstance(step, RunError))
            if must_stop:  # a signal may have reached those that read ahead, too: then their failure is none
                break
            if is_lost:  # here or in another process
                failure = step if isinstance(step, RunError) else None
                break
            assert isinstance(step, StepBatches)
            waited = time.perf_counter() - started
            rate = effective_rate(raw_optimizer)
            result = optimizer_step(step, accelerator, model, optimizer, denoiser, scheduler, parameters, options)
            if result.is_skipped:
                skipped.add(state.step + 1, step.position, result, training.max_skipped_steps)
                if skipped.in_a_row == training.max_skipped_steps:
                    clips = told(skipped.last_clips)
                    with together(stop):
                        raise broken(f"{skipped.in_a_row} steps in a row are no numbers, the last of them of {clips}")
            else:
                skipped.end_row()
                state.samples_seen += step.num_clips
                if average:
                    average.update(held_weights(raw_optimizer, trained))
            schedule.step()
            state.step += 1
            state.position = sampler.after(step.position)
            line = dict(
                step=state.step,
                epoch=step.position.epoch,
                loss=finite_or_none(result.loss),
                lr=rate,
                grad_norm=finite_or_none(result.grad_norm),
                step_seconds=round(time.perf_counter() - started, 6),
                data_seconds=round(waited, 6),
                samples_seen=state.samples_seen,
                memory_gib=round(memory.current(), 3),
                **({"skipped": True} if result.is_skipped else {}),
            )
            log.write(**line)
            progress.show(line)
            is_save_due |= state.step % training.checkpointing_steps == 0
            # While steps are skipped the weights may have gone astray: they must not push out an older checkpoint.
            if (is_save_due and not result.is_skipped) or state.step == num_steps:
                save()
                saved_step, is_save_due = state.step, False
            try:
                if held_out and held_out.is_due(state.step, num_steps):  # what was saved is safe if this is killed
                    with averaged(average):
                        held_out.measure(model, state.step, step.position.epoch, is_last=state.step == num_steps)
            except RunError as error:  # of a file that is read for it
                failure = error
                break
            if state.step < num_steps:  # after the last step, what was saved is tested
                try:
                    validate_if_due()
                except (RunError, UserError, OSError, torch.OutOfMemoryError) as error:  # the weights are as they were
                    failure = error
                    break
    with together(stop):
        saver.wait()

    if state.step < num_steps or failure:
        if saved_step != state.step:
            save()
        go_on = (
            f"cogvideox-factory train --config {shlex.quote(str(run / 'config.yaml'))} --resume_from_checkpoint latest"
        )
        with together(stop):
            if isinstance(failure, (UserError, torch.OutOfMemoryError)):  # whose messages have remedies of their own
                raise failure
            if failure:
                raise RunError(f"{failure}. All {state.step} steps before are saved; then go on with: {go_on}")
            raise Stopped(f"stopped after step {state.step} of {num_steps}, all saved; go on with: {go_on}")
    export_trained()
    return state


def build_model(
    options: Train, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, load=load_transformer
):
    """The transformer as it trains. The order matters; each line says what it must come after.

    `load` gives the base model; planning gives one without weights.
    """
    transformer = load(checkpoint, dtype)  # frozen, in the base's type
    # After the base has its type, in which its own weights are trained; a LoRA has one of its own.
    keeps_bf16 = options.optimizer.trainable_dtype == "bf16"
    attach(transformer, options.method, options.lora, options.seed, keeps_bf16=keeps_bf16)
    # After all layers are in their blocks and frozen weights are known by it. It also brings the model to its device:
    # what is to live on the host must never be all on the GPU first.
    return apply(transformer, options.memory, device)


@contextlib.contextmanager
def _kept(memory: MemoryMeter, is_main: bool) -> Iterator[None]:
    """The peak of the training is recorded and written even if it ends out of memory: then it is asked for."""
    try:
        yield
    finally:
        memory.record("memory_before_validation", memory.peak())
        if is_main:
            with contextlib.suppress(OSError):  # of a full disk something else tells
                memory.write()


def optimizer_step(
    step: StepBatches,
    accelerator: Accelerator,
    model,
    optimizer,
    denoiser: Denoiser,
    scheduler,
    parameters: list[torch.nn.Parameter],
    options: Train,
) -> StepResult:
    """One update from the clips of a step, or none where the loss or the gradient is no number: neither weights nor
    the optimizer's state change then.

    Every clip of the step weighs the same, whatever batch and rank it came in. An update within the backward pass
    cannot be taken back: there each batch's loss is looked at before its backward pass, and the gradient's norm before
    the second pass, if it is clipped.
    """
    total = torch.zeros((), device=accelerator.device)
    limit = options.optimizer.max_grad_norm or float("inf")
    in_backward = updates_in_backward(optimizer)
    num_batches = len(step.batches)
    clip_losses: list[torch.Tensor] = []
    is_complete = True
    for index, batch in enumerate(step.batches):
        is_last = index + 1 == num_batches
        # Engines average gradients over ranks, once, after the last batch.
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            for _ in backward_passes(optimizer, index, num_batches, limit):  # one, or two that are alike
                losses = velocity_loss(model, denoiser, scheduler, batch.to(accelerator.device), options.objective)
                loss = losses.mean() * batch.share
                is_complete = not in_backward or not any_rank(accelerator, not math.isfinite(loss.item()))[0]
                if not is_complete:
                    break
                backward(accelerator, model, loss, is_last=is_last)
        total += loss.detach()
        clip_losses.append(losses.detach())
        if not is_complete:
            break
    grad_norm = clip_gradients(accelerator, optimizer, parameters, limit) if is_complete else total
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
    loss_value, norm_value = torch.stack([total, grad_norm.to(total)]).tolist()  # the step's one wait for the GPU
    # The scaler of fp16 looks at the gradients itself: that they overflow is how it finds its scale.
    norm_counts = accelerator.scaler is None and (not in_backward or limit < float("inf"))
    is_skipped = not math.isfinite(loss_value) or (norm_counts and not math.isfinite(norm_value))
    if not is_skipped:
        optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update(accelerator.scaler.get_scale())  # ready for the next step, at the scale that it had
    optimizer.zero_grad()
    return StepResult(loss_value, norm_value, clip_losses, is_skipped)


class StepResult(NamedTuple):
    """What came of one optimizer step."""

    loss: float  # a mean over the clips of all ranks; that of the batches done where it was broken off
    grad_norm: float  # before clipping
    clip_losses: list[torch.Tensor]  # (B,) of each batch of this rank, on the device
    is_skipped: bool


def held_between_steps(optimizer: torch.optim.Optimizer, average: WeightAverage | None) -> list[torch.Tensor]:
    """What a training keeps besides the model: the optimizer's states, and the moving average."""
    return [*tensors_in(optimizer.state), *(average.tensors() if average else ())]


@torch.no_grad()
def are_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether every number in them is one."""
    return bool(torch.stack([part_of(parameter).isfinite().all() for parameter in parameters]).all())

"""Clips and captions → a prepared set; only what is new or changed is encoded.

The text encoder works first and leaves the memory before the VAE comes. While the VAE encodes one clip, other
processes decode the next and a thread writes the last. Several processes (`accelerate launch`) share out the clips,
and each writes what it encodes; at the end they tell each other, and one of them writes the index.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from cogvideox_factory.config import DataOptions, EncodingOptions, Prepare, UserError
from cogvideox_factory.data.clips import Clip, read_clips
from cogvideox_factory.data.decoding import decode_ahead
from cogvideox_factory.data.excerpts import Excerpt, View, read_excerpts
from cogvideox_factory.data.files import hash_of, make_output_folder, remove_unfinished
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.data.video import FrameRequest, VideoError
from cogvideox_factory.memory.text_encoder import place_text_encoder
from cogvideox_factory.model.device import default_device, free_memory
from cogvideox_factory.model.encoders import TextEncoder, VideoEncoder
from cogvideox_factory.model.family import Checkpoint, open_checkpoint
from cogvideox_factory.progress import progress_bar
from cogvideox_factory.ranks import share_requests, together
from cogvideox_factory.resolve import check_text_length, resolve_data_options
from cogvideox_factory.stopping import StopRequest, stop_requests

logger = logging.getLogger(__name__)

# Raised by hand whenever the same inputs come to give other tensors, or the index another form.
FORMAT = 4
# Within an operation that all processes take part in. Work that takes longer is waited for in `ranks.together`.
PATIENCE = datetime.timedelta(minutes=30)
WRITES_IN_FLIGHT = 2
STOPPED = "stopped while encoding clips, all that are done are kept; start again to go on"


@dataclass
class Outcome:
    """What became of one clip of the data set."""

    source: str
    entries: list[Entry] = field(default_factory=list)  # one an excerpt; their keys are given at the end
    reason: str | None = None  # why the clip cannot be used
    was_encoded: bool = False  # rather than found in the set


def run(options: Prepare) -> None:
    """The `prepare` command."""
    assert options.output_dir is not None
    checkpoint = open_checkpoint(options.model)
    check_text_length(checkpoint, options.encoding.max_sequence_length)
    data = replace(options.data, **resolve_data_options(options.data, checkpoint))
    read_clips(data)  # what is wrong with the data set as a whole is said before a folder is made
    make_output_folder(options.output_dir)
    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    with stop_requests() as stop:
        share_requests(stop)
        prepared = PreparedSet(options.output_dir)
        prepare(checkpoint, data, options.encoding, prepared, default_device(), stop)


def prepare(
    checkpoint: Checkpoint,
    data: DataOptions,
    encoding: EncodingOptions,
    prepared: PreparedSet,
    device: torch.device,
    stop: StopRequest,
) -> list[Entry]:
    """Bring a prepared set up to date with its clips, and give its entries.

    `data` has its buckets and rate resolved (see `resolve_data_options`). Raises UserError where no clip is left, or
    where one cannot be used and `data.strict` is set; Stopped after a signal, with all that is encoded kept.
    """
    processes = PartialState()
    clips = read_clips(data)
    if processes.is_main_process:
        remove_unfinished(prepared.folder)
    mine = range(processes.process_index, len(clips), processes.num_processes)
    names = Names(checkpoint, encoding, device)
    outcomes = {index: Outcome(clips[index].source or "(no name)") for index in mine}
    with together(stop):
        excerpts = _read_clips({index: clips[index] for index in mine}, outcomes, data, names, stop)
        captions = dict.fromkeys(excerpt.clip.caption for excerpt in excerpts.values())
        encode_prompts(checkpoint, encoding, prepared, ["", *captions], device, stop)
        _encode_clips(checkpoint, encoding, prepared, excerpts, outcomes, data, names, device, stop)

    everywhere: dict[int, Outcome] = dict(sorted(gather_object(list(outcomes.items()))))
    entries = list(_with_keys(everywhere.values()))
    with together(stop):
        if processes.is_main_process:
            _write_index(prepared, entries, everywhere.values(), data, names)
    if not entries:
        first = everywhere[0]
        raise UserError(
            f"--data_root {data.data_root}: no usable clip among {len(clips)}; the first: {first.source}: "
            f"{first.reason}"
        )
    return entries


def check_prepared(checkpoint: Checkpoint, prepared: PreparedSet) -> dict[str, Any]:
    """Settings of a prepared set that fits the checkpoint. Raises UserError where it was made with other encoders."""
    settings = prepared.read_settings()
    if settings.get("format") != FORMAT:
        raise UserError(f"{prepared.folder} was prepared by another version of this program; run `prepare` again")
    for component in ("vae", "text_encoder", "tokenizer"):
        if settings.get(component) != checkpoint.fingerprint(component):
            raise UserError(
                f"{prepared.folder} was prepared with another {component} than that of {checkpoint.name}; run "
                "`prepare` again with this model"
            )
    if checkpoint.is_image_to_video and not settings.get("num_image_draws"):
        raise UserError(
            f"{prepared.folder} was prepared for a text-to-video model and lacks the first frames; run `prepare` "
            f"again with {checkpoint.name}, the clips are not encoded twice"
        )
    return settings


class Names:
    """File names in a prepared set, each a hash of all that its tensors depend on."""

    def __init__(self, checkpoint: Checkpoint, encoding: EncodingOptions, device: torch.device):
        self.num_image_draws = encoding.num_image_draws if checkpoint.is_image_to_video else 0
        self.settings: Mapping[str, Any] = {
            "format": FORMAT,
            "vae": checkpoint.fingerprint("vae"),
            "text_encoder": checkpoint.fingerprint("text_encoder"),
            "tokenizer": checkpoint.fingerprint("tokenizer"),
            "dtype": str(checkpoint.dtype_for(encoding.dtype, device)),
            "tiling": encoding.use_tiling,
            "max_sequence_length": encoding.max_sequence_length or checkpoint.max_text_tokens,
        }

    def prompt(self, prompt: str) -> str:
        parts = ("format", "text_encoder", "tokenizer", "dtype", "max_sequence_length")
        return PreparedSet.prompt_file(hash_of(prompt, *(self.settings[part] for part in parts)))

    def latents(self, excerpt: Excerpt, view: View) -> str:
        return PreparedSet.latents_file(self._of_view(excerpt, view, excerpt.times))

    def image(self, excerpt: Excerpt, view: View) -> str:
        return PreparedSet.image_file(hash_of(self._of_view(excerpt, view, excerpt.times[:1]), self.num_image_draws))

    def entry(self, excerpt: Excerpt) -> Entry:
        clip = excerpt.clip
        files = {
            "latents": tuple(self.latents(excerpt, view) for view in excerpt.views),
            "prompt": (self.prompt(clip.caption),),
        }
        if self.num_image_draws:
            files["images"] = tuple(self.image(excerpt, view) for view in excerpt.views)
        return Entry(clip.source, clip.caption, excerpt.bucket, files, "", round(float(excerpt.times[0]), 3))

    def _of_view(self, excerpt: Excerpt, view: View, times: np.ndarray) -> str:
        parts = [self.settings[part] for part in ("format", "vae", "dtype", "tiling")]
        frame_choice = [round(float(time), 6) for time in times]
        size = (*excerpt.bucket[1:], *excerpt.scaled_size)
        return hash_of(excerpt.content, frame_choice, size, view, *parts)


def _read_clips(
    clips: Mapping[int, Clip],
    outcomes: Mapping[int, Outcome],
    data: DataOptions,
    names: Names,
    stop: StopRequest,
) -> dict[tuple[int, int], Excerpt]:
    """Excerpts of the usable clips, by numbers of clip and excerpt; what becomes of each clip is noted."""
    assert data.fps is not None
    excerpts: dict[tuple[int, int], Excerpt] = {}
    slow: list[str] = []
    for index, clip in progress_bar(clips.items(), "Reading clips", "clip", is_silent=_is_silent()):
        stop.check("stopped while reading clips; start again to go on")
        try:
            found = read_excerpts(clip, data)
        except (VideoError, OSError) as error:
            _skip(outcomes[index], error, data.strict)
            continue
        excerpts |= {(index, number): excerpt for number, excerpt in enumerate(found)}
        outcomes[index].entries = [names.entry(excerpt) for excerpt in found]
        if found[0].repeats_frames(data.fps):
            slow.append(clip.source)
    if slow:
        logger.warning(
            "%d clips have fewer frames a second than --fps %g, so frames are repeated; the first: %s",
            *(len(slow), data.fps, slow[0]),
        )
    return excerpts


def encode_prompts(
    checkpoint: Checkpoint,
    encoding: EncodingOptions,
    prepared: PreparedSet,
    prompts: Sequence[str],
    device: torch.device,
    stop: StopRequest,
) -> dict[str, str]:
    """File in the set of each distinct prompt; the text encoder is loaded only if one is missing."""
    names = Names(checkpoint, encoding, device)
    files = {prompt: names.prompt(prompt) for prompt in prompts}
    missing = {prompt: file for prompt, file in files.items() if not prepared.has_whole(file)}
    if missing:
        dtype = checkpoint.dtype_for(encoding.dtype, device)
        encoder = TextEncoder.load(
            *(checkpoint, encoding.max_sequence_length, dtype, device),
            lambda text_encoder, device: place_text_encoder(text_encoder, encoding, device),
        )
        for prompt, file in progress_bar(missing.items(), "Encoding captions", "caption", is_silent=_is_silent()):
            prepared.write_tensors(file, {"prompt_embeds": encoder.encode(prompt)})
            stop.check("stopped while encoding captions; start again to go on")
        del encoder
        free_memory()
    return files


def _encode_clips(
    checkpoint: Checkpoint,
    encoding: EncodingOptions,
    prepared: PreparedSet,
    excerpts: Mapping[tuple[int, int], Excerpt],
    outcomes: Mapping[int, Outcome],
    data: DataOptions,
    names: Names,
    device: torch.device,
    stop: StopRequest,
) -> None:
    """Encode what the set does not have yet."""
    # By files: a clip that is listed twice or copied is decoded and encoded once.
    jobs: dict[tuple[str, ...], list[tuple[int, int]]] = collections.defaultdict(list)
    for place in excerpts:
        files = _tensor_files(outcomes, place)
        if not all(map(prepared.has_whole, files)):
            jobs[files].append(place)
    if not jobs:
        return
    bar = progress_bar(None, "Encoding clips", "clip", len(jobs), is_silent=_is_silent())

    def requests() -> Iterator[tuple[tuple[str, ...], FrameRequest]]:
        for files, places in jobs.items():
            is_lost = any(outcomes[index].reason for index, _ in places)  # another excerpt of the clip was broken
            if is_lost or all(map(prepared.has_whole, files)):  # another process may have been here meanwhile
                bar.update()
                continue
            yield files, excerpts[places[0]].request

    encoder: VideoEncoder | None = None  # loaded for the first clip that can be decoded
    with (
        bar,
        _Writer(prepared) as writer,
        contextlib.closing(decode_ahead(requests(), data.num_decode_workers)) as decoded,
    ):
        for files, frames in decoded:
            places = jobs[files]
            if isinstance(frames, Exception):
                stop.check(STOPPED)  # whoever stops the program may have stopped the decoder
                for index, _ in places:
                    if outcomes[index].reason is None:
                        _skip(outcomes[index], frames, data.strict)
            else:
                encoder = encoder or VideoEncoder.load(
                    checkpoint,
                    checkpoint.dtype_for(encoding.dtype, device),
                    device,
                    use_tiling=encoding.use_tiling,
                )
                for file, tensors in _encode_excerpt(encoder, excerpts[places[0]], frames, prepared, names):
                    writer.write(file, tensors)
                outcomes[places[0][0]].was_encoded = True
            del frames  # before the next ones come
            bar.update()
            stop.check(STOPPED)
    del encoder
    free_memory()


def _encode_excerpt(
    encoder: VideoEncoder, excerpt: Excerpt, frames: np.ndarray, prepared: PreparedSet, names: Names
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Name and tensors of every file of an excerpt that the set lacks."""
    for view in dict.fromkeys(excerpt.views):
        pixels = excerpt.see(frames, view)
        file = names.latents(excerpt, view)
        if not prepared.has_whole(file):
            yield file, _distribution(*encoder.encode(pixels))
        if not names.num_image_draws:
            continue
        file = names.image(excerpt, view)
        if not prepared.has_whole(file):
            # Keyed by the file's name, which is its content: the same noise whenever it is made.
            generator = torch.Generator().manual_seed(int(hash_of(file)[:15], 16))
            tensors = _distribution(*encoder.encode_noised_images(pixels[0], names.num_image_draws, generator))
            yield file, {**tensors, "first": encoder.encode(pixels[:1])[0][:, 0].cpu()}


def _distribution(mean: torch.Tensor, logvar: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean": mean.cpu(), "logvar": logvar.cpu()}


def _tensor_files(outcomes: Mapping[int, Outcome], place: tuple[int, int]) -> tuple[str, ...]:
    """Files of an excerpt that the VAE makes."""
    files = outcomes[place[0]].entries[place[1]].files
    return tuple(dict.fromkeys((*files["latents"], *files.get("images", ()))))


class _Writer(contextlib.AbstractContextManager["_Writer"]):
    """Writes tensors in a thread, a few in flight; what goes wrong is raised by a later call, or at the end."""

    def __init__(self, prepared: PreparedSet):
        self.prepared = prepared
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.pending: collections.deque[Future[None]] = collections.deque()

    def write(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.pending.append(self.pool.submit(self.prepared.write_tensors, file, tensors))
        while len(self.pending) > WRITES_IN_FLIGHT:
            self.pending.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.pool.shutdown()  # after an error too: what is encoded is kept
        if kind is None:
            for write in self.pending:
                write.result()


def _with_keys(outcomes: Iterable[Outcome]) -> Iterator[Entry]:
    """Entries of all usable clips, in the data set's order, with their keys."""
    seen: collections.Counter[str] = collections.Counter()
    for outcome in outcomes:
        if outcome.reason is not None:
            continue
        for entry in outcome.entries:
            content = hash_of(sorted(entry.files.items()))
            # A clip that is listed again, to weigh more, has random numbers of its own.
            yield replace(entry, key=hash_of(content, seen[content]))
            seen[content] += 1


def _write_index(
    prepared: PreparedSet,
    entries: Sequence[Entry],
    outcomes: Collection[Outcome],
    data: DataOptions,
    names: Names,
) -> None:
    skipped = [outcome for outcome in outcomes if outcome.reason is not None]
    encoded = sum(outcome.was_encoded for outcome in outcomes if outcome.reason is None)
    counts = {
        "clips": len(outcomes),
        "encoded": encoded,
        "reused": len(outcomes) - len(skipped) - encoded,
        "skipped": [{"path": outcome.source, "reason": outcome.reason} for outcome in skipped],
    }
    prepared.write_json("report.json", counts)
    if entries:
        settings = {
            **names.settings,
            "id_token": data.id_token,  # stands in the captions already; told by the model card
            "fps": data.fps,
            "num_image_draws": names.num_image_draws,
            "empty_prompt": names.prompt(""),
        }
        prepared.write_index(entries, settings)
        logger.info(
            "%d clips: %d encoded, %d reused, %d skipped → %s",
            *(counts["clips"], encoded, counts["reused"], len(skipped), prepared.folder),
        )


def _skip(outcome: Outcome, error: Exception, strict: bool) -> None:
    outcome.reason = str(error)
    if strict:
        raise UserError(f"{outcome.source}: {error} (--strict stops at the first clip that cannot be used)")
    logger.warning("skipped %s: %s", outcome.source, error)


def _is_silent() -> bool:
    """Whether this is one of several processes of which another draws the bars."""
    return not PartialState().is_main_process

"""Kills, stops, fills and damages runs of `prepare` and `train`, and looks whether anything was lost.

    python tools/fault_injection.py --output benchmarks/results/fault_injection.json --page docs/reliability.md

Every round is a tiny run to which one thing happens. Then the same command is given again, without the fault. The
round is survived if the run then ends with what a run ends with to which nothing happens, byte for byte: the prepared
set, the trained weights, the optimizer's state, the metrics without gap or repeat. Where the program refuses to go on,
it must say so in one message that names the file, and go on once that message is followed. Anything else is lost: a
traceback, a hang, another result.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from faulty_disk import FaultyDisk
from forked_runs import Lost, fork, last_line, log_through_a_pipe, run_to_its_end, wait
from run_content import compare, content_of_prepared, content_of_run

import cogvideox_factory.planning.before_training
import cogvideox_factory.prepare
import cogvideox_factory.report
import cogvideox_factory.training.loop
from cogvideox_factory.command_line import parse_command
from cogvideox_factory.config import COMMANDS
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.demo.world import PROMPTS, render_clips

NUM_CLIPS, NUM_STEPS, STOPPED_AFTER = 4, 12, 8
DAMAGED = {"prepare": "the prepared set", "train": "the newest checkpoint"}
SLOW_SECONDS = 0.002  # a piece, of which there are hundreds
BEGIN, END = "<!-- fault injection: begin -->", "<!-- fault injection: end -->"
FAULTS = {
    "kill": "kill -9 at a random moment",
    "kill_writing": "kill -9 inside a file that a slow disk writes",
    "sigterm": "SIGTERM at a random moment",
    "sigint": "Ctrl-C at a random moment",
    "sigusr1": "SIGUSR1 at a random moment",
    "full": "disk full from a random write on",
    "tmpfs": "small tmpfs that is full",
    "file_size": "limit of a file's size",
    "damage": "a bit flipped in every region of every file of {}",
    "truncate": "a file of {} cut short",
    "delete": "a file of {} deleted",
}
SIGNALS = {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigusr1": signal.SIGUSR1}


@dataclass
class Round:
    """What was done to a run, and what became of it."""

    command: str
    fault: str
    detail: str
    codes: list[int] = field(default_factory=list)  # exit codes; minus the signal's number where one ended it
    lost: str | None = None  # why; None: survived


class Bench:
    """The model, the clips, and the runs to which nothing happens."""

    def __init__(self, work: Path, seed: int):
        self.work, self.random = work, random.Random(seed)
        self.model, self.clips, self.prepared = work / "model", work / "clips", work / "prepared"
        self.numbers = iter(range(10**6))
        self._in_child(self._make_inputs)
        self.expected: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.num_pieces: dict[str, int] = {}
        for command, folder in (("prepare", self.prepared), ("train", work / "trained" / "run")):
            self._reference(command, folder, lambda: None, on_time=functools.partial(self.seconds.__setitem__, command))
            self.expected[command] = self.content(command, folder)
            self.num_pieces[command] = self._count_pieces(command)
        self.stopped = self._stopped_run()

    def _in_child(self, work: Callable[[], None]) -> None:
        """Libraries start threads when they work, and a process with threads must not fork."""
        child = os.fork()
        if not child:
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            raise SystemExit("the inputs could not be made")

    def _make_inputs(self) -> None:
        build_tiny_pipeline(seed=0, num_layers=2).save_pretrained(self.model)
        render_clips(self.clips)
        names = (self.clips / "videos.txt").read_text().splitlines()[:NUM_CLIPS]
        (self.clips / "videos.txt").write_text("\n".join(names))
        (self.clips / "prompts.txt").write_text("\n".join(PROMPTS[:NUM_CLIPS]))

    def _reference(self, command: str, folder: Path, before: Callable[[], None], **watch: Any) -> None:
        log = self.work / f"reference-{command}.log"
        if run_to_its_end(self.arguments(command, folder), log, before, **watch):
            raise SystemExit(f"{command} fails without any fault:\n{log.read_text()}")

    def _count_pieces(self, command: str) -> int:
        folder, count = self.new_folder(command), self.work / f"{command}-pieces"

        def before() -> None:
            disk = FaultyDisk(folder)
            disk.install()
            take = disk.take

            def take_and_tell() -> None:
                take()
                with contextlib.suppress(OSError):
                    count.write_text(str(disk.num_pieces))

            disk.take = take_and_tell  # type: ignore[method-assign]

        self._reference(command, folder, before)
        compare(self.content(command, folder), self.expected[command])
        return int(count.read_text())

    def _stopped_run(self) -> Path:
        """A training that was stopped at two thirds of its way, with the checkpoints that it then has."""
        folder = self.new_folder("train")

        def before() -> None:
            log = cogvideox_factory.training.loop.MetricsLog
            write = log.write

            def write_and_stop(self: Any, **values: Any) -> None:
                write(self, **values)
                if values.get("step") == STOPPED_AFTER and "lr" in values:
                    signal.raise_signal(signal.SIGTERM)

            log.write = write_and_stop  # type: ignore[method-assign]

        log = self.work / "stopped.log"
        if run_to_its_end(self.arguments("train", folder), log, before) != 75:
            raise SystemExit(f"a stopped training does not end with exit code 75:\n{log.read_text()}")
        return folder

    def new_folder(self, command: str, within: Path | None = None) -> Path:
        """For the output of a round. All have the same name, which stands in the model card."""
        return (within or self.work / f"round-{next(self.numbers):05}") / ("run" if command == "train" else "set")

    def content(self, command: str, folder: Path) -> dict[str, Any]:
        try:
            return content_of_run(folder, NUM_STEPS) if command == "train" else content_of_prepared(folder)
        except (OSError, ValueError) as error:
            raise Lost(f"ends without its result: {error}") from error

    def arguments(self, command: str, folder: Path, prepared: Path | None = None) -> list[str]:
        shared = [command, "--pretrained_model_name_or_path", str(self.model), "--output_dir", str(folder)]
        if command == "prepare":
            shared += ["--frame_buckets", "9", "--max_sequence_length", "16"]  # few tokens, of which a step is made
            return [*shared, "--data_root", str(self.clips), "--num_decode_workers", "1"]
        shared += ["--data_root", str(prepared or self.prepared), "--load_tensors", "--report_to", "none"]
        shared += ["--rank", "4", "--lora_alpha", "4", "--learning_rate", "1e-2", "--ema_decay", "0.9"]
        shared += ["--max_train_steps", str(NUM_STEPS), "--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
        shared += ["--checkpointing_steps", "3", "--checkpoints_total_limit", "2", "--validation_fraction", "0.25"]
        shared += ["--validation_loss_steps", "6"]
        return [*shared, "--resume_from_checkpoint", "latest"]

    def again(self, command: str, folder: Path, prepared: Path | None = None) -> list[str]:
        """The same command; for a training in turn the one that it names itself when it is stopped."""
        config = folder / "config.yaml"
        if command == "train" and config.exists() and self.random.random() < 0.5:
            # A copied run has the folder of its original in there.
            return ["train", "--config", str(config), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
        return self.arguments(command, folder, prepared)

    # Rounds

    def go_on(self, round: Round, command: str, folder: Path, log: Path, prepared: Path | None = None) -> None:
        """The same command without the fault, which must end with the reference's content."""
        if log.exists() and "Traceback" in log.read_text():
            raise Lost(f"a traceback: {last_line(log)}")
        code = run_to_its_end(self.again(command, folder, prepared), log)
        round.codes.append(code)
        if code:
            raise Lost(f"does not go on, exit code {code}: {last_line(log)}")
        compare(self.content(command, folder), self.expected[command])

    def interrupt(self, round: Round, folder: Path, log: Path, position: float) -> None:
        """A signal after a share of the processor time that the run takes."""
        moment = position * self.seconds[round.command]
        round.detail = f"after {moment:.2f} s"
        child = fork(self.arguments(round.command, folder), log, lambda: None)
        code = wait(child, moment)
        if code is None:
            os.kill(child, SIGNALS[round.fault])
            code = wait(child)
        assert code is not None
        round.codes.append(code)
        # 130: Ctrl-C before there is anything to save; and then a signal ends a process as it always does.
        if code not in (0, 75, 130, -SIGNALS[round.fault]):
            raise Lost(f"exit code {code}: {last_line(log)}")

    def fail_to_write(self, round: Round, folder: Path, log: Path, position: float) -> None:
        """A disk that kills, or is full, from a piece on."""
        piece = int(position * self.num_pieces[round.command])
        round.detail = f"at piece {piece} of {self.num_pieces[round.command]}"
        disk = FaultyDisk(folder, full_from_piece=piece)
        if round.fault == "kill_writing":
            disk = FaultyDisk(folder, SLOW_SECONDS, killed_at_piece=piece)
        code = run_to_its_end(self.arguments(round.command, folder), log, disk.install)
        round.codes.append(code)
        if round.fault == "full" and code not in (1, 2):
            raise Lost(f"a full disk gives exit code {code}")
        if round.fault == "full" and "No space left" not in log.read_text():
            raise Lost(f"a full disk is not told: {last_line(log)}")

    def limit_file_size(self, round: Round, folder: Path, log: Path, position: float) -> None:
        files = [path for path in self.reference_folder(round.command).rglob("*") if path.is_file()]
        largest = max(path.stat().st_size for path in files)
        limit = int(position * largest)
        round.detail = f"{limit} of {largest} bytes"
        soft_and_hard = (limit, resource.RLIM_INFINITY)
        # Python ignores the signal, so that writing fails with EFBIG. The log is a file too, so its lines go to a pipe.
        code = run_to_its_end(
            *(self.arguments(round.command, folder), log),
            lambda: (log_through_a_pipe(log), resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)),
        )
        round.codes.append(code)
        if code not in (1, 2) or "File too large" not in log.read_text():
            raise Lost(f"exit code {code}: {last_line(log)}")

    def fill_tmpfs(self, round: Round, folder: Path, log: Path, position: float) -> None:
        disk = folder.parent
        files = [path for path in self.reference_folder(round.command).rglob("*") if path.is_file()]
        used = sum(path.stat().st_size for path in files)
        size = max(1, int(position * used / 4096)) * 4096
        round.detail = f"{size // 1024} KiB, where {used // 1024} are needed"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        code = run_to_its_end(self.arguments(round.command, folder), log)
        round.codes.append(code)
        subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
        if code not in (0, 1, 2) or (code and "No space left" not in log.read_text()):
            raise Lost(f"exit code {code}: {last_line(log)}")

    def reference_folder(self, command: str) -> Path:
        return self.prepared if command == "prepare" else self.work / "trained" / "run"

    def damage_checkpoint(self, round: Round, file: str, position: float) -> None:
        """The newest checkpoint of a stopped run is damaged; what an earlier one holds suffices to go on."""
        folder, log = self.new_folder("train"), self.work / "damage.log"
        log.unlink(missing_ok=True)
        shutil.copytree(self.stopped, folder)
        name = f"step-{STOPPED_AFTER:08}"
        round.detail = f"{file}: {damage(folder / 'checkpoints' / name / file, round.fault, position, self.random)}"
        code = run_to_its_end(self.arguments("train", folder), log)
        round.codes.append(code)
        if code:
            self._check_refusal(code, log, name)
            shutil.rmtree(folder / "checkpoints" / name)
            self.go_on(round, "train", folder, log)
        elif name not in log.read_text():
            raise Lost("the damage is not told")
        compare(self.content("train", folder), self.expected["train"])
        shutil.rmtree(folder.parent)

    def damage_prepared(self, round: Round, file: str, position: float) -> None:
        """A training reads a damaged set: it refuses, and `prepare` mends the set as the message says."""
        folder, log = self.new_folder("train"), self.work / "damage.log"
        log.unlink(missing_ok=True)
        prepared = self.new_folder("prepare", folder.parent)
        shutil.copytree(self.prepared, prepared)
        round.detail = f"{file}: {damage(prepared / file, round.fault, position, self.random)}"
        code = run_to_its_end(self.arguments("train", folder, prepared), log)
        round.codes.append(code)
        if code:
            self._check_refusal(code, log, file.rpartition("/")[2])
            if "delete" in log.read_text():
                (prepared / file).unlink(missing_ok=True)
            self.go_on(round, "prepare", prepared, log)
            self.go_on(round, "train", folder, log, prepared)
        compare(self.content("train", folder), self.expected["train"])
        shutil.rmtree(folder.parent)

    def _check_refusal(self, code: int, log: Path, name: str) -> None:
        text = log.read_text()
        if code not in (1, 2) or "Traceback" in text:
            raise Lost(f"no clear message, exit code {code}: {last_line(log)}")
        if name not in text.splitlines()[-1]:
            raise Lost(f"the message does not name {name}: {last_line(log)}")

    def rounds(self, commands: Sequence[str], faults: Sequence[str], number: int) -> Iterator[Round]:
        """All rounds that are asked for, each after it was done."""
        strike = {
            **dict.fromkeys(SIGNALS, self.interrupt),
            **dict.fromkeys(("kill_writing", "full"), self.fail_to_write),
            "tmpfs": self.fill_tmpfs,
            "file_size": self.limit_file_size,
        }
        for command in commands:
            for fault in faults:
                times = number if fault.startswith("kill") else max(1, number // 4)
                if fault in strike:
                    for index in range(times):
                        yield self._try(command, fault, strike[fault], (index + self.random.random()) / times)
                else:
                    yield from self._damages(command, fault, times)

    def _try(self, command: str, fault: str, strike: Callable[..., None], position: float) -> Round:
        round = Round(command, fault, "")
        folder = self.new_folder(command)
        folder.parent.mkdir(parents=True)
        log = self.work / "round.log"
        log.unlink(missing_ok=True)
        try:
            strike(round, folder, log, position)
            self.go_on(round, command, folder, log)
        except Lost as lost:
            round.lost = str(lost)
        finally:
            if fault == "tmpfs" and os.path.ismount(folder.parent):
                subprocess.run(["umount", str(folder.parent)], check=True)
        if round.lost is None:
            shutil.rmtree(folder.parent, ignore_errors=True)
        return round

    def _damages(self, command: str, fault: str, number: int) -> Iterator[Round]:
        """For prepare, of one file of each kind in its set; for train, of every file of a checkpoint."""
        if command == "train":
            newest = self.stopped / "checkpoints" / f"step-{STOPPED_AFTER:08}"
            files, strike = sorted(path.name for path in newest.iterdir()), self.damage_checkpoint
        else:
            entry = json.loads((self.prepared / "index.jsonl").read_text().splitlines()[0])
            empty_prompt = json.loads((self.prepared / "settings.json").read_text())["empty_prompt"]
            files = ["index.jsonl", "settings.json", empty_prompt]
            files += [names[0] for _, names in sorted(entry["files"].items())]
            strike = self.damage_prepared
        num_regions = number if fault == "damage" else 1
        for file in files:
            for index in range(num_regions):
                round = Round(command, fault, file)
                try:
                    strike(round, file, (index + self.random.random()) / num_regions)
                except Lost as lost:
                    round.lost = str(lost)
                yield round


def damage(path: Path, kind: str, position: float, randomness: random.Random) -> str:
    """Damage a file at a share of its length; what was done."""
    content = bytearray(path.read_bytes())
    place = min(int(position * len(content)), len(content) - 1)
    if kind == "delete":
        path.unlink()
        return "deleted"
    if kind == "truncate":
        path.write_bytes(content[:place])
        return f"cut after {place} of {len(content)} bytes"
    bit = randomness.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)}"


# What is told of it


def table(result: dict[str, Any]) -> str:
    """Rows of the page: what was tried, how often, and what became of it."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for round in result["rounds"]:
        rows.setdefault((round["command"], round["fault"]), []).append(round)
    lines = ["| command | what happens | tried | survived | lost |", "|---|---|---|---|---|"]
    for (command, fault), rounds in rows.items():
        lost = sum(round["lost"] is not None for round in rounds)
        what = FAULTS[fault].format(DAMAGED[command])
        lines.append(f"| `{command}` | {what} | {len(rounds)} | {len(rounds) - lost} | {lost} |")
    lost = sum(round["lost"] is not None for round in result["rounds"])
    total = len(result["rounds"])
    lines.append(f"| | **all of them** | {total} | {total - lost} | **{lost}** |")
    where = f"{result['machine']}, torch {result['torch']}, {result['cpu_seconds']:.0f} s of processor time"
    return "\n".join([*lines, "", f"Run on {result['date']} ({where})."])


def with_table(page: str, result: dict[str, Any]) -> str:
    """A page with the table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}"


def added(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Earlier results with the rounds of some faults in place of those that they had."""
    anew = {(tried["command"], tried["fault"]) for tried in result["rounds"]}
    kept = [tried for tried in earlier["rounds"] if (tried["command"], tried["fault"]) not in anew]
    seconds = round(earlier["cpu_seconds"] + result["cpu_seconds"], 1)
    return {**result, "cpu_seconds": seconds, "rounds": [*kept, *result["rounds"]]}


def may_mount(folder: Path) -> bool:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", choices=("prepare", "train"), default=("prepare", "train"))
    parser.add_argument("--kinds", nargs="+", choices=tuple(FAULTS), default=tuple(FAULTS), help="of faults")
    parser.add_argument(
        "--rounds", type=int, default=20, help="of kills; a quarter as many of other faults, and regions of a file"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file of all rounds")
    parser.add_argument("--add", action="store_true", help="keep the rounds of other faults that --output has already")
    parser.add_argument("--page", type=Path, help="page whose table is to be written anew")
    parser.add_argument("--work", type=Path, help="folder that is kept; it holds the runs that were lost")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # What the program imports when it comes to it.
    assert diffusers.CogVideoXPipeline and transformers.T5EncoderModel and transformers.T5Tokenizer
    for command in ("prepare", "train"):
        parse_command(
            COMMANDS[command],
            command,
            ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", "o"],
        )
    gc.collect()
    gc.freeze()  # children then do not copy the libraries' objects
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            parser.error(f"--work {work}: is not empty")
        kinds = [kind for kind in options.kinds if kind != "tmpfs" or may_mount(work)]
        for kind in set(options.kinds) - set(kinds):
            print(f"left out: {FAULTS[kind]}; this user may not mount one")
        bench = Bench(work.absolute(), options.seed)
        print({command: f"{seconds:.1f} s" for command, seconds in bench.seconds.items()}, bench.num_pieces)
        rounds = []
        for round in bench.rounds(options.commands, kinds, options.rounds):
            rounds.append(round)
            outcome = "survived" if round.lost is None else f"LOST: {round.lost}"
            print(f"{round.command:8}{round.fault:14}{round.detail:60} {round.codes!s:16} {outcome}", flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "seed": options.seed,
        "cpu_seconds": float(f"{used_by_children():.1f}"),
        "rounds": [asdict(round) for round in rounds],
    }
    if options.add and options.output:
        result = added(json.loads(options.output.read_text()), result)
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.page:
        options.page.write_text(with_table(options.page.read_text(), result))
    return 1 if any(round.lost for round in rounds) else 0


def used_by_children() -> float:
    """Processor time of all children that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())

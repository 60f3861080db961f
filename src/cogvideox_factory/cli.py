"""The commands. Whatever is heavy is imported by the command that needs it, so that --help answers at once.

Exit codes: 0 done; 2 the user's input is wrong (one message); 75 stopped by a signal, with the work saved; 1
something failed on the way.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cogvideox_factory import __version__, messages
from cogvideox_factory.command_line import configure_messages, overview, parse_command, print_error
from cogvideox_factory.config import (
    COMMANDS,
    Demo,
    Inspect,
    Plan,
    Prepare,
    Report,
    RunError,
    Sample,
    Train,
    UserError,
    nearest,
)
from cogvideox_factory.progress import bars_are_drawn
from cogvideox_factory.ranks import is_echo
from cogvideox_factory.redaction import without_secrets

logger = logging.getLogger(__name__)
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
}
EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED = 1, 2, 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code; parsing errors and --help exit by SystemExit, as argparse does."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    configure_messages(arguments)
    if name not in COMMANDS:
        print_error(f"unknown command {name}{nearest(name, list(COMMANDS))}; the commands: {', '.join(COMMANDS)}")
        return EXIT_USER_ERROR
    return run_guarded(lambda: run_command(name, arguments[1:]))


def run_command(name: str, arguments: Sequence[str]) -> None:
    options = parse_command(COMMANDS[name], name, arguments)
    with contextlib.nullcontext() if options.messages.log_level == "debug" else quiet_libraries():
        RUN[name](options)


def run_guarded(command: Callable[[], Any]) -> int:
    """Run a command; what goes wrong becomes a message and an exit code."""
    from cogvideox_factory.stopping import Stopped

    try:
        command()
    except UserError as error:
        if not is_echo(error):
            print_error(str(error))
        return EXIT_USER_ERROR
    except Stopped as stopped:
        if not is_echo(stopped):
            messages.tell(str(stopped))
        return EXIT_STOPPED
    except KeyboardInterrupt:
        messages.tell("interrupted; what was saved before is kept")
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
    except Exception as error:
        message = failure_message(error)
        if message is None:  # a fault of ours, which is reported best by its traceback
            if messages.are_json():
                logger.exception("%s: %s", type(error).__name__, error)
            else:
                print(without_secrets(traceback.format_exc()), file=sys.stderr)
        elif not is_echo(error):
            print_error(message)
        return EXIT_FAILED
    return 0


def failure_message(error: Exception) -> str | None:
    """What to tell a user of a failure that the machine or its files caused; None for any other."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        remedy = REMEDIES.get(error.errno or 0)
        return f"{message}; {remedy}, then start again: what was saved before is kept" if remedy else message
    if is_of_connection(error):
        reason = next(iter(str(error).strip().splitlines()), "")
        return (
            f"another process of this run has died or cannot be reached ({reason}); what it said itself tells why. Go "
            "on from the last checkpoint with --resume_from_checkpoint latest"
        )
    if isinstance(error, (RunError, SafetensorError)):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which must not be imported here for its name alone
        return (
            f"{error}\nWhat needs less memory: let --fit choose, within a smaller --gpu_memory than it has now; or "
            "smaller --height_buckets and --width_buckets, fewer --frame_buckets, --train_batch_size 1. By hand: "
            "--gradient_checkpointing, with it --offload_activations and, for a LoRA, --resident_blocks 2; "
            "--feed_forward_chunks 8, --use_tiling and --enable_tiling, --enable_model_cpu_offload"
        )
    return None


def is_of_connection(error: Exception) -> bool:
    """Whether this is how torch.distributed says that processes cannot reach each other any more."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or (type(error) is RuntimeError and "gloo" in str(error).lower())


def run_demo(options: Demo) -> None:
    from cogvideox_factory.demo import run

    run(options, main)


def run_inspect(options: Inspect) -> None:
    from cogvideox_factory.inspection import run

    run(options)


def run_prepare(options: Prepare) -> None:
    from cogvideox_factory.prepare import run

    run(options)


def run_plan(options: Plan) -> None:
    from cogvideox_factory.planning import run

    run(options)


def run_train(options: Train) -> None:
    from accelerate import PartialState

    from cogvideox_factory.planning.before_training import plan_training
    from cogvideox_factory.training.loop import train
    from cogvideox_factory.training.summary import tell_end

    planned = plan_training(options)
    try:
        run = train(*planned)
    except UserError:  # mostly said before anything is done: what is in the folder is not this run's
        raise
    except BaseException:
        _report_what_there_is(options.output_dir)
        raise
    if PartialState().is_main_process:  # not the variable RANK, which a user may have set for something else
        run_report(Report(run=(run,)))
        tell_end(run, was_shared=options.hub.push_to_hub)


def _report_what_there_is(run: Path | None) -> None:
    """The report of a run that was stopped or failed, which needs one most; whatever hinders it is less than why."""
    from accelerate import PartialState

    with contextlib.suppress(Exception):
        if run and PartialState().is_main_process and (run / "config.yaml").exists():
            run_report(Report(run=(run,)))


def run_sample(options: Sample) -> None:
    from cogvideox_factory.sampling import run

    made = run(options)
    if options.json:
        print(json.dumps(made, ensure_ascii=False))


def run_report(options: Report) -> None:
    from cogvideox_factory.report import write_comparison, write_report

    if len(options.run) == 1:
        logger.info("report     %s", write_report(options.run[0], options.output))
    else:
        logger.info("comparison %s", write_comparison(options.run, options.output))


RUN: dict[str, Callable[[Any], None]] = {
    "demo": run_demo,
    "inspect": run_inspect,
    "prepare": run_prepare,
    "plan": run_plan,
    "train": run_train,
    "sample": run_sample,
    "report": run_report,
}


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Of the libraries, only errors are shown.

    Their import-time notes (optional kernels that are not there, deprecations inside themselves) are no news to
    a user.
    """
    for library in ("torch.utils._pytree", "torchao", "torchao.kernel.intmm", "bitsandbytes", "DeepSpeed", "httpx2"):
        # The filter too, because importing some of them sets the level again; DeepSpeed writes to standard output.
        logging.getLogger(library).setLevel(logging.ERROR)
        logging.getLogger(library).addFilter(_only_errors)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if bars_are_drawn() else "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield

"""Uploads the result of a run to the Hugging Face Hub.

Only what others need leaves the machine: the weights, the model card, and the videos of the last validation. Never
checkpoints, prepared clips, logs, or config.yaml, which holds the paths of this machine. Rejected: uploading the
folder and naming what to leave out; what is new in a run's folder would then be public until someone names it.
"""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_factory.config import RunError, Train, UserError
from cogvideox_factory.model.adapters import LORA_FILE
from cogvideox_factory.run_folder import validation_folder

logger = logging.getLogger(__name__)
CARD_FILE = "README.md"


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub that takes our uploads. `api` holds the token."""

    api: Any
    name: str  # owner/name

    def upload(self, run: Path, step: int) -> None:
        """Upload the result of the run, whose last step is `step`, as one commit.

        Raises RunError where that fails; nothing of the run is lost, and the message says how to repeat it.
        """
        from huggingface_hub import CommitOperationAdd

        files = shared_files(run, step)
        operations = [CommitOperationAdd(file.relative_to(run).as_posix(), file) for file in files]
        try:
            self.api.create_commit(self.name, operations, commit_message=f"Result of {step} training steps")
        except Exception as error:  # of the HTTP client, of the transfer's Rust part, of files
            patterns = [part for pattern in shared_patterns(run, step) for part in ("--include", pattern)]
            command = shlex.join(["hf", "upload", self.name, str(run), ".", *patterns])
            raise RunError(
                f"the run in {run} is complete, but its upload to {self.name} failed ({_reason(error)}). To repeat "
                f"the upload: {command}"
            ) from error
        logger.info("uploaded   %s to %s/%s", f"{len(files)} files", self.api.endpoint, self.name)


def open_repository(options: Train) -> Repository | None:
    """The repository that the options name, made if it is new; None without --push_to_hub.

    Called before the training, so that a refusal costs minutes and not days. Raises UserError where there is no
    token, the Hub refuses it or cannot be reached, or the token may not write there.
    """
    if not options.hub.push_to_hub:
        return None
    assert options.output_dir is not None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    token = options.hub.hub_token
    api = HfApi(token=token.reveal() if token else None)
    name = options.hub.hub_model_id or options.output_dir.absolute().name
    try:
        owner = api.whoami()["name"]
        name = name if "/" in name else f"{owner}/{name}"
        private = True if options.hub.hub_private_repo else None  # None: as the owner's settings have it
        api.create_repo(name, private=private, exist_ok=True)
        api.auth_check(name, write=True)  # what exists is also found by a token that may only read
    except LocalTokenNotFoundError as error:
        raise UserError(
            "--push_to_hub: there is no token; log in with `hf auth login`, or set the variable HF_TOKEN"
        ) from error
    except Exception as error:
        raise UserError(
            f"--push_to_hub: cannot write to {name} at {api.endpoint} ({_reason(error)}); a token with the right to "
            "write is needed (`hf auth login`, or the variable HF_TOKEN), and --hub_model_id names the repository"
        ) from error
    return Repository(api, name)


def shared_files(run: Path, step: int) -> list[Path]:
    """The files of a run that are uploaded: a LoRA, or a whole pipeline; the model card; videos of the last step."""
    return sorted({file for pattern in shared_patterns(run, step) for file in run.glob(pattern) if file.is_file()})


def shared_patterns(run: Path, step: int) -> list[str]:
    """What is uploaded, as patterns of file names within the run's folder."""
    patterns = [CARD_FILE, f"{validation_folder(run, step).relative_to(run).as_posix()}/*.mp4"]
    if not (run / "model_index.json").is_file():
        return [LORA_FILE, *patterns]
    index = json.loads((run / "model_index.json").read_text(encoding="utf-8"))
    components = [name for name, value in index.items() if isinstance(value, list) and (run / name).is_dir()]
    return ["model_index.json", *(f"{name}/*" for name in components), *patterns]


def _reason(error: Exception) -> str:
    """What went wrong, as one line; the Hub's messages have several, with the address in one of their own."""
    return " ".join(str(error).split()) or type(error).__name__

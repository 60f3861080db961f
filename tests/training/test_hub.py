"""Uploads to a stand-in for the Hub on this machine: what arrives, what never leaves, and what a refusal does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from cogvideox_factory.config import HubOptions, RunError, Secret, Train, UserError
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.training.hub import open_repository, shared_files

Cli = Callable[..., tuple[int, str, str]]
TOKEN = "hf_never_to_be_told"
WEIGHTS = "pytorch_lora_weights.safetensors"


class Hub:
    """A web server that answers as the Hub does where an upload needs it, and keeps what it is sent."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}  # name → what was asked for when it was made
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # large files, by their hash
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses: dict[str, int] = {}  # part of an address → status
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append(self.path)
                status, content = 200, {}
                if "/storage/" not in self.path and self.path != "/api/validate-yaml":  # which take no token
                    hub.tokens.add(self.headers.get("Authorization"))
                    if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        status = 401
                refused = next((code for part, code in hub.refuses.items() if part in self.path), None)
                if refused or status != 200:
                    status, content = refused or status, {"error": "not allowed"}
                else:
                    content = hub.answer(self.path.partition("?")[0], body)
                payload = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.startswith("/storage/"):
            self.stored[path.removeprefix("/storage/")] = body
            return {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.stored[value["oid"]]
            return {"commitUrl": f"{self.address}/mouse/run/commit/1", "commitOid": "1"}
        content = json.loads(body or b"{}")
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            name = f"{content.get('organization') or 'mouse'}/{content['name']}"
            self.repositories[name] = content
            return {"url": f"{self.address}/{name}"}
        if "/preupload/" in path:
            modes = {
                file["path"]: "regular" if file["path"].endswith(("json", "md")) else "lfs" for file in content["files"]
            }
            return {
                "files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            }
        if path.endswith("/objects/batch"):
            actions = {
                item["oid"]: {"upload": {"href": f"{self.address}/storage/{item['oid']}"}}
                for item in content["objects"]
            }
            return {"objects": [{**item, "actions": actions[item["oid"]]} for item in content["objects"]]}
        return {"name": "mouse"} if path == "/api/whoami-v2" else {}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    hub.thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers have a protocol of their own
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.http.shutdown()
    hub.http.server_close()


def options(run: Path, **hub_options: Any) -> Train:
    return Train(output_dir=run, hub=HubOptions(**{"push_to_hub": True, "hub_token": Secret(TOKEN), **hub_options}))


def fill(run: Path, *files: str) -> None:
    for name in files:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(hashlib.sha256(name.encode()).hexdigest())


RUN = (
    *(WEIGHTS, "README.md", "config.yaml", "metrics.jsonl", "memory.json", "report.html"),
    *("checkpoints/step-00000004/trainable.safetensors", "prepared/index.jsonl", "prepared/latents/a.safetensors"),
    *("validation/step-00000000/prompt-00-video-0.mp4", "validation/step-00000004/prompt-00-video-0.mp4"),
    *("validation/step-00000004/prompts.json", "logs/run/events.out.tfevents", ".README.md.abc.part"),
)
SHARED = {WEIGHTS, "README.md", "validation/step-00000004/prompt-00-video-0.mp4"}


# --- what is uploaded ---


def test_what_arrives_are_the_shared_files_and_no_other(hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    fill(run, *RUN)
    repository = open_repository(options(run))
    assert repository and repository.name == "mouse/my-run" and not hub.files
    repository.upload(run, 4)
    assert hub.files == {name: (run / name).read_bytes() for name in SHARED}
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"}


def test_a_fine_tuned_model_is_uploaded_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    build_tiny_pipeline().save_pretrained(run)
    pipeline = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    fill(run, *(name for name in RUN if name != WEIGHTS))
    shared = {path.relative_to(run).as_posix() for path in shared_files(run, 4)}
    assert shared == pipeline | SHARED - {WEIGHTS}
    assert {"model_index.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors"} < shared


@pytest.mark.parametrize(
    ("given", "name"), [(None, "mouse/run"), ("mice", "mouse/mice"), ("studio/mice", "studio/mice")]
)
def test_the_repository_is_named_as_asked(hub: Hub, tmp_path: Path, given: str | None, name: str) -> None:
    for private in (False, True):
        repository = open_repository(options(tmp_path / "run", hub_model_id=given, hub_private_repo=private))
        assert repository and repository.name == name
        assert hub.repositories[name].get("visibility") == ("private" if private else None)
        assert f"/api/models/{name}/auth-check/write" in hub.requests


def test_the_token_of_the_environment_is_the_default(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_repository(options(tmp_path / "run", hub_token=None))


def test_without_push_to_hub_nobody_is_asked(hub: Hub, tmp_path: Path) -> None:
    assert open_repository(options(tmp_path / "run", push_to_hub=False)) is None
    assert hub.requests == []


# --- refusals ---


@pytest.mark.parametrize("part", ["whoami", "repos/create", "auth-check/write"])
def test_a_token_that_the_hub_refuses_is_told_before_anything_else(hub: Hub, tmp_path: Path, part: str) -> None:
    hub.refuses = {part: 403, "/api/models/mouse/run": 403}
    with pytest.raises(
        UserError, match=r"--push_to_hub: cannot write to (mouse/)?run at http://127.*right to write"
    ) as told:
        open_repository(options(tmp_path / "run"))
    assert TOKEN not in str(told.value)


def test_no_token_an_unreachable_hub_and_a_bad_name_are_told(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"there is no token; .*hf auth login.*HF_TOKEN"):
        open_repository(options(tmp_path / "run", hub_token=None))
    with pytest.raises(UserError, match="--hub_model_id"):
        open_repository(options(tmp_path / "my run!"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"cannot write to run at http://127.0.0.1:1 \("):
        open_repository(options(tmp_path / "run"))


def test_a_failed_upload_says_how_to_repeat_it_and_that_works(hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fill(run, *RUN)
    repository = open_repository(options(run))
    assert repository
    hub.refuses = {"/commit/": 403}
    with pytest.raises(RunError, match="is complete, but its upload to mouse/run failed") as told:
        repository.upload(run, 4)
    assert TOKEN not in str(told.value) and not hub.files
    assert all((run / name).exists() for name in RUN)
    hub.refuses = {}
    command = shlex.split(str(told.value).partition("To repeat the upload: ")[2])
    assert command[0] == "hf"
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    program = str(Path(sys.executable).parent / "hf")
    done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert hub.files == {name: (run / name).read_bytes() for name in SHARED}


# --- a whole run ---


def test_a_run_is_uploaded_and_the_token_is_nowhere(
    hub: Hub, cli: Cli, tiny_model: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "mice"
    command = (
        *("train", "--pretrained_model_name_or_path", tiny_model, "--data_root", prepared_folder, "--load_tensors"),
        *("--output_dir", run, "--rank", "4", "--train_batch_size", "2", "--max_train_steps", "2"),
        *("--validation_prompt", "a red square", "--num_inference_steps", "1", "--push_to_hub", "--hub_token", TOKEN),
    )
    hub.refuses = {"whoami": 401}
    code, output, messages = cli(*command)
    assert code == 2 and "--push_to_hub" in messages and "Traceback" not in messages
    assert not (run / "config.yaml").exists() and not (run / "checkpoints").exists()
    everything = output + messages

    hub.refuses = {"/commit/": 403}
    code, output, messages = cli(*command)
    assert code == 1 and "hf upload mouse/mice" in messages and "Traceback" not in messages
    assert (run / WEIGHTS).exists() and (run / "README.md").exists()
    everything += output + messages

    hub.refuses = {}  # a finished run that is started again has nothing left to do but this
    code, output, messages = cli(*command, "--resume_from_checkpoint", "latest")
    assert code == 0, messages
    everything += output + messages
    videos = {f"validation/step-00000002/{path.name}" for path in (run / "validation/step-00000002").glob("*.mp4")}
    assert len(videos) == 1
    assert hub.files == {name: (run / name).read_bytes() for name in {WEIGHTS, "README.md"} | videos}
    assert "mouse/mice" in hub.files["README.md"].decode()

    assert TOKEN not in everything
    files = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in files) and any("tfevents" in path.name for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert "push_to_hub: true" in (run / "config.yaml").read_text()
    for name, content in hub.files.items():  # nor is anything of this machine
        for private in (str(tmp_path), str(tiny_model.parent), str(prepared_folder), str(Path.home())):
            assert private.encode() not in content, name

"""The prepared set on disk: what was written comes back, what is broken is named, nothing is ever half there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvideox_factory.config import UserError
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.store import DamagedEntry, Entry, PreparedSet, hash_of, hash_of_file, write_durably


def files_in(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


# --- tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8], ids=str)
def test_tensors_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    tensors = {"mean": values, "logvar": values.transpose(0, 3), "scalar": torch.ones((), dtype=dtype), "none": values[:0]}
    prepared = PreparedSet(tmp_path)
    prepared.write_tensors("latents/a.safetensors", tensors)
    back = prepared.read_tensors("latents/a.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor)
    assert files_in(tmp_path) == {"latents/a.safetensors"}


def test_parts_of_one_tensor_come_back(tmp_path: Path) -> None:
    mean, logvar = torch.randn(1, 32, 2, 4, 4).chunk(2, dim=1)
    PreparedSet(tmp_path).write_tensors("a.safetensors", {"mean": mean, "logvar": logvar})
    back = PreparedSet(tmp_path).read_tensors("a.safetensors")
    assert torch.equal(back["mean"], mean) and torch.equal(back["logvar"], logvar)


def test_bfloat16_keeps_every_bit(tmp_path: Path) -> None:
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2**15 - 2**7, 500).astype(np.int16))
    PreparedSet(tmp_path).write_tensors("a.safetensors", {"x": bits.view(torch.bfloat16)})
    back = PreparedSet(tmp_path).read_tensors("a.safetensors")["x"]
    assert back.dtype == torch.bfloat16 and torch.equal(back.view(torch.int16), bits)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "cut in the header", "garbage", "header of zeros"])
def test_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    prepared = PreparedSet(tmp_path)
    file = prepared.latents_file("0123abcd")
    prepared.write_tensors(file, {"mean": torch.ones(100)})
    assert prepared.has(file)
    content = (tmp_path / file).read_bytes()
    replaced = {
        "empty": b"",
        "cut": content[:-7],
        "cut in the header": content[:20],
        "garbage": b"not a tensor file, but long enough to look like one" * 9,
        "header of zeros": bytes(len(content)),
    }
    if damage == "missing":
        (tmp_path / file).unlink()
        assert not prepared.has(file)
    else:
        (tmp_path / file).write_bytes(replaced[damage])
    with pytest.raises(DamagedEntry) as caught:
        prepared.read_tensors(file)
    assert str(tmp_path / file) in str(caught.value)


def test_files_of_a_key_are_apart(tmp_path: Path) -> None:
    latents, prompt = PreparedSet.latents_file("k1"), PreparedSet.prompt_file("k1")
    assert latents == "latents/k1.safetensors" and prompt == "prompts/k1.safetensors"


# --- writing durably


def test_write_durably_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    write_durably(path, b"one\x00two")
    assert path.read_bytes() == b"one\x00two"
    write_durably(path, b"three")
    assert path.read_bytes() == b"three"
    assert files_in(tmp_path) == {"new/folder/file.bin"}


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("existing", [True, False])
def test_write_that_fails_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool
) -> None:
    path = tmp_path / "file.bin"
    if existing:
        path.write_bytes(b"old")
    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="No space left"):
        write_durably(path, b"new")
    assert files_in(tmp_path) == ({"file.bin"} if existing else set())
    if existing:
        assert path.read_bytes() == b"old"


def test_content_is_flushed_to_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_size == 5 and not calls:
            calls.append("fsync of the content")
        fsync(descriptor)

    def watched_replace(source: Any, target: Any) -> None:
        assert Path(source).parent == path.parent, "a rename across file systems is no rename"
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_durably(path, b"12345")
    assert calls == ["fsync of the content", "replace"]


# --- index

ENTRIES = [
    Entry(
        source="videos/кошка №1.mp4",
        caption="кошка\u2028на крыше, 猫が歩く, \U0001f408 \x85 \"quoted\" \\ and\na line break",
        bucket=Bucket(49, 480, 720),
        files={"latents": "latents/a.safetensors", "prompt": "prompts/b.safetensors"},
        key="a" * 32,
    ),
    Entry(
        source="2.mp4",
        caption="",
        bucket=Bucket(9, 256, 256),
        files={"latents": "latents/c.safetensors", "prompt": "prompts/d.safetensors"},
        key="c" * 32,
    ),
]
SETTINGS: dict[str, Any] = {"fps": 8.0, "model": "модель", "empty": None, "dtype": "bf16", "nested": {"a": [1, 2]}}


@pytest.fixture
def written(tmp_path: Path) -> PreparedSet:
    prepared = PreparedSet(tmp_path / "set")
    prepared.write_index(ENTRIES, SETTINGS)
    return prepared


def test_index_comes_back(written: PreparedSet) -> None:
    back = PreparedSet(written.folder).read_index()
    assert back == ENTRIES
    assert all(isinstance(entry.bucket, Bucket) for entry in back)
    assert written.read_settings() == SETTINGS
    assert files_in(written.folder) == {"index.jsonl", "settings.json"}


def test_index_is_one_json_object_a_line(written: PreparedSet) -> None:
    lines = (written.folder / "index.jsonl").read_bytes().removesuffix(b"\n").split(b"\n")
    assert [json.loads(line)["caption"] for line in lines] == [entry.caption for entry in ENTRIES]
    assert "猫が歩く".encode() in lines[0], "captions stay readable in an editor"


def test_index_is_replaced_as_a_whole(written: PreparedSet) -> None:
    written.write_index(ENTRIES[1:], {"fps": 16.0})
    assert written.read_index() == ENTRIES[1:]
    assert written.read_settings() == {"fps": 16.0}


def test_index_never_stands_without_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target).name == "settings.json":
            refuse()
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="No space left"):
        PreparedSet(tmp_path).write_index(ENTRIES, SETTINGS)
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("missing", ["folder", "index.jsonl", "settings.json"])
@pytest.mark.parametrize("read", ["read_index", "read_settings"])
def test_folder_that_is_no_prepared_set(written: PreparedSet, missing: str, read: str) -> None:
    if missing == "folder":
        written = PreparedSet(written.folder / "nowhere")
    else:
        (written.folder / missing).unlink()
    with pytest.raises(UserError) as caught:
        getattr(written, read)()
    assert str(written.folder) in str(caught.value) and "prepare" in str(caught.value)


def without(name: str) -> str:
    line = {"source": "a", "caption": "b", "bucket": [9, 64, 64], "files": {}, "key": "k"}
    del line[name]
    return json.dumps(line)


@pytest.mark.parametrize(
    "line",
    [
        '{"source": "a.mp4", "capt',
        "5",
        "[]",
        '"text"',
        "null",
        without("caption"),
        without("bucket"),
        without("key"),
        '{"source": "a", "caption": "b", "bucket": [9, 64], "files": {}, "key": "k"}',
        '{"source": "a", "caption": "b", "bucket": null, "files": {}, "key": "k"}',
        '{"source": "a", "caption": "b", "bucket": [9, 64, 64], "files": {}, "key": "k", "surplus": 1}',
        "\xff",
    ],
)
def test_damaged_index_line(written: PreparedSet, line: str) -> None:
    path = written.folder / "index.jsonl"
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError) as caught:
        written.read_index()
    assert str(path) in str(caught.value)


def test_index_without_clips(written: PreparedSet) -> None:
    written.write_index([], SETTINGS)
    with pytest.raises(UserError, match="no clip"):
        written.read_index()


@pytest.mark.parametrize("content", [b"", b'{"fps": 8', b"\xff\xfe"])
@pytest.mark.parametrize("read", ["read_index", "read_settings"])
def test_damaged_settings(written: PreparedSet, content: bytes, read: str) -> None:
    (written.folder / "settings.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        getattr(written, read)()
    assert "settings.json" in str(caught.value)


# --- hashes


def test_hash_is_stable() -> None:
    # printf '["clip.mp4", {"a": 1, "b": 2}]' | sha256sum | cut -c1-32
    assert hash_of("clip.mp4", {"b": 2, "a": 1}) == "fd3794629dcb26b61a9bb2a20491511b"


def test_hash_differs_for_different_parts() -> None:
    different: list[tuple[Any, ...]] = [
        (),
        ("",),
        ("", ""),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (["ab", "c"],),
        (1,),
        ("1",),
        (1.5,),
        (True,),
        (None,),
        ("None",),
        ({"a": 1},),
        ({"a": 2},),
        ({"b": 1},),
        ("猫",),
        ("犬",),
    ]
    assert len({hash_of(*parts) for parts in different}) == len(different)


def test_hash_of_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "one").write_bytes(content)
    (tmp_path / "two").write_bytes(content[:-1] + b"\x00")
    assert hash_of_file(tmp_path / "one") == hashlib.sha256(content).hexdigest()[:32]
    assert hash_of_file(tmp_path / "one") != hash_of_file(tmp_path / "two")

"""A sealed folder, and every way to damage it."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from cogvideox_factory.data import manifest
from cogvideox_factory.data.manifest import MANIFEST, damage_of, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed folder with a large file, small ones, an empty one and one in a folder of its own."""
    content = random.Random(0).randbytes(40_000)
    (tmp_path / "engine/rank-0").mkdir(parents=True)
    (tmp_path / "weights.safetensors").write_bytes(content)
    (tmp_path / "state.json").write_text('{"step": 3}')
    (tmp_path / "engine/rank-0/states.pt").write_bytes(content[:5000])
    (tmp_path / "engine/latest").touch()
    seal(tmp_path)
    return tmp_path


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_was_sealed_is_whole(folder: Path) -> None:
    assert damage_of(folder) is None and damage_of(folder, is_quick=True) is None
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted(listed) == ["engine/latest", "engine/rank-0/states.pt", "state.json", "weights.safetensors"]
    for name, values in listed.items():
        content = (folder / name).read_bytes()
        assert values == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_changed_byte_anywhere_is_found_and_its_file_named(folder: Path) -> None:
    """One byte of each 4 KiB of a large file, of each 4 bytes of others and of the first 64: a header."""
    chance = random.Random(1)
    for path in files(folder):
        content = path.read_bytes()
        size = 4096 if len(content) > 4096 else 4
        regions = [*range(0, min(64, len(content)), 4), *range(64, len(content), size)]
        ends = [*regions[1:], len(content)]
        for start, end in zip(regions, ends, strict=False):
            offset = chance.randrange(start, end)
            damaged = bytearray(content)
            damaged[offset] ^= chance.randrange(1, 256)
            path.write_bytes(damaged)
            damage = damage_of(folder)
            assert damage is not None and path.relative_to(folder).as_posix() in damage, (path, offset)
        path.write_bytes(content)
    assert damage_of(folder) is None


def test_a_file_that_is_missing_cut_or_longer_is_named_even_at_a_quick_look(folder: Path) -> None:
    for path in files(folder):
        content, name = path.read_bytes(), path.relative_to(folder).as_posix()
        path.unlink()
        assert f"{name} is missing" in str(damage_of(folder, is_quick=True))
        lengths = (0, len(content) // 2, len(content) - 1) if content else ()
        others = [content + b"\n", *(content[:length] for length in lengths)]
        for other in others:
            path.write_bytes(other)
            assert name in str(damage_of(folder, is_quick=True)), (name, len(other))
        path.write_bytes(content)
    assert damage_of(folder) is None


NO_MANIFESTS = [b"", b"null", b"[]", b"\xff", b"[" * 9999]
NO_MANIFESTS += [b'{"files": 3}', b'{"files": {"a": 3}}', b'{"files": {"a": {"size": 1}}}']


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_damage(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert MANIFEST in str(damage_of(folder))


def test_a_manifest_that_says_the_same_in_other_bytes_is_damage(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert MANIFEST in str(damage_of(folder))


def test_only_the_named_files_are_looked_at_if_any_are(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"")
    assert damage_of(folder, ["state.json"]) is None
    assert damage_of(folder, ["state.json", "other"]) == f"other is not in {MANIFEST}"
    assert "weights.safetensors" in str(damage_of(folder, ["state.json", "weights.safetensors"]))


def test_what_others_put_beside_it_is_no_damage(folder: Path) -> None:
    (folder / "notes.txt").write_text("good one")
    assert damage_of(folder) is None


def test_hashes_known_from_writing_are_not_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    read = []
    digest = hashlib.file_digest

    def noted(file: BinaryIO, kind: str) -> Any:
        read.append(file.name)
        return digest(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(manifest.hashlib, "file_digest", noted)
    seal(tmp_path, {"a": hashlib.sha256(b"a").hexdigest()})
    assert read == [str(tmp_path / "b")]
    assert damage_of(tmp_path) is None
    seal(tmp_path, {"a": hashlib.sha256(b"b").hexdigest()})
    assert "a is not what was written" in str(damage_of(tmp_path))


def test_a_disk_that_cannot_read_is_damage_and_a_missing_right_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: OSError):
        def digest(*arguments: object) -> None:
            raise error

        return digest

    monkeypatch.setattr(manifest.hashlib, "file_digest", failing(OSError(5, "Input/output error")))
    assert "cannot be read (Input/output error)" in str(damage_of(folder))
    monkeypatch.setattr(manifest.hashlib, "file_digest", failing(PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError):
        damage_of(folder)


def test_all_is_flushed_before_the_manifest_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").mkdir()
    for name in ("a", "part/b"):
        (tmp_path / name).write_text(name)
    events: list[str] = []
    sync, write = manifest.os.fsync, manifest.write_durably

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        events.append(path.relative_to(tmp_path).as_posix() if not path.name.endswith(".part") else "its own")
        sync(descriptor)

    def write_and_note(path: Path, content: bytes) -> None:
        write(path, content)
        events.append("written")

    monkeypatch.setattr(manifest.os, "fsync", noted)
    monkeypatch.setattr(manifest, "write_durably", write_and_note)
    seal(tmp_path)
    assert events == ["a", "part/b", "its own", "written", "part", "."]

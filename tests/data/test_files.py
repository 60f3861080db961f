"""Files are complete or absent, and what killed writers leave is cleared away."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from cogvideox_factory.config import UserError
from cogvideox_factory.data.files import (
    UNFINISHED_SECONDS,
    make_output_folder,
    remove_unfinished,
    write_durably,
)


def names_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Writing


@pytest.mark.parametrize("content", [b"", b"\x00\r\n\xff", bytes(range(256)) * 40_000])
def test_a_file_holds_just_the_content_and_nothing_stands_beside_it(tmp_path: Path, content: bytes) -> None:
    for _ in range(2):  # the second time over the first
        write_durably(tmp_path / "new" / "folder" / "猫 1.2.bin", content)
        assert (tmp_path / "new/folder/猫 1.2.bin").read_bytes() == content
        assert names_under(tmp_path) == ["new/folder/猫 1.2.bin"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("old", [b"an old one", None])
def test_a_full_disk_leaves_the_old_file_or_none_and_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, old: bytes | None
) -> None:
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_durably(path, b"new")
    assert caught.value.errno == 28 and caught.value.filename == str(path)
    assert names_under(tmp_path) == ([] if old is None else ["file.bin"])
    assert old is None or path.read_bytes() == old


def test_ctrl_c_while_writing_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        assert len(names_under(tmp_path)) == 1  # the part, under another name
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_durably(tmp_path / "file.bin", b"content")
    assert names_under(tmp_path) == []


def test_all_of_it_is_on_the_disk_before_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        steps.append(("flushed", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def watch_replace(source: Any, target: Any) -> None:
        steps.append(("named", Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    write_durably(tmp_path / "file.bin", b"12345")
    assert steps == [("flushed", 5), ("named", 5)]


def test_two_writers_of_one_file_do_not_share_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, names = os.fsync, []

    def write_another_meanwhile(descriptor: int) -> None:
        fsync(descriptor)
        names.append(names_under(tmp_path))
        if len(names) == 1:
            write_durably(tmp_path / "file.bin", b"of the other")
            assert (tmp_path / "file.bin").read_bytes() == b"of the other"

    monkeypatch.setattr(os, "fsync", write_another_meanwhile)
    write_durably(tmp_path / "file.bin", b"mine")
    assert [len(found) for found in names] == [1, 2]
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    assert names_under(tmp_path) == ["file.bin"]


# What killed processes leave


def part_left_by_a_killed_writer(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `write_durably` has on the disk halfway, as a kill would leave it."""
    before = set(path.parent.iterdir()) if path.parent.is_dir() else set()

    def keep(*arguments: Any, **options: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", keep)
        patch.setattr(Path, "unlink", lambda *arguments, **options: None)
        with pytest.raises(SystemExit):
            write_durably(path, b"half")
    (part,) = set(path.parent.iterdir()) - before
    return part


def test_old_parts_go_and_young_ones_and_all_other_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [part_left_by_a_killed_writer(tmp_path / name, monkeypatch) for name in ("index.jsonl", "latents/k.bin")]
    young = part_left_by_a_killed_writer(tmp_path / "latents" / "j.bin", monkeypatch)
    others = [tmp_path / name for name in ("k.bin", "my.part", ".hidden", "latents/k.bin", "latents/.partly")]
    for path in others:
        path.write_bytes(b"content")
    long_ago = time.time() - UNFINISHED_SECONDS - 60
    just_now = time.time() - UNFINISHED_SECONDS + 600  # a living writer may still be at it
    for path in [*old, *others]:
        os.utime(path, (long_ago, long_ago))
    os.utime(young, (just_now, just_now))
    remove_unfinished(tmp_path)
    assert names_under(tmp_path) == sorted(path.relative_to(tmp_path).as_posix() for path in [young, *others])


def test_a_part_that_another_process_has_just_removed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [part_left_by_a_killed_writer(tmp_path / name, monkeypatch) for name in ("a.bin", "b.bin")]
    for part in parts:
        os.utime(part, (0, 0))
    stat, found = Path.stat, []

    def remove_first(path: Path, **options: Any) -> os.stat_result:
        if path in parts:
            found.append(path)
            if len(found) == 1:
                os.remove(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", remove_first)
    remove_unfinished(tmp_path)
    assert set(found) == set(parts) and list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_holds_nothing_unfinished(tmp_path: Path) -> None:
    remove_unfinished(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# Folders


def test_an_output_folder_is_made_with_those_above_it_and_left_empty(tmp_path: Path) -> None:
    make_output_folder(tmp_path / "a" / "b")
    make_output_folder(tmp_path / "a" / "b")  # one that exists will do
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_place_of_an_output_folder_is_a_users_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(UserError) as caught:
        make_output_folder(tmp_path / place, "--some_folder")
    assert str(caught.value).startswith(f"--some_folder {tmp_path / place}: cannot be written to (")
    assert str(caught.value).endswith("; choose another folder")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_folder_that_can_be_read_but_not_written_to_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, content: bytes) -> None:  # permissions do not bind root, who may run this
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(UserError, match=r"^--output_dir .*: cannot be written to \(Permission denied\)"):
        make_output_folder(tmp_path)

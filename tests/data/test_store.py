"""The prepared set on disk: complete or absent, named when damaged, and the same when read back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from cogvideox_factory.config import UserError
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.files import hash_of, hash_of_file, write_durably
from cogvideox_factory.data.store import DamagedEntry, Entry, PreparedSet

LATENTS = PreparedSet.latents_file("k1")
SETTINGS = {"fps": 8.0, "empty_prompt": "prompts/empty.safetensors"}


def entry(source: str = "a.mp4", caption: str = "a cat", key: str = "k1") -> Entry:
    files = {"latents": (PreparedSet.latents_file(key),), "prompt": (PreparedSet.prompt_file(key),)}
    return Entry(source, caption, Bucket(17, 64, 96), files, key)


def names_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Writing


def test_a_file_is_written_with_its_folders_and_nothing_beside_it(tmp_path: Path) -> None:
    write_durably(tmp_path / "a" / "b" / "file.bin", b"\x00content\r\n")
    assert (tmp_path / "a" / "b" / "file.bin").read_bytes() == b"\x00content\r\n"
    assert names_under(tmp_path) == ["a/b/file.bin"]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_durably(tmp_path / "file.bin", b"long old content")
    write_durably(tmp_path / "file.bin", b"new")
    assert (tmp_path / "file.bin").read_bytes() == b"new"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write_durably(tmp_path / "old.bin", b"old")

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    for name in ("old.bin", "new.bin"):
        with pytest.raises(OSError, match="No space left"):
            write_durably(tmp_path / name, b"something else")
    assert names_under(tmp_path) == ["old.bin"]
    assert (tmp_path / "old.bin").read_bytes() == b"old"


def test_a_file_has_reached_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    flushed: list[int] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        assert not path.exists()
        flushed.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def watch_replace(source: Any, target: Any) -> None:
        assert flushed == [5], "renamed before all of it was flushed"
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    write_durably(path, b"12345")
    assert path.read_bytes() == b"12345"


# Names


def test_hashes_tell_apart_whatever_differs() -> None:
    different: list[tuple] = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("a", "b", "c"),
        (1,),
        ("1",),
        (1.5,),
        ([1, 2],),
        (["1", 2],),
    ]
    different += [({"a": 1},), ({"a": 2},), ({"b": 1},), (None,), ("",), (), (["a", "b"],), ("猫",), ("犬",)]
    hashes = [hash_of(*parts) for parts in different]
    assert len(set(hashes)) == len(different)
    assert all(len(digest) >= 32 and set(digest) <= set("0123456789abcdef") for digest in hashes)


def test_a_hash_does_not_depend_on_the_order_of_keys_nor_on_the_process() -> None:
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
    # A new value would silently encode everybody's data set again.
    assert hash_of("a cat", 8, None) == "8228b024d4ff831c1aed1bd7cd194d94"


def test_a_files_hash_is_of_its_whole_content_and_of_nothing_else(tmp_path: Path) -> None:
    content = bytes(300_000)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    (tmp_path / "c").write_bytes(content[:-1] + b"\x01")
    assert hash_of_file(tmp_path / "a") == hash_of_file(tmp_path / "b") != hash_of_file(tmp_path / "c")


def test_latents_and_prompts_never_share_a_file() -> None:
    assert PreparedSet.latents_file("k") != PreparedSet.prompt_file("k")
    assert PreparedSet.latents_file("k") != PreparedSet.latents_file("l")


# Tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    mean = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {"mean": mean.transpose(0, 1), "logvar": mean.flip(0)[::2]}  # neither lies in one piece
    prepared = PreparedSet(tmp_path)
    assert not prepared.has(LATENTS)
    prepared.write_tensors(LATENTS, tensors)
    assert prepared.has(LATENTS)
    back = prepared.read_tensors(LATENTS)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)
    assert names_under(tmp_path) == [LATENTS]


def test_tensors_are_stored_as_safetensors(tmp_path: Path) -> None:
    PreparedSet(tmp_path).write_tensors(LATENTS, {"mean": torch.arange(6.0)})
    with safe_open(tmp_path / LATENTS, "pt") as file:
        assert torch.equal(file.get_tensor("mean"), torch.arange(6.0))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def cut_within_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, cut_within_the_header, overwrite, empty, make_folder, Path.unlink])
def test_a_damaged_tensor_file_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    prepared = PreparedSet(tmp_path)
    prepared.write_tensors(LATENTS, {"mean": torch.zeros(100)})
    damage(tmp_path / LATENTS)
    with pytest.raises(DamagedEntry) as caught:
        prepared.read_tensors(LATENTS)
    assert str(tmp_path / LATENTS) in str(caught.value)
    assert "prepare again" in str(caught.value)


def test_a_flipped_bit_anywhere_in_a_file_is_noticed(tmp_path: Path) -> None:
    """safetensors itself notices none in a tensor, and in the header takes some for other names or types."""
    prepared = PreparedSet(tmp_path)
    prepared.write_tensors(LATENTS, {"mean": torch.arange(9.0), "logvar": torch.ones(2, dtype=torch.bfloat16)})
    content = (tmp_path / LATENTS).read_bytes()
    assert prepared.has_whole(LATENTS)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (tmp_path / LATENTS).write_bytes(flipped)
        with pytest.raises(
            DamagedEntry, match=r"k1\.safetensors cannot be read \(its content is not what was written\)"
        ):
            prepared.read_tensors(LATENTS)
        assert not PreparedSet(tmp_path).has_whole(LATENTS) and prepared.has(LATENTS)
    (tmp_path / LATENTS).write_bytes(content)
    assert torch.equal(prepared.read_tensors(LATENTS)["mean"], torch.arange(9.0))


def test_a_file_under_the_name_of_another_is_noticed(tmp_path: Path) -> None:
    prepared, other = PreparedSet(tmp_path), PreparedSet.latents_file("k2")
    prepared.write_tensors(LATENTS, {"mean": torch.zeros(3)})
    (tmp_path / LATENTS).rename(tmp_path / other)
    with pytest.raises(DamagedEntry):
        prepared.read_tensors(other)


def test_a_file_without_a_seal_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    save_file({"mean": torch.zeros(3)}, tmp_path / LATENTS)
    with pytest.raises(DamagedEntry):
        PreparedSet(tmp_path).read_tensors(LATENTS)


def test_a_file_that_is_whole_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, reads, read = PreparedSet(tmp_path), [], Path.read_bytes

    def counted(path: Path) -> bytes:
        reads.append(path)
        return read(path)

    assert not prepared.has_whole(LATENTS)
    prepared.write_tensors(LATENTS, {"mean": torch.zeros(3)})
    monkeypatch.setattr(Path, "read_bytes", counted)
    assert all(prepared.has_whole(LATENTS) for _ in range(3)) and len(reads) == 1


# The index


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_entries_come_back_whatever_their_names_and_captions(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    prepared = PreparedSet(tmp_path_factory.mktemp("set"))
    entries = [entry(source, caption, f"k{number}") for number, (source, caption) in enumerate(texts)]
    prepared.write_index(entries, SETTINGS)
    back = prepared.read_index()
    assert back == entries
    assert all(isinstance(item.bucket, Bucket) for item in back)


@pytest.mark.parametrize(
    "caption", ["котик в лодке", "一只猫", "قطة", "🐈‍⬛", "two\nlines", "a\u2028b\u2029c\u0085d\x0be"]
)
def test_captions_of_any_script_come_back_and_can_be_read_in_the_file(tmp_path: Path, caption: str) -> None:
    prepared = PreparedSet(tmp_path)
    prepared.write_index([entry(caption=caption), entry("b.mp4", "plain", "k2")], SETTINGS)
    assert [item.caption for item in prepared.read_index()] == [caption, "plain"]
    text = (tmp_path / "index.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n") if line]
    assert [line["caption"] for line in lines] == [caption, "plain"]
    assert json.dumps(caption, ensure_ascii=False) in text  # not as \u escapes


def test_the_index_holds_a_line_a_clip_with_all_of_its_fields(tmp_path: Path) -> None:
    """Trap: of a batch the first clip's data alone is written down."""
    PreparedSet(tmp_path).write_index([entry()], SETTINGS)
    assert json.loads((tmp_path / "index.jsonl").read_text()) == {
        "source": "a.mp4",
        "caption": "a cat",
        "bucket": [17, 64, 96],
        "files": {"latents": ["latents/k1.safetensors"], "prompt": ["prompts/k1.safetensors"]},
        "start": 0.0,
        "key": "k1",
    }


def test_a_new_index_replaces_the_old_one(tmp_path: Path) -> None:
    prepared = PreparedSet(tmp_path)
    prepared.write_index([entry("a.mp4"), entry("b.mp4")], SETTINGS)
    prepared.write_index([entry("c.mp4")], {**SETTINGS, "fps": 16.0})
    assert [item.source for item in prepared.read_index()] == ["c.mp4"]
    assert prepared.read_settings().items() >= {**SETTINGS, "fps": 16.0}.items()


def test_an_index_never_stands_without_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def fail_at_the_second(path: Path, content: bytes) -> None:
        written.append(path.name)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr("cogvideox_factory.data.store.write_durably", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        PreparedSet(tmp_path).write_index([entry()], SETTINGS)
    assert written == ["settings.json", "index.jsonl"]


def test_old_entries_are_never_taken_under_new_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = PreparedSet(tmp_path)
    prepared.write_index([entry()], SETTINGS)
    write = write_durably

    def disk_full_for_the_index(path: Path, content: bytes) -> None:
        if path.name == "index.jsonl":
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("cogvideox_factory.data.store.write_durably", disk_full_for_the_index)
        with pytest.raises(OSError, match="No space left"):
            prepared.write_index([entry(source="b.mp4")], {**SETTINGS, "fps": 16.0})
    with pytest.raises(UserError, match="does not belong to the settings"):
        prepared.read_index()
    prepared.write_index([entry(source="b.mp4")], {**SETTINGS, "fps": 16.0})
    assert [item.source for item in prepared.read_index()] == ["b.mp4"]


def test_a_folder_that_is_no_prepared_set_is_named(tmp_path: Path) -> None:
    complete = PreparedSet(tmp_path / "complete")
    complete.write_index([entry()], SETTINGS)
    for missing in ("index.jsonl", "settings.json", "both"):
        folder = tmp_path / missing
        PreparedSet(folder).write_index([entry()], SETTINGS)
        for name in ("index.jsonl", "settings.json"):
            if missing in (name, "both"):
                (folder / name).unlink()
        for read in (PreparedSet(folder).read_settings, PreparedSet(folder).read_index):
            with pytest.raises(UserError, match="is not a prepared set") as caught:
                read()
            assert str(folder) in str(caught.value)
            for name in ("index.jsonl", "settings.json"):
                assert (f"no {name}" in str(caught.value)) == (missing in (name, "both"))
    with pytest.raises(UserError, match="is not a prepared set"):
        PreparedSet(tmp_path / "nowhere").read_index()


def valid_line(**changes: Any) -> str:
    line = {"source": "a", "caption": "b", "bucket": [17, 64, 96], "files": {}, "key": "k"}
    return json.dumps({**line, **changes})


@pytest.mark.parametrize(
    "content",
    [
        valid_line() + "\n" + valid_line()[:-9],
        "null\n",
        "[]\n",
        valid_line(unknown=1),
        valid_line(bucket=[17, 64]),
        valid_line(bucket=None),
        '{"source": "a"}\n',
        valid_line().encode().replace(b'"a"', b'"\xe9"'),
    ],
    ids=["cut off", "null", "a list", "a field too many", "two sizes", "no size", "fields missing", "not UTF-8"],
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str | bytes) -> None:
    prepared = PreparedSet(tmp_path)
    prepared.write_index([entry()], SETTINGS)
    (tmp_path / "index.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"index\.jsonl is damaged"):
        prepared.read_index()


def test_an_index_without_a_clip_says_so(tmp_path: Path) -> None:
    prepared = PreparedSet(tmp_path)
    prepared.write_index([], SETTINGS)
    with pytest.raises(UserError, match="lists no clip"):
        prepared.read_index()


@pytest.mark.parametrize(
    "content", [b"", b'{"fps": 8.0', b"\xff\xfe", b"[]", b'{"fps": 9.0, "index": "0", "seal": "0"}']
)
def test_damaged_settings_are_named(tmp_path: Path, content: bytes) -> None:
    prepared = PreparedSet(tmp_path)
    prepared.write_index([entry()], SETTINGS)
    (tmp_path / "settings.json").write_bytes(content)
    for read in (prepared.read_settings, prepared.read_index):
        with pytest.raises(UserError) as caught:
            read()
        assert "settings.json" in str(caught.value)


def test_json_files_can_be_read_by_people(tmp_path: Path) -> None:
    PreparedSet(tmp_path).write_json("report.json", {"skipped": [{"path": "кот.mp4"}]})
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"skipped": [{"path": "кот.mp4"}]}
    assert "кот.mp4" in text and "\n" in text


def test_a_failed_write_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_durably(tmp_path / "file.json", b"{}")
    assert caught.value.filename == str(tmp_path / "file.json")


def test_a_file_name_that_is_not_utf8_comes_back_as_it_was(tmp_path: Path) -> None:
    prepared = PreparedSet(tmp_path)
    name = b"caf\xe9.mp4".decode("utf-8", "surrogateescape")
    files = {"latents": ("latents/k.safetensors",), "prompt": ("prompts/k.safetensors",)}
    entry = Entry(name, "名 caption", Bucket(17, 64, 96), files, "k")
    prepared.write_index([entry], {})
    prepared.write_json("report.json", {"skipped": [{"path": name}]})
    assert prepared.read_index() == [entry]

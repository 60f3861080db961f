"""Lists of clips as people write them: text files, tables, sidecars, from any editor and any system."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cogvideox_factory.config import DataOptions, UserError
from cogvideox_factory.data.clips import Clip, read_clips


def write(folder: Path, **files: str | bytes) -> None:
    """Files by name, `prompts_txt` for prompts.txt; text is written byte for byte as UTF-8."""
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("_", ".")).write_bytes(data)


def write_tree(root: Path, **files: str | bytes | None) -> None:
    """Files by path with their folders, None for an empty video; `**{"a/b.txt": "text"}`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content or b"")


def json_lines(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def pairs(root: Path, **options: Any) -> list[tuple[str, str]]:
    return [(clip.source, clip.caption) for clip in read_clips(DataOptions(data_root=root, **options))]


def failure(root: Path | None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_clips(DataOptions(data_root=root, **options))
    return str(caught.value)


# --- two text files


def test_two_text_files(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="a red kite\na blue boat\n", videos_txt="videos/1.mp4\nvideos/2.mp4\n")
    assert read_clips(DataOptions(data_root=tmp_path)) == [
        Clip(tmp_path / "videos/1.mp4", "videos/1.mp4", "a red kite"),
        Clip(tmp_path / "videos/2.mp4", "videos/2.mp4", "a blue boat"),
    ]


def test_absolute_video_path_stays_absolute(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="a", videos_txt="/elsewhere/1.mp4")
    options = DataOptions(data_root=tmp_path, allow_outside_paths=True)
    assert [clip.path for clip in read_clips(options)] == [Path("/elsewhere/1.mp4")]


def test_prompt_txt_is_read_only_where_prompts_txt_is_missing(tmp_path: Path) -> None:
    write(tmp_path, prompt_txt="from prompt\n", videos_txt="1.mp4\n")
    assert pairs(tmp_path) == [("1.mp4", "from prompt")]
    write(tmp_path, prompts_txt="from prompts\n")
    assert pairs(tmp_path) == [("1.mp4", "from prompts")]


def test_columns_name_the_files(tmp_path: Path) -> None:
    write(tmp_path, captions_txt="right\n", files_txt="right.mp4\n", prompts_txt="wrong\n", videos_txt="wrong.mp4\n")
    both = {"caption_column": "captions.txt", "video_column": "files.txt"}
    assert pairs(tmp_path, **both) == [("right.mp4", "right")]
    assert pairs(tmp_path, caption_column="captions.txt") == [("wrong.mp4", "right")]


def test_named_file_that_is_missing_is_not_replaced_by_the_usual_one(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="a\n", videos_txt="1.mp4\n")
    message = failure(tmp_path, caption_column="captions.txt")
    assert "captions.txt" in message and "prompts.txt" in message


def test_missing_list_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, videos_txt="1.mp4\n", labels_txt="a\n")
    message = failure(tmp_path)
    assert "prompts.txt" in message and "labels.txt" in message and "--caption_column" in message


def test_folder_with_only_a_csv_says_how_to_name_it(tmp_path: Path) -> None:
    write(tmp_path, list_csv="video,text\n1.mp4,a\n")
    assert "--dataset_file list.csv" in failure(tmp_path)


def test_empty_text_files(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="", videos_txt="\ufeff\r\n \n")
    message = failure(tmp_path).replace(str(tmp_path), "")
    assert "--data_root" in message and "prompts.txt" in message and "videos.txt" in message and "empty" in message


@pytest.mark.parametrize(("prompts", "videos"), [(13, 11), (11, 13), (0, 7)])
def test_unequal_counts_name_both_numbers(tmp_path: Path, prompts: int, videos: int) -> None:
    write(tmp_path, prompts_txt="a\n" * prompts, videos_txt="1.mp4\n" * videos)
    message = failure(tmp_path).replace(str(tmp_path), "")
    assert f"{prompts} lines" in message and str(videos) in message
    assert "prompts.txt" in message and "videos.txt" in message


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    write(tmp_path, prompts_txt=bom + b"first\r\nsecond\r\n", videos_txt=bom + b"1.mp4\r\n2.mp4\r\n")
    assert pairs(tmp_path) == [("1.mp4", "first"), ("2.mp4", "second")]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"], ids=ascii)
def test_exotic_line_separators_do_not_shift_captions(tmp_path: Path, character: str) -> None:
    caption = f"a cat{character}on a mat"
    write(tmp_path, prompts_txt=f"{caption}\nsecond\n", videos_txt="1.mp4\n2.mp4\n")
    assert pairs(tmp_path) == [("1.mp4", caption), ("2.mp4", "second")]


def test_trailing_empty_lines_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="first\nsecond\n\n  \n\r\n", videos_txt="1.mp4\n2.mp4")
    assert pairs(tmp_path) == [("1.mp4", "first"), ("2.mp4", "second")]


def test_empty_line_in_the_middle_keeps_its_place(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="first\n\nthird\n", videos_txt="1.mp4\n2.mp4\n3.mp4\n")
    assert pairs(tmp_path) == [("1.mp4", "first"), ("2.mp4", ""), ("3.mp4", "third")]


def test_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="caf\u00e9\n".encode("latin-1"), videos_txt="1.mp4\n")
    message = failure(tmp_path)
    assert "prompts.txt" in message and "UTF-8" in message


def test_surrounding_blanks_are_removed(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="  first \n", videos_txt="\t1.mp4  \n")
    assert pairs(tmp_path) == [("1.mp4", "first")]


# --- CSV


def test_csv_absolute_and_relative_to_data_root(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    write(root, list_csv="video,text\n1.mp4,inside\n")
    write(other, list_csv="video,text\n2.mp4,outside\n")
    assert pairs(root, dataset_file=Path("list.csv")) == [("1.mp4", "inside")]
    clips = read_clips(DataOptions(data_root=root, dataset_file=other / "list.csv"))
    assert clips == [Clip(root / "2.mp4", "2.mp4", "outside")]


def test_csv_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write(tmp_path, list_csv="video,text\n1.mp4,here\n")
    monkeypatch.chdir(tmp_path)
    assert pairs(root, dataset_file=Path("list.csv")) == [("1.mp4", "here")]


def test_csv_wins_over_text_files(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="wrong\n", videos_txt="wrong.mp4\n", list_csv="video,text\n1.mp4,right\n")
    assert pairs(tmp_path, dataset_file=Path("list.csv")) == [("1.mp4", "right")]


def test_csv_quoted_fields_are_one_line(tmp_path: Path) -> None:
    """Trap: a caption with a line break shifts all that follow."""
    table = 'video,text,score\n1.mp4,"a cat,\non a ""mat""",3\n2.mp4,plain,4\n'
    write(tmp_path, list_csv=table)
    expected = [("1.mp4", 'a cat, on a "mat"'), ("2.mp4", "plain")]
    assert pairs(tmp_path, dataset_file=Path("list.csv")) == expected


def test_csv_with_bom_windows_line_ends_and_u2028(tmp_path: Path) -> None:
    table = "\ufeffvideo,text\r\n1.mp4,a\u2028b\r\n2.mp4,c\r\n\r\n"
    write(tmp_path, list_csv=table)
    assert pairs(tmp_path, dataset_file=Path("list.csv")) == [("1.mp4", "a b"), ("2.mp4", "c")]


def test_old_macintosh_line_ends(tmp_path: Path) -> None:
    write(tmp_path, list_csv="video,text\r1.mp4,a\r2.mp4,b\r", prompts_txt="a\rb\r", videos_txt="1.mp4\r2.mp4")
    assert pairs(tmp_path, dataset_file=Path("list.csv")) == pairs(tmp_path) == [("1.mp4", "a"), ("2.mp4", "b")]


def test_csv_other_columns(tmp_path: Path) -> None:
    write(tmp_path, list_csv="text,video,file,caption\nwrong,wrong.mp4,1.mp4,right\n")
    chosen = {"video_column": "file", "caption_column": "caption"}
    assert pairs(tmp_path, dataset_file=Path("list.csv"), **chosen) == [("1.mp4", "right")]


@pytest.mark.parametrize(
    ("options", "flag", "proposal"),
    [
        ({"caption_column": "captoin", "video_column": "path"}, "--caption_column", "caption"),
        ({"caption_column": "caption", "video_column": "pathh"}, "--video_column", "path"),
    ],
)
def test_csv_wrong_column_proposes_the_nearest(
    tmp_path: Path, options: dict[str, str], flag: str, proposal: str
) -> None:
    write(tmp_path, list_csv="path,caption,duration\n1.mp4,a,2\n")
    message = failure(tmp_path, dataset_file=Path("list.csv"), **options).replace(str(tmp_path), "")
    assert flag in message and "path, caption, duration" in message
    # Besides the list of all columns, the nearest is named once more, as the proposal.
    assert proposal in message.split("path, caption, duration")[1]
    assert "duration" not in message.split("path, caption, duration")[1]


def test_csv_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, list_csv="video,text\n1.mp4,caf\u00e9\n".encode("cp1252"))
    message = failure(tmp_path, dataset_file=Path("list.csv"))
    assert "list.csv" in message and "UTF-8" in message


def test_csv_missing(tmp_path: Path) -> None:
    assert "gone.csv" in failure(tmp_path, dataset_file=Path("gone.csv"))


def test_csv_empty(tmp_path: Path) -> None:
    for table in ("", "video,text\r\n"):
        write(tmp_path, list_csv=table)
        message = failure(tmp_path, dataset_file=Path("list.csv")).replace(str(tmp_path), "")
        assert "list.csv" in message and "empty" in message


def test_csv_more_cells_than_columns_are_not_dropped(tmp_path: Path) -> None:
    write(tmp_path, list_csv="video,text\n1.mp4,a cat\n2.mp4,a cat, on a mat\n")
    message = failure(tmp_path, dataset_file=Path("list.csv"))
    assert "list.csv, line 3" in message and "quote" in message
    write(tmp_path, list_csv="video,text\n1.mp4,a cat,,\n")  # as spreadsheets write it
    assert pairs(tmp_path, dataset_file=Path("list.csv")) == [("1.mp4", "a cat")]


def test_csv_unclosed_quote(tmp_path: Path) -> None:
    write(tmp_path, list_csv='video,text\n1.mp4,"never closed\n2.mp4,b\n')
    assert "list.csv" in failure(tmp_path, dataset_file=Path("list.csv"))


def test_csv_short_row_keeps_its_place_without_caption(tmp_path: Path) -> None:
    write(tmp_path, list_csv="video,text\n1.mp4\n2.mp4,b\n")
    assert pairs(tmp_path, dataset_file=Path("list.csv")) == [("1.mp4", ""), ("2.mp4", "b")]


# --- columns of tables


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("path", "file_name", "video", "prompt", "caption", "text"), ("video value", "text value")),
        (("path", "file_name", "prompt", "caption"), ("file_name value", "caption value")),
        (("other", "path", "prompt"), ("path value", "prompt value")),
    ],
)
def test_columns_left_at_their_defaults_fall_back(
    tmp_path: Path, ending: str, columns: tuple[str, ...], expected: tuple[str, str]
) -> None:
    record = {column: f"{column} value" for column in columns}
    table = ",".join(record) + "\n" + ",".join(record.values()) if ending == "csv" else json_lines(record)
    write_tree(tmp_path, **{f"list.{ending}": table})
    assert pairs(tmp_path, dataset_file=Path(f"list.{ending}")) == [expected]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_named_column_does_not_fall_back(tmp_path: Path, ending: str) -> None:
    table = (
        "video,text,caption\n1.mp4,a,b" if ending == "csv" else json_lines({"video": "1", "text": "a", "caption": 1})
    )
    write_tree(tmp_path, **{f"list.{ending}": table})
    message = failure(tmp_path, dataset_file=Path(f"list.{ending}"), caption_column="captions")
    assert "--caption_column captions" in message and "did you mean caption?" in message
    assert "--video_column clip" in failure(tmp_path, dataset_file=Path(f"list.{ending}"), video_column="clip")


def test_no_usual_column_names_all_that_were_looked_for(tmp_path: Path) -> None:
    write(tmp_path, list_csv="clip,text\n1.mp4,a\n")
    message = failure(tmp_path, dataset_file=Path("list.csv"))
    assert (
        "--video_column video" in message and "file_name" in message and "path" in message and "clip, text" in message
    )


# --- JSONL and JSON


def test_json_lines(tmp_path: Path) -> None:
    table = (
        json_lines({"video": " 1.mp4 ", "text": "a\ncat\t on  a mat"})
        + "\n  \n"
        + json_lines({"text": 7, "video": 2.5})
    )
    for name in ("list.jsonl", "list.ndjson", "LIST.JSONL"):
        write_tree(tmp_path, **{name: table})
        assert pairs(tmp_path, dataset_file=Path(name)) == [("1.mp4", "a cat on a mat"), ("2.5", "7")]


def test_json_lines_with_bom_windows_line_ends_and_u2028(tmp_path: Path) -> None:
    records = json_lines({"video": "1.mp4", "text": "a\u2028b"}, {"video": "2.mp4", "text": "c"})
    assert "\u2028" in records
    write(tmp_path, list_jsonl="\ufeff" + records.replace("\n", "\r\n"))
    assert pairs(tmp_path, dataset_file=Path("list.jsonl")) == [("1.mp4", "a b"), ("2.mp4", "c")]


def test_json_lines_record_that_lacks_a_column_keeps_its_place(tmp_path: Path) -> None:
    records = [{"video": "1.mp4"}, {"text": "b"}, {"video": None, "text": None}, {"video": "4.mp4", "text": "d"}]
    write(tmp_path, list_jsonl=json_lines(*records))
    expected = [("1.mp4", ""), ("", "b"), ("", ""), ("4.mp4", "d")]
    assert pairs(tmp_path, dataset_file=Path("list.jsonl")) == expected


@pytest.mark.parametrize("line", ['{"video": "2.mp4",', "[1]", '"text"', "null", "7", "[" * 100_000])
def test_json_lines_broken_line_is_named(tmp_path: Path, line: str) -> None:
    good = json_lines({"video": "1.mp4", "text": "a"})
    write(tmp_path, list_jsonl=f"{good}\n{line}\n{good}")
    assert "list.jsonl, line 3" in failure(tmp_path, dataset_file=Path("list.jsonl"))


@pytest.mark.parametrize("value", [True, ["a"], {"en": "a"}], ids=str)
@pytest.mark.parametrize("column", ["video", "text"])
def test_json_lines_value_that_is_no_text_is_named(tmp_path: Path, column: str, value: Any) -> None:
    good = {"video": "1.mp4", "text": "a"}
    write(tmp_path, list_jsonl=json_lines(good, good | {column: value}, good))
    message = failure(tmp_path, dataset_file=Path("list.jsonl"))
    assert "list.jsonl, line 2" in message and f"{column} holds {json.dumps(value)}" in message


def test_half_an_emoji_leaves_a_caption_that_can_be_encoded(tmp_path: Path) -> None:
    write(tmp_path, list_jsonl='{"video": "1.mp4", "text": "a cat \\ud83d"}')
    assert pairs(tmp_path, dataset_file=Path("list.jsonl")) == [("1.mp4", "a cat ?")]


@pytest.mark.parametrize("name", ["list.jsonl", "list.json", "metadata.jsonl", "metadata.csv"])
def test_empty_and_not_utf8_tables(tmp_path: Path, name: str) -> None:
    given = {"dataset_file": Path(name)} if name.startswith("list") else {}
    write_tree(tmp_path, **{name: "\n \n" if name.endswith("l") else ""})
    message = failure(tmp_path, **given).replace(str(tmp_path), "")
    assert name in message and "empty" in message
    write_tree(tmp_path, **{name: '{"video": "caf\u00e9"}\n'.encode("latin-1")})
    message = failure(tmp_path, **given)
    assert name in message and "UTF-8" in message


def test_json_list(tmp_path: Path) -> None:
    records = [{"video": "1.mp4", "text": "a"}, {"file_name": "x", "video": "2.mp4", "text": "b\nc"}]
    write(tmp_path, list_json=json.dumps(records, indent=2))
    assert pairs(tmp_path, dataset_file=Path("list.json")) == [("1.mp4", "a"), ("2.mp4", "b c")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"video": "1.mp4", "text": "a"}', ".jsonl"),
        ('{"video": "1.mp4", "text": "a"}\n{"video": "2.mp4", "text": "a"}', ".jsonl"),
        ('[{"video": "1.mp4", "text": "a"}, 3]', "record 2"),
        ("[]", "empty"),
    ],
)
def test_json_that_is_no_list_of_objects(tmp_path: Path, content: str, expected: str) -> None:
    write(tmp_path, list_json=content)
    message = failure(tmp_path, dataset_file=Path("list.json"))
    assert "--dataset_file" in message and "list.json" in message and expected in message.replace("list.json", "")


def one_line(text: str) -> str:
    return " ".join(text.split())


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
@example([("", ""), ("a,b.mp4", 'he said "no"\r\nand \u2028left'), ("\u65e5\u672c.mp4", "\r")])
def test_tables_are_read_back_as_they_were_written(written: list[tuple[str, str]]) -> None:
    # Neither the path nor the caption is judged here, so that both may be any text.
    expected = [(source.strip(), one_line(caption)) for source, caption in written]
    records = [{"text": caption, "video": source} for source, caption in written]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with (root / "list.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("video", "text"), *written])
        write(root, list_jsonl=json_lines(*records), list_json=json.dumps(records))
        for ending in ("csv", "jsonl", "json"):
            dataset_file = Path(f"list.{ending}")
            read = pairs(root, dataset_file=dataset_file, allow_outside_paths=True)
            assert read == expected, ending


# --- what the folder holds


def test_metadata_of_a_hub_folder(tmp_path: Path) -> None:
    write_tree(tmp_path, **{"clips/1.mp4": None, "clips/1.txt": "from sidecar"})
    assert pairs(tmp_path) == [("clips/1.mp4", "from sidecar")]
    write(tmp_path, metadata_csv="file_name,text\nclips/1.mp4,from csv\n")
    assert pairs(tmp_path) == [("clips/1.mp4", "from csv")]
    write(tmp_path, metadata_jsonl=json_lines({"file_name": "clips/1.mp4", "text": "from jsonl"}))
    assert pairs(tmp_path) == [("clips/1.mp4", "from jsonl")]
    assert read_clips(DataOptions(data_root=tmp_path))[0].path == tmp_path / "clips/1.mp4"
    write(tmp_path, prompts_txt="from prompts\n", videos_txt="clips/1.mp4\n")
    assert pairs(tmp_path) == [("clips/1.mp4", "from prompts")]


def test_one_text_file_alone_does_not_hide_the_metadata(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="wrong\n", metadata_jsonl=json_lines({"file_name": "1.mp4", "caption": "right"}))
    assert pairs(tmp_path) == [("1.mp4", "right")]
    message = failure(tmp_path, video_column="videos.txt")  # who names a text file means the text files
    assert "--video_column videos.txt" in message and "has no videos.txt" in message


def test_named_column_reads_the_metadata_beside_the_text_files(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="wrong\n", videos_txt="wrong.mp4\n", metadata_csv="file_name,long\n1.mp4,right\n")
    assert pairs(tmp_path, caption_column="long") == [("1.mp4", "right")]


def test_named_list_needs_no_txt_ending(tmp_path: Path) -> None:
    write(tmp_path, captions_lst="a\n", videos_txt="1.mp4\n", metadata_csv="file_name,text\nwrong.mp4,wrong\n")
    assert pairs(tmp_path, caption_column="captions.lst") == [("1.mp4", "a")]
    (tmp_path / "videos.txt").unlink()
    assert "has no videos.txt" in failure(tmp_path, caption_column="captions.lst")


def test_named_column_is_not_ignored_where_only_sidecars_are(tmp_path: Path) -> None:
    write_tree(tmp_path, **{"1.mp4": None, "1.txt": "a"})
    message = failure(tmp_path, caption_column="long")
    assert "--caption_column long" in message and "1.mp4" in message


# --- a caption beside each video


def test_sidecars_in_natural_order_whatever_the_ending(tmp_path: Path) -> None:
    names = [
        "b/1.mp4",
        "clip10.webm",
        "Clip2.MOV",
        "clip1.mkv",
        "a/9.avi",
        "a/10.m4v",
        "b/02.GIF",
        "c.mpeg",
        "c2.ts",
        "d.mpg",
    ]
    write_tree(tmp_path, **dict.fromkeys(names), **{"notes.md": "x", "c3.png": None, "c3.txt": "a picture"})
    write_tree(tmp_path, **{str(Path(name).with_suffix(".txt")): f"shows {name}" for name in names})
    order = [
        "a/9.avi",
        "a/10.m4v",
        "b/1.mp4",
        "b/02.GIF",
        "c.mpeg",
        "c2.ts",
        "clip1.mkv",
        "Clip2.MOV",
        "clip10.webm",
        "d.mpg",
    ]
    assert pairs(tmp_path) == [(name, f"shows {name}") for name in order]
    assert [clip.path for clip in read_clips(DataOptions(data_root=tmp_path))] == [tmp_path / name for name in order]


def test_sidecars_by_stem_with_dots_in_names_and_equal_stems_in_two_folders(tmp_path: Path) -> None:
    write_tree(tmp_path, **{"clip.name.v2.mp4": None, "clip.name.v2.txt": "second", "clip.name.txt": "wrong"})
    write_tree(tmp_path, **{"x/1.mp4": None, "x/1.txt": "one", "y/1.mp4": None, "y/1.txt": "other"})
    write_tree(
        tmp_path,
        **{
            "\u65e5\u672c/\u732b \U0001f408.mp4": None,
            "\u65e5\u672c/\u732b \U0001f408.txt": "\u732b\u304c\u3044\u308b",
        },
    )
    expected = [
        ("clip.name.v2.mp4", "second"),
        ("x/1.mp4", "one"),
        ("y/1.mp4", "other"),
        ("\u65e5\u672c/\u732b \U0001f408.mp4", "\u732b\u304c\u3044\u308b"),
    ]
    assert pairs(tmp_path) == expected


def test_sidecar_of_several_lines_is_one_line(tmp_path: Path) -> None:
    write_tree(tmp_path, **{"1.mp4": None, "1.txt": "\ufeff a cat\r\n\r\non\u2028a \t mat\n"})
    assert pairs(tmp_path) == [("1.mp4", "a cat on a mat")]


def test_video_without_sidecar_keeps_an_empty_caption(tmp_path: Path) -> None:
    write_tree(tmp_path, **{"1.mp4": None, "2.mp4": None, "2.txt": "b", "3.mp4": None, "3.txt": ""})
    assert pairs(tmp_path, id_token="DISNEY") == [("1.mp4", ""), ("2.mp4", "DISNEY b"), ("3.mp4", "")]


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    names = ["._1.mp4", ".cache/2.mp4", "x/.trash/3.mp4", "x/4.mp4"]
    write_tree(tmp_path, **dict.fromkeys(names), **{str(Path(name).with_suffix(".txt")): "a" for name in names})
    assert pairs(tmp_path) == [("x/4.mp4", "a")]


def test_a_data_set_below_a_hidden_folder_is_read(tmp_path: Path) -> None:
    write_tree(tmp_path, **{".hidden/set/1.mp4": None, ".hidden/set/1.txt": "a"})
    assert pairs(tmp_path / ".hidden/set") == [("1.mp4", "a")]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_tree(tmp_path, **{"real/1.mp4": None, "real/1.txt": "a", "root/2.mp4": None, "root/2.txt": "b"})
    (root / "linked").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real/back").symlink_to(root, target_is_directory=True)
    assert pairs(root) == [("2.mp4", "b"), ("linked/1.mp4", "a")]


def test_sidecar_that_is_not_utf8(tmp_path: Path) -> None:
    write_tree(tmp_path, **{"x/1.mp4": None, "x/1.txt": "caf\u00e9".encode("latin-1")})
    message = failure(tmp_path)
    assert "1.txt" in message and "UTF-8" in message


def test_no_sidecar_at_all_says_what_was_looked_for(tmp_path: Path) -> None:
    write_tree(tmp_path, **{"1.mp4": None, "clips/2.mp4": None, "notes.md": "x"})
    message = failure(tmp_path)
    for part in ("--data_root", "prompts.txt", "metadata.jsonl", "metadata.csv", ".txt", "2 videos"):
        assert part in message
    assert "1.mp4, clips/, notes.md" in message
    write_tree(tmp_path, **{f"{number}.mp4": None for number in range(10, 40)})
    assert "and 23 more" in failure(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    message = failure(tmp_path)
    assert "prompts.txt" in message and "nothing" in message


# --- paths that lead out of the folder


@pytest.mark.parametrize(
    "outside", ["../x.mp4", "a/../../x.mp4", "/elsewhere/x.mp4", "{root}-2/x.mp4", "{root}/../x.mp4"]
)
def test_outside_paths_are_refused_unless_allowed(tmp_path: Path, outside: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    outside = outside.format(root=root)
    sources = ["1.mp4", outside, "../y.mp4", "2.mp4"]
    write(root, prompts_txt="a\nb\nc\nd\n", videos_txt="\n".join(sources))
    message = failure(root)
    assert f"2 of 4 paths lead out of this folder, the first: {outside};" in message
    assert "--data_root" in message and "--allow_outside_paths" in message
    clips = read_clips(DataOptions(data_root=root, allow_outside_paths=True))
    assert [clip.path for clip in clips] == [root / source for source in sources]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json"])
def test_outside_paths_of_tables_are_refused(tmp_path: Path, ending: str) -> None:
    record = {"video": "../x.mp4", "text": "a"}
    tables = {"csv": "video,text\n../x.mp4,a\n", "jsonl": json_lines(record), "json": json.dumps([record])}
    write_tree(tmp_path, **{f"list.{ending}": tables[ending]})
    assert "--allow_outside_paths" in failure(tmp_path, dataset_file=Path(f"list.{ending}"))


def test_inside_paths_are_accepted_however_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [str(tmp_path / "set/1.mp4"), "a/../2.mp4", "./..3.mp4", "", "../set/4.mp4"]
    write_tree(tmp_path, **{"set/prompts.txt": "a\n" * 5, "set/videos.txt": "\n".join(sources)})
    expected = [(source, "a") for source in sources]
    assert pairs(tmp_path / "set") == expected
    monkeypatch.chdir(tmp_path)
    assert pairs(Path("set")) == expected
    monkeypatch.chdir(tmp_path / "set")
    assert pairs(Path(".")) == expected


def test_links_to_clips_elsewhere_are_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_tree(
        tmp_path, **{"elsewhere/1.mp4": None, "root/prompts.txt": "a\nb\n", "root/videos.txt": "1.mp4\nlinked/1.mp4\n"}
    )
    (root / "1.mp4").symlink_to(tmp_path / "elsewhere/1.mp4")
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert pairs(root) == [("1.mp4", "a"), ("linked/1.mp4", "b")]


# --- all


def test_id_token_is_put_before_every_caption(tmp_path: Path) -> None:
    write(tmp_path, prompts_txt="first\nsecond\n", videos_txt="1.mp4\n2.mp4\n", list_csv="video,text\n3.mp4,third\n")
    assert pairs(tmp_path, id_token="DISNEY") == [("1.mp4", "DISNEY first"), ("2.mp4", "DISNEY second")]
    assert pairs(tmp_path, id_token="DISNEY", dataset_file=Path("list.csv")) == [("3.mp4", "DISNEY third")]


def test_missing_folder(tmp_path: Path) -> None:
    message = failure(tmp_path / "nowhere")
    assert "--data_root" in message and "nowhere" in message
    assert "--data_root" in failure(None)
    write(tmp_path, file_txt="")
    assert "file.txt" in failure(tmp_path / "file.txt")


def test_what_the_system_refuses_to_read_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, prompts_txt="a\n", videos_txt="1.mp4\n")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = failure(tmp_path)
    assert "--data_root" in message and "prompts.txt" in message and "Permission denied" in message

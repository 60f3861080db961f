"""Lists of clips as people write them: two text files or a CSV, from any editor and any system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cogvideox_factory.config import DataOptions, UserError
from cogvideox_factory.data.clips import Clip, read_clips


def write(folder: Path, **files: str | bytes) -> None:
    """Files by name, `prompts_txt` for prompts.txt; text is written byte for byte as UTF-8."""
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("_", ".")).write_bytes(data)


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
    assert [clip.path for clip in read_clips(DataOptions(data_root=tmp_path))] == [Path("/elsewhere/1.mp4")]


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
    write(tmp_path, metadata_csv="video,text\n1.mp4,a\n")
    assert "--dataset_file metadata.csv" in failure(tmp_path)


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


def test_csv_quoted_fields(tmp_path: Path) -> None:
    table = 'video,text,score\n1.mp4,"a cat,\non a ""mat""",3\n2.mp4,plain,4\n'
    write(tmp_path, list_csv=table)
    expected = [("1.mp4", 'a cat,\non a "mat"'), ("2.mp4", "plain")]
    assert pairs(tmp_path, dataset_file=Path("list.csv")) == expected


def test_csv_with_bom_windows_line_ends_and_u2028(tmp_path: Path) -> None:
    table = "\ufeffvideo,text\r\n1.mp4,a\u2028b\r\n2.mp4,c\r\n\r\n"
    write(tmp_path, list_csv=table)
    assert pairs(tmp_path, dataset_file=Path("list.csv")) == [("1.mp4", "a\u2028b"), ("2.mp4", "c")]


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
    write(tmp_path, list_csv="")
    assert "list.csv" in failure(tmp_path, dataset_file=Path("list.csv"))


def test_csv_unclosed_quote(tmp_path: Path) -> None:
    write(tmp_path, list_csv='video,text\n1.mp4,"never closed\n2.mp4,b\n')
    assert "list.csv" in failure(tmp_path, dataset_file=Path("list.csv"))


def test_csv_short_row_keeps_its_place_without_caption(tmp_path: Path) -> None:
    write(tmp_path, list_csv="video,text\n1.mp4\n2.mp4,b\n")
    assert pairs(tmp_path, dataset_file=Path("list.csv")) == [("1.mp4", ""), ("2.mp4", "b")]


# --- both


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

"""Which videos are held out: always the same, whole videos, and none that moves when others come."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.config import UserError
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.split import num_videos, overlap, split_entries
from cogvideox_factory.data.store import Entry

BUCKET = Bucket(17, 64, 96)


def entry(source: str, *files: str, caption: str = "a") -> Entry:
    latents = tuple(f"latents/{file}.safetensors" for file in files)
    return Entry(source, caption, BUCKET, {"latents": latents, "prompt": (f"prompts/{caption}",)}, f"{source}/{files}")


def videos(count: int, name: str = "clip", excerpts: int = 1) -> list[Entry]:
    return [entry(f"{name}{n}.mp4", f"{name}{n}-{part}") for n in range(count) for part in range(excerpts)]


def sources(entries: list[Entry]) -> set[str]:
    return {entry.source for entry in entries}


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_about_that_share_of_many_videos_is_held_out(fraction: float) -> None:
    entries = videos(2000)
    trained, held_out = split_entries(entries, fraction)
    assert sorted(map(entries.index, trained + held_out)) == list(range(2000))
    assert trained == [entry for entry in entries if entry in trained]  # in their order
    assert abs(len(held_out) - 2000 * fraction) < 4 * (2000 * fraction * (1 - fraction)) ** 0.5


@settings(deadline=None, max_examples=40)
@given(before=st.integers(20, 60), added=st.integers(1, 60), order=st.randoms(use_true_random=False))
def test_no_video_changes_sides_when_others_are_added(before: int, added: int, order: random.Random) -> None:
    old, new = videos(before, excerpts=2), videos(added, "new")
    mixed = [*old, *new]
    order.shuffle(mixed)
    assert sources(split_entries(mixed, 0.4)[1]) & sources(old) == sources(split_entries(old, 0.4)[1])


def test_a_higher_fraction_holds_out_the_same_videos_with_more() -> None:
    low, high = (sources(split_entries(videos(50), fraction)[1]) for fraction in (0.2, 0.4))
    assert low < high


def test_excerpts_copies_and_other_captions_of_a_video_stay_together() -> None:
    entries = []
    for number in range(40):
        entries += [entry(f"{number}.mp4", f"{number}-a"), entry(f"{number}.mp4", f"{number}-b")]  # two excerpts
        entries += [entry(f"copy-{number}.mp4", f"{number}-b", caption="another")]  # as a copy has
        entries += [entry(f"views-{number}.mp4", f"{number}-c", f"{number}-a")]  # linked by one view of several
    trained, held_out = split_entries(entries, 0.5)
    numbers = [{item.files["latents"][0].split("/")[1].split("-")[0] for item in side} for side in (trained, held_out)]
    assert not numbers[0] & numbers[1] and numbers[0] and numbers[1]
    assert not sources(trained) & sources(held_out)
    assert num_videos(entries) == 40


def test_a_copy_or_another_name_moves_no_video() -> None:
    entries = videos(30)
    held_out = split_entries(entries, 0.4)[1]
    files = {item.files["latents"] for item in held_out}
    renamed = [entry(f"aaa-{n}.mp4", f"clip{n}-0") for n in range(30)]
    assert {item.files["latents"] for item in split_entries(renamed, 0.4)[1]} == files
    assert {item.files["latents"] for item in split_entries([*renamed, *entries], 0.4)[1]} == files


@pytest.mark.parametrize(("fraction", "share"), [(1e-6, "none"), (0.9999999, "all")])
def test_a_fraction_that_leaves_a_side_empty_is_refused_with_one_that_works(fraction: float, share: str) -> None:
    with pytest.raises(UserError, match=rf"--validation_fraction .* holds out {share} of 12 videos") as error:
        split_entries(videos(12), fraction)
    nearest = float(str(error.value).rsplit(" ", 1)[1])
    trained, held_out = split_entries(videos(12), nearest)
    assert 1 in (len(trained), len(held_out))


def test_one_video_cannot_be_shared_out() -> None:
    with pytest.raises(UserError, match=r"one video only.*--validation_data_root"):
        split_entries(videos(1, excerpts=5), 0.5)


def test_clips_of_both_sets_are_found_by_what_was_encoded() -> None:
    shared = entry("elsewhere.mp4", "clip1-0", caption="another")
    assert overlap([shared, *videos(2, "new")], videos(3)) == [shared]

"""What a checkpoint decides where the user did not, and what is refused, rounded, or only told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_factory.config import ConditioningOptions, DataOptions, ModelOptions, UserError
from cogvideox_factory.model.family import Checkpoint, open_checkpoint, with_conditioning
from cogvideox_factory.resolve import check_positions, check_text_length, resolve_data_options


def resolved(checkpoint: Checkpoint, **given_by_user: Any) -> dict[str, Any]:
    return resolve_data_options(DataOptions(**given_by_user), checkpoint)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_without_flags_all_is_the_checkpoints_and_nothing_is_said(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    # 64×96 lies outside of what the program is documented for, but it is what this model was made for.
    assert resolved(checkpoint) == {
        "frame_buckets": (17,),
        "height_buckets": (64,),
        "width_buckets": (96,),
        "fps": 8.0,
    }
    assert resolved(checkpoint, height_buckets=(64,), width_buckets=(96,))["height_buckets"] == (64,)
    assert warnings(caplog) == []


def test_a_checkpoint_of_the_second_generation_brings_its_own_size_and_rate(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = {**checkpoint.transformer, "patch_size_t": 2, "sample_frames": 81}
    assert resolved(replace(checkpoint, transformer=transformer)) == {
        "frame_buckets": (81,),
        "height_buckets": (768,),
        "width_buckets": (1360,),
        "fps": 16.0,
    }
    assert warnings(caplog) == []


def test_what_the_user_gives_is_taken_in_the_users_order_and_each_once(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"height_buckets": (720, 480, 720), "width_buckets": (1280, 720), "fps": 12.5}
    assert resolved(checkpoint, frame_buckets=(49, 16, 49), **options) == {
        "frame_buckets": (49, 16),
        "height_buckets": (720, 480),
        "width_buckets": (1280, 720),
        "fps": 12.5,
    }
    assert warnings(caplog) == []


@pytest.mark.parametrize("frames", [1, 8, 9, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65, 80, 81, 161])
def test_8k_and_8k_plus_1_frames_are_taken(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, frames: int
) -> None:
    assert resolved(checkpoint, frame_buckets=(frames,))["frame_buckets"] == (frames,)
    assert warnings(caplog) == []


@given(frames=st.integers(1, 400))
def test_all_other_numbers_of_frames_are_refused_naming_the_next_on_either_side(
    checkpoint: Checkpoint, frames: int
) -> None:
    possible = [number for number in range(1, 500) if number % 8 in (0, 1)]
    if frames in possible:
        assert resolved(checkpoint, frame_buckets=(9, frames))["frame_buckets"] == tuple(dict.fromkeys((9, frames)))
        return
    below = max(number for number in possible if number < frames)
    above = min(number for number in possible if number > frames)
    with pytest.raises(UserError) as caught:
        resolved(checkpoint, frame_buckets=(9, frames))
    message = str(caught.value)
    assert message.startswith(f"--frame_buckets {frames}: ") and message.endswith(f"nearest are {below} and {above}")


def test_10_frames_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"^--frame_buckets 10: .* 8k or 8k\+1 frames; the nearest are 9 and 16$"):
        resolved(checkpoint, frame_buckets=(10,))


@pytest.mark.parametrize(("flag", "default"), [("height_buckets", 64), ("width_buckets", 96)])
class TestSizes:
    def test_every_multiple_of_16_from_256_to_2048_passes_without_a_word(
        self, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, flag: str, default: int
    ) -> None:
        sizes = tuple(range(256, 2048 + 1, 16))
        assert len(sizes) == 113
        assert resolved(checkpoint, **{flag: sizes})[flag] == sizes
        assert warnings(caplog) == []

    @pytest.mark.parametrize(("size", "used"), [(300, 304), (479, 480), (489, 496), (1001, 1008), (721, 720)])
    def test_others_are_rounded_to_the_nearest_with_a_warning(
        self,
        checkpoint: Checkpoint,
        caplog: pytest.LogCaptureFixture,
        flag: str,
        default: int,
        size: int,
        used: int,
    ) -> None:
        assert resolved(checkpoint, **{flag: (size, used)})[flag] == (used,)
        assert warnings(caplog) == [f"--{flag} {size}: not a multiple of 16, {used} is used"]

    @pytest.mark.parametrize("size", [16, 240, 2064])
    def test_outside_of_256_to_2048_is_told_and_done(
        self, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, flag: str, default: int, size: int
    ) -> None:
        assert resolved(checkpoint, **{flag: (480, size)})[flag] == (480, size)
        (message,) = warnings(caplog)
        assert message.startswith(f"--{flag} {size}: outside of 256 to 2048")

    def test_nothing_is_rounded_to_zero(
        self, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, flag: str, default: int
    ) -> None:
        assert resolved(checkpoint, **{flag: (3,)})[flag] == (16,)
        assert "not a multiple of 16, 16 is used" in warnings(caplog)[0]

    def test_the_models_own_size_is_never_warned_about(
        self, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, flag: str, default: int
    ) -> None:
        assert resolved(checkpoint, **{flag: (default,)})[flag] == (default,)
        assert warnings(caplog) == []
        assert resolved(checkpoint, **{flag: (default + 16,)})[flag] == (default + 16,)
        assert len(warnings(caplog)) == 1


@given(size=st.integers(16, 3000))
def test_a_size_is_never_moved_by_more_than_half_a_step(checkpoint: Checkpoint, size: int) -> None:
    (used,) = resolved(checkpoint, height_buckets=(size,))["height_buckets"]
    assert used % 16 == 0 and abs(used - size) <= 8


# Captions


def with_positions(checkpoint: Checkpoint, *, rotary: bool) -> Checkpoint:
    return replace(checkpoint, transformer={**checkpoint.transformer, "use_rotary_positional_embeddings": rotary})


@pytest.mark.parametrize("rotary", [True, False])
def test_the_models_own_number_of_tokens_and_none_are_taken(checkpoint: Checkpoint, rotary: bool) -> None:
    checkpoint = with_positions(checkpoint, rotary=rotary)
    assert checkpoint.max_text_tokens == 226
    check_text_length(checkpoint, None)
    check_text_length(checkpoint, 226)
    with pytest.raises(UserError, match=r"^--max_sequence_length 227: .* 226$"):
        check_text_length(checkpoint, 227)


def test_fewer_tokens_fit_only_where_positions_are_rotary(checkpoint: Checkpoint) -> None:
    check_text_length(with_positions(checkpoint, rotary=True), 16)
    with pytest.raises(UserError, match=r"takes 226$"):
        check_text_length(with_positions(checkpoint, rotary=False), 16)
    with pytest.raises(UserError, match=r"takes up to 226$"):
        check_text_length(with_positions(checkpoint, rotary=True), 300)


@pytest.mark.parametrize("flags", [{"num_excerpts": 3}, {"excerpt_stride": 2}])
def test_numbers_of_excerpts_without_a_mode_that_uses_them_are_refused(checkpoint: Checkpoint, flags: dict) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(flags))} .*--frame_extraction"):
        resolve_data_options(DataOptions(**flags), checkpoint)
    assert resolve_data_options(DataOptions(frame_extraction="slide", **flags), checkpoint)


def test_learned_positions_warn_of_another_number_of_frames(
    member: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(member("5b-I2V"))))
    check_positions(checkpoint, [(17, 64, 96)])
    assert not caplog.messages
    check_positions(checkpoint, [(9, 64, 96)])
    (message,) = caplog.messages
    assert "9 frames" in message and "learned positions for 17" in message
    with pytest.raises(UserError, match="64×48"):
        check_positions(checkpoint, [(17, 64, 96), (17, 64, 48)])
    ignoring = with_conditioning(checkpoint, ConditioningOptions(ignore_learned_positional_embeddings=True))
    check_positions(ignoring, [(9, 32, 48)])
    check_positions(open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(member("5b")))), [(9, 32, 48)])

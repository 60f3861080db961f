"""Which picture a validation video of an image-to-video model starts from."""

from __future__ import annotations

import dataclasses
import http.server
import threading
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image

from cogvideox_factory.cli import main
from cogvideox_factory.config import ModelOptions, UserError, ValidationOptions
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.model.family import Checkpoint, open_checkpoint
from cogvideox_factory.training import start_images
from cogvideox_factory.training.start_images import (
    FIRST_FRAME,
    StartImages,
    open_start_images,
    sources_of,
    with_absolute_images,
    with_kept_images,
)

CPU = torch.device("cpu")


@pytest.fixture
def image_model(member: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(member("5b-I2V"))))


@pytest.fixture(scope="module")
def image_set(tmp_path_factory: pytest.TempPathFactory, member: Callable[[str], Path], clips: Path) -> PreparedSet:
    """Six clips of 16 frames, of which the first latents of the video stand for several."""
    folder, output = tmp_path_factory.mktemp("six"), tmp_path_factory.mktemp("image-set")
    (folder / "videos").symlink_to(clips / "videos")
    for name in ("prompts.txt", "videos.txt"):
        (folder / name).write_text("".join((clips / name).read_text().splitlines(keepends=True)[:6]))
    flags = ("--frame_buckets", "16", "--num_image_draws", "1", "--num_decode_workers", "0", "--data_root", str(folder))
    model = ("--pretrained_model_name_or_path", str(member("5b-I2V")))
    assert main(["prepare", *model, *flags, "--output_dir", str(output)]) == 0
    return PreparedSet(output)


@pytest.fixture
def entries(image_set: PreparedSet) -> list[Entry]:
    return image_set.read_index()


def noise_picture(path: Path, seed: int) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [FIRST_FRAME, FIRST_FRAME]),
        ("a.png", ["a.png", "a.png"]),
        (" a.png ::: first_frame ", ["a.png", FIRST_FRAME]),
    ],
)
def test_one_picture_serves_all_prompts_or_each_has_its_own(
    image_model: Checkpoint, given: str | None, expected: list[str]
) -> None:
    assert sources_of(ValidationOptions(validation_images=given), ["x", "y"], image_model) == expected


def test_numbers_that_do_not_match_are_refused(image_model: Checkpoint) -> None:
    options = ValidationOptions(validation_images="a.png:::b.png:::c.png")
    with pytest.raises(UserError, match="3 images for 2 prompts"):
        sources_of(options, ["x", "y"], image_model)


def test_text_to_video_takes_no_pictures(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"--validation_images a\.png: .* is a text-to-video model"):
        sources_of(ValidationOptions(validation_images="a.png"), ["x"], checkpoint)
    assert sources_of(ValidationOptions(), ["x"], checkpoint) == []


def test_a_file_that_cannot_be_read_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--validation_images none\.png: no such file"):
        StartImages(tmp_path, ["none.png"], ["x"])


def test_given_pictures_are_kept_as_they_are(
    tmp_path: Path, image_model: Checkpoint, image_set: PreparedSet, entries: list[Entry]
) -> None:
    first, second = (noise_picture(tmp_path / f"{seed}.png", seed) for seed in (1, 2))
    images = StartImages(tmp_path / "kept", [str(first), str(second), str(first)], ["x", "y", "z"])
    names = images.names(image_model, image_set, entries, CPU)
    assert names[0] == names[2] != names[1]
    for name, source in zip(names, (first, second, first), strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "kept" / name)), np.asarray(Image.open(source)))
    noise_picture(first, 3)  # another picture under the same name is another picture
    again = StartImages(tmp_path / "kept", [str(first)], ["x"]).names(image_model, image_set, entries, CPU)
    assert again[0] not in names


def test_paths_are_made_absolute_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ValidationOptions(validation_images="a.png ::: first_frame:::http://a.example/b.png:::/c.png")
    expected = f"{tmp_path}/a.png:::first_frame:::http://a.example/b.png:::/c.png"
    assert with_absolute_images(given).validation_images == expected
    assert with_absolute_images(ValidationOptions()) == ValidationOptions()
    dot = ValidationOptions(validation_images="a_png|b_png", validation_prompt_separator="|")
    assert with_absolute_images(dot).validation_images == f"{tmp_path}/a_png|{tmp_path}/b_png"


def test_a_run_goes_on_with_its_copy_of_a_file_that_is_gone(
    tmp_path: Path, image_model: Checkpoint, prepared: PreparedSet, entries: list[Entry]
) -> None:
    first, second = (noise_picture(tmp_path / f"{seed}.png", seed) for seed in (1, 2))
    images = StartImages(tmp_path / "kept", [str(first), str(second)], ["x", "y"])
    names = images.names(image_model, prepared, entries, CPU)
    first.unlink()
    again = StartImages(tmp_path / "kept", [str(first), str(second)], ["x", "y"])
    assert again.names(image_model, prepared, entries, CPU) == names
    (tmp_path / "kept" / names[0]).unlink()
    with pytest.raises(UserError, match=r"1\.png: no such file"):
        StartImages(tmp_path / "kept", [str(first)], ["x"])


def test_the_first_frame_is_that_of_the_clip_with_the_prompt_as_its_caption(
    tmp_path: Path, image_model: Checkpoint, image_set: PreparedSet, entries: list[Entry], clips: Path
) -> None:
    """Against the stock VAE's reconstruction of the clip's first frame, read plainly."""
    prompts = ["no caption of the data set", entries[5].caption, "another one"]
    images = StartImages(tmp_path, [FIRST_FRAME] * 3, prompts)
    names = images.names(image_model, image_set, entries, CPU)
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(image_model.folder)
    for name, entry in zip(names, (entries[0], entries[5], entries[2]), strict=True):
        with av.open(str(clips / entry.source)) as video:
            first = next(video.decode(video=0))
            frame = first.reformat(96, 64, "rgb24", interpolation=Interpolation.BICUBIC).to_image()
        pixels = pipeline.video_processor.preprocess(frame)[:, :, None]
        with torch.no_grad():
            video = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
        expected = pipeline.video_processor.postprocess_video(video, output_type="np")[0, 0]
        kept = np.asarray(Image.open(tmp_path / name)).astype(float)
        assert np.abs(kept - expected * 255).max() < 1.01
    assert len(set(names)) == 3


def test_a_run_that_goes_on_decodes_nothing_again(
    tmp_path: Path, image_model: Checkpoint, image_set: PreparedSet, entries: list[Entry], monkeypatch
) -> None:
    images = StartImages(tmp_path, [FIRST_FRAME], ["x"])
    names = images.names(image_model, image_set, entries, CPU)
    monkeypatch.setattr("cogvideox_factory.training.start_images.load_vae", None)
    assert images.names(image_model, image_set, entries, CPU) == names
    other = dataclasses.replace(entries[1])
    with pytest.raises(TypeError):  # of another clip it does
        images.names(image_model, image_set, [other], CPU)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one picture, and counts how often it is asked."""

    content = b""
    requests = 0

    def do_GET(self) -> None:
        Server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_picture_from_the_web_is_fetched_once_and_kept(
    tmp_path: Path, image_model: Checkpoint, image_set: PreparedSet, entries: list[Entry]
) -> None:
    Server.content, Server.requests = noise_picture(tmp_path / "a.png", 4).read_bytes(), 0
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.png"
        options = ValidationOptions(validation_prompt="x:::y", validation_images=address)
        with pytest.raises(UserError, match="--validation_images http://127"):
            open_start_images(tmp_path / "run", options, image_model)
        options = dataclasses.replace(options, allow_private_addresses=True)
        images = open_start_images(tmp_path / "run", options, image_model)
        server.shutdown()
    again = open_start_images(tmp_path / "run", options, image_model)  # though the server is gone
    assert images and again
    name, same = again.names(image_model, image_set, entries, CPU)
    assert name == same and images.names(image_model, image_set, entries, CPU) == [name, name]
    assert Server.requests == 1
    kept = Image.open(tmp_path / "run/validation/images" / name)
    assert np.array_equal(np.asarray(kept), np.asarray(Image.open(tmp_path / "a.png")))


def test_config_yaml_names_the_copy_of_what_a_signed_address_gave(
    tmp_path: Path, image_model: Checkpoint, image_set: PreparedSet, entries: list[Entry], monkeypatch
) -> None:
    """It repeats the run, and gives nobody access."""
    picture = noise_picture(tmp_path / "a.png", 4)
    signed = "https://a.example/b.png?X-Amz-Signature=0a1b"
    monkeypatch.setattr(start_images, "read_image", lambda source, flag, **options: Image.open(picture))
    given = ValidationOptions(validation_prompt="x", validation_images=f"{signed}:::https://a.example/c.png:::/d.png")
    assert with_kept_images(tmp_path / "run", given).validation_images == (  # nothing is kept without a prompt
        "https://a.example/b.png?…:::https://a.example/c.png:::/d.png"
    )
    options = dataclasses.replace(given, validation_images=signed)
    images = open_start_images(tmp_path / "run", options, image_model)
    written = with_kept_images(tmp_path / "run", options)
    monkeypatch.undo()
    assert images
    (name,) = images.names(image_model, image_set, entries, CPU)
    assert written.validation_images == str(tmp_path / "run/validation/images" / name)
    again = open_start_images(tmp_path / "run", written, image_model)  # the run goes on by its config.yaml
    assert again and again.names(image_model, image_set, entries, CPU) == [name]
    repeated = open_start_images(tmp_path / "repeated", written, image_model)
    assert repeated
    (copy,) = repeated.names(image_model, image_set, entries, CPU)
    kept = np.asarray(Image.open(tmp_path / "repeated/validation/images" / copy))
    assert np.array_equal(kept, np.asarray(Image.open(picture)))

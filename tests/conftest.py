"""Small inputs that many tests share: the tiny model, rendered clips, and the program's entry point in-process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from members import save_member

from cogvideox_factory.cli import main
from cogvideox_factory.config import ModelOptions
from cogvideox_factory.data.store import Entry, PreparedSet
from cogvideox_factory.demo.tiny_model import build_tiny_pipeline
from cogvideox_factory.demo.world import render_clips
from cogvideox_factory.model.family import Checkpoint, open_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_no_garbage() -> None:
    """The program collects garbage between its stages; without the libraries' own objects that takes no second."""
    import diffusers
    import transformers

    import cogvideox_factory.training.loop  # noqa: F401

    assert diffusers.CogVideoXImageToVideoPipeline and transformers.T5EncoderModel  # which imports them
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a GPU are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny CogVideoX pipeline (17×64×96, rotary positions as 5b)."""
    folder = tmp_path_factory.mktemp("tiny-model")
    build_tiny_pipeline(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two blocks: a trace takes time for every operation, whatever its size."""
    folder = tmp_path_factory.mktemp("shallow-model")
    build_tiny_pipeline(seed=0, num_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def member(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny model of a member of the family, made when first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_member(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def checkpoint(tiny_model: Path) -> Checkpoint:
    return open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(tiny_model)))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set of a dozen rendered clips (25 frames of 96×144 at 8 fps) with prompts.txt and videos.txt."""
    folder = tmp_path_factory.mktemp("clips")
    render_clips(folder)
    return folder


@pytest.fixture(scope="session")
def first_clips(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Callable[[int], Path]:
    """A data set of the first of them, as many as are asked for."""

    def get(count: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{count}-clips")
        (folder / "videos").symlink_to(clips / "videos")
        for name in ("prompts.txt", "videos.txt"):
            (folder / name).write_text("".join((clips / name).read_text().splitlines(keepends=True)[:count]))
        return folder

    return get


@pytest.fixture(scope="session")
def few_clips(first_clips: Callable[[int], Path]) -> Path:
    """The first two of them."""
    return first_clips(2)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the program in-process: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_request:  # how argument parsing ends
            code = int(exit_request.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, clips: Path) -> Path:
    """Prepared set of the rendered clips, made by the command."""
    folder = tmp_path_factory.mktemp("prepared")
    arguments = ["prepare", "--pretrained_model_name_or_path", tiny_model, "--data_root", clips]
    assert main([*map(str, arguments), "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def prepared(prepared_folder: Path) -> PreparedSet:
    return PreparedSet(prepared_folder)


@pytest.fixture(scope="session")
def entries(prepared: PreparedSet) -> list[Entry]:
    return prepared.read_index()

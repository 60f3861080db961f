"""Files of tensors against those that safetensors writes itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox_factory.training.tensor_file import NAMES, write_tensors


def test_a_file_is_byte_for_byte_the_one_of_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f'{number % 7}.ключ "{number}"': torch.randint(0, 2, shape, generator=generator).to(dtype)
        for number, (dtype, shape) in enumerate(
            (dtype, shape) for dtype in reversed(NAMES) for shape in [(3, 5), (), (0, 2), (7,), (2, 1, 3)]
        )
    }
    tensors["a view"] = torch.arange(12.0).reshape(3, 4).T
    tensors["weight"] = torch.nn.Parameter(torch.ones(3))
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, tmp_path / "theirs")
    digest = write_tensors(tensors, tmp_path / "ours")
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
    back = load_file(tmp_path / "ours")
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in tensors.items())


def test_no_tensors_make_a_file_too(tmp_path: Path) -> None:
    save_file({}, tmp_path / "theirs")
    write_tensors({}, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes() and load_file(tmp_path / "ours") == {}


def test_a_type_that_is_not_known_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"odd: numbers of torch\.complex64"):
        write_tensors({"odd": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_one_tensor_at_a_time_is_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors elsewhere come when their turn is: here each is brought over after the one before was written."""
    events: list[str] = []
    cpu = torch.Tensor.cpu

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        events.append(f"{(tmp_path / 'file').stat().st_size > 4_000_000 * len(events)}")
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    write_tensors({str(number): torch.zeros(1_000_000) for number in range(3)}, tmp_path / "file")
    assert events[1:] == ["True", "True"]

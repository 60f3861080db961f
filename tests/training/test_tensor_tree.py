"""Trees of tensors through a file and back, against what went in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox_factory.training.tensor_tree import flatten, unflatten


def through_files(tree: Any, folder: Path) -> Any:
    """The tree as it comes back from disk."""
    tensors, rest = flatten(tree, "state")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "tensors.safetensors")
    return unflatten(load_file(folder / "tensors.safetensors"), json.loads(json.dumps(rest)))


def test_nested_values_come_back_as_they_were(tmp_path: Path) -> None:
    shared = torch.arange(5)
    tree: dict[Any, Any] = {
        0: {"quantiles": {"map": shared, "other.name": torch.tensor(0.1, dtype=torch.float64)}, "step": 7},
        "0": [shared, (0.9, 1 / 3), torch.Size([2, 3]), torch.bfloat16, None, True, float("inf"), "text"],
        "empty": {},
        "scrambled": torch.randn(4, 3).T,
    }
    back = through_files(tree, tmp_path)
    assert back.keys() == tree.keys() and back["0"][1:] == tree["0"][1:] and back["empty"] == {}
    assert type(back["0"][1]) is tuple and type(back["0"][2]) is torch.Size
    assert back[0]["step"] == 7 and back[0]["quantiles"]["other.name"].dtype == torch.float64
    assert torch.equal(back[0]["quantiles"]["other.name"], torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(back["scrambled"], tree["scrambled"])
    assert torch.equal(back["0"][0], shared) and back["0"][0] is back[0]["quantiles"]["map"]  # one tensor, two places


def test_names_of_a_dictionary_cannot_run_into_each_other(tmp_path: Path) -> None:
    tree = {"a": {"b.c": torch.zeros(1)}, "a.b": {"c": torch.ones(1)}}
    back = through_files(tree, tmp_path)
    assert torch.equal(back["a"]["b.c"], torch.zeros(1)) and torch.equal(back["a.b"]["c"], torch.ones(1))


@pytest.mark.parametrize("name", ["OptimState8bit", "OptimState4bit", "OptimStateFp8"])
def test_quantized_states_come_back_in_their_own_class(name: str, tmp_path: Path) -> None:
    import torchao.optim.subclass_4bit
    import torchao.optim.subclass_8bit
    import torchao.optim.subclass_fp8

    modules = (torchao.optim.subclass_4bit, torchao.optim.subclass_8bit, torchao.optim.subclass_fp8)
    (state_class,) = (getattr(module, name) for module in modules if hasattr(module, name))
    state = state_class.zeros((4, 256), dtype=torch.float32)
    state.copy_(torch.randn(4, 256))
    back = through_files({"state": state}, tmp_path)["state"]
    assert type(back) is state_class and back.dtype == state.dtype and back.shape == state.shape
    assert state.dequantize().abs().sum() > 0 and torch.equal(back.dequantize(), state.dequantize())
    for part in state.tensor_attrs:
        assert torch.equal(getattr(back, part).float(), getattr(state, part).float())


def test_a_file_cannot_name_a_class_of_its_choice() -> None:
    damaged = {"subclass": "Popen", "parts": {"mapping": []}, "context": []}
    with pytest.raises(KeyError):
        unflatten({}, damaged)


@pytest.mark.parametrize("rest", [{"tensor": "missing"}, {"dtype": "nn"}, {"unknown": 1}, {}, {"a": 1, "b": 2}, 3 + 4j])
def test_what_is_damaged_is_an_error(rest: Any) -> None:
    with pytest.raises((KeyError, ValueError, TypeError, AttributeError)):
        unflatten({}, rest)


@pytest.mark.parametrize("value", [object(), torch.nn.utils.parametrize, {1, 2}])
def test_what_cannot_be_written_is_an_error(value: Any) -> None:
    with pytest.raises(TypeError):
        flatten({"value": value}, "state")

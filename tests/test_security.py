"""What no line of the program may do: run code or build objects out of files that others made."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideox_factory.config import ModelOptions
from cogvideox_factory.model.denoiser import load_transformer
from cogvideox_factory.model.encoders import TextEncoder, load_vae
from cogvideox_factory.model.family import open_checkpoint

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "tools", "benchmarks", "docs", "training")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Modules that unpickle, evaluate, or build any object that a file names, whatever one does with them.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# A decoder process gets its requests, and nothing else, as pickles from the process that started it.
MAY_IMPORT = {("src/cogvideox_factory/data/decoding.py", "pickle")}
MAY_UNPICKLE = {("src/cogvideox_factory/data/decoding.py", "_serve")}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
TELLING_ARGUMENTS = {"weights_only", "allow_pickle", "trust_remote_code", "use_safetensors", "custom_pipeline", "shell"}
SAFE_YAML = {"safe_load", "safe_dump", "YAMLError"}


def faults_of(source: str, file: str) -> Iterator[str]:
    """Why a file may not be as it is, with the line."""
    tree = ast.parse(source)
    function_of: dict[ast.AST, str] = {}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and (file, function.name) in MAY_UNPICKLE:
            function_of.update(dict.fromkeys(ast.walk(function), function.name))
    for node in ast.walk(tree):
        place = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in UNSAFE_MODULES and (file, module) not in MAY_IMPORT:
                    yield f"{place}: imports {module}"
            if isinstance(node, ast.ImportFrom) and node.module == "yaml":
                yield f"{place}: takes names out of yaml, by which it cannot be seen that they are safe"
            if isinstance(node, ast.ImportFrom) and node.module == "torch" and {"load"} & {a.name for a in node.names}:
                yield f"{place}: takes load out of torch"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "yaml" and node.attr not in SAFE_YAML:
                yield f"{place}: yaml.{node.attr}"
            if (
                node.value.id == "pickle"
                and node.attr != "dump"
                and (file, function_of.get(node, "")) not in MAY_UNPICKLE
            ):
                yield f"{place}: pickle.{node.attr}"
        if isinstance(node, ast.Call):
            yield from faults_of_call(node, place)


def faults_of_call(call: ast.Call, place: str) -> Iterator[str]:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in TELLING_ARGUMENTS}
    name = ast.unparse(call.func)
    if name in UNSAFE_NAMES:
        yield f"{place}: {name}"
    if name == "torch.load" and given.get("weights_only") != "True":
        yield f"{place}: torch.load without weights_only=True"
    if name.endswith((".load_sharded_checkpoint", ".load_checkpoint_in_model")):
        yield f"{place}: {name} unpickles"
    if given.get("allow_pickle", "False") != "False":
        yield f"{place}: allow_pickle"
    if given.get("trust_remote_code", "False") != "False":
        yield f"{place}: trust_remote_code"
    if name.endswith("from_pretrained") and {"use_safetensors", "custom_pipeline"} & given.keys():
        if given.get("use_safetensors", "True") != "True":
            yield f"{place}: weights that are pickles"
        if "custom_pipeline" in given:
            yield f"{place}: code of others"
    if given.get("shell", "False") != "False" or name in ("os.system", "os.popen"):
        yield f"{place}: a shell"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "from yaml import load",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "DiffusionPipeline.from_pretrained(name, custom_pipeline=other)",
        "CogVideoXPipeline.from_pretrained(name, use_safetensors=False)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert list(faults_of(line, "any.py"))


class Planted:
    """An object that leaves a file behind where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_of_a_model_that_are_a_pickle_build_nothing(shallow_model: Path, tmp_path: Path, part: str) -> None:
    model, proof = tmp_path / "model", tmp_path / "was unpickled"
    shutil.copytree(shallow_model, model)
    (weights,) = (model / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"weight": Planted(proof)}, model / part / name)
    checkpoint = open_checkpoint(ModelOptions(pretrained_model_name_or_path=str(model)))
    load = {
        "transformer": lambda: load_transformer(checkpoint, torch.float32),
        "vae": lambda: load_vae(checkpoint, torch.float32),
        "text_encoder": lambda: TextEncoder.load(checkpoint, None, torch.float32, torch.device("cpu")),
    }[part]
    with pytest.raises(Exception, match=r"(?i)weights"):
        load()
    assert not proof.exists()
    torch.load(model / part / name, weights_only=False)
    assert proof.exists()  # it would have told


def test_no_file_of_ours_runs_what_others_wrote() -> None:
    assert len(FILES) > 70
    faults = [fault for path in FILES for fault in faults_of(path.read_text(), path.relative_to(ROOT).as_posix())]
    assert not faults

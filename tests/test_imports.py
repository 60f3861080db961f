"""Who may import whom, and what the program may import before it knows its command."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import cogvideox_factory

PACKAGE = Path(cogvideox_factory.__file__).parent

# What a part may import besides itself, the standard library and other packages.
ALLOWED: dict[str, set[str]] = {
    "": set(),  # the package's own __init__: version and map
    "redaction": set(),
    "config": {"", "redaction"},
    "messages": {"redaction"},
    "command_line": {"", "config", "messages", "redaction"},
    "stopping": set(),
    "progress": {"messages"},
    "ranks": {"config", "stopping"},
    "data": {"config", "progress", "redaction", "stopping"},
    "run_folder": {"data"},
    "model": {"", "config", "progress", "stopping"},
    "memory": {"config", "data", "model", "progress", "stopping"},
    "resolve": {"config", "model"},
    "prepare": {"config", "data", "model", "memory", "progress", "ranks", "resolve", "stopping"},
    "contact_sheet": set(),
    "pictures": set(),
    "problems": {"data", "pictures"},
    "inspection": {
        *("config", "contact_sheet", "data", "model", "pictures", "problems", "progress", "resolve", "stopping"),
    },
    "sampling": {"run_folder", "config", "data", "model", "memory", "progress", "redaction", "resolve", "stopping"},
    "training": {
        *("run_folder", "config", "data", "model", "memory", "prepare", "resolve", "sampling", "progress", "ranks"),
        *("", "messages", "redaction", "stopping"),
    },
    "planning": {"config", "data", "model", "memory", "prepare", "sampling", "training", "progress", "stopping"},
    "report": {"config", "redaction"},
    "demo": {"config", "data", "run_folder"},
    "cli": {
        *("", "config", "command_line", "demo", "inspection", "prepare", "sampling", "training", "planning", "report"),
        *("messages", "progress", "ranks", "redaction", "stopping"),
    },
    "__main__": {"cli"},
}


def part_of(module: str) -> str:
    """The second name of a dotted module: cogvideox_factory.data.store → data."""
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> set[str]:
    """Parts of our package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            modules = [node.module or ""]
            if node.module == "cogvideox_factory":  # from cogvideox_factory import x: x may be a module
                modules = [
                    f"cogvideox_factory.{alias.name}" if (PACKAGE / f"{alias.name}.py").exists() else node.module
                    for alias in node.names
                ]
        found |= {part_of(module) for module in modules if module.split(".")[0] == "cogvideox_factory"}
    return found


def test_modules_import_only_what_stands_before_them() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        relative = path.relative_to(PACKAGE)
        part = (
            relative.parts[0].removesuffix(".py") if relative.name != "__init__.py" or len(relative.parts) > 1 else ""
        )
        assert part in ALLOWED, f"{relative} belongs to no part; add it to the rule"
        forbidden = imports_of(path) - ALLOWED[part] - {part}
        assert not forbidden, f"{relative} must not import {', '.join(sorted(forbidden))}"


def test_nothing_before_the_command_imports_the_heavy_libraries() -> None:
    code = (
        "import sys; from cogvideox_factory.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'diffusers', 'av', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

"""The audit of dependencies: a vulnerability fails it, a service that cannot be asked is told."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/audit_dependencies.py"
spec = importlib.util.spec_from_file_location("audit_dependencies", SCRIPT)
assert spec and spec.loader
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)


def service(*vulnerable: str, unknown: Sequence[str] = ()) -> Any:
    """Answers as pip-audit gives them."""

    def ask(packages: Sequence[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for package in packages:
            name, _, number = package.partition("==")
            if name in unknown:
                found.append({"name": name, "skip_reason": "Dependency not found on PyPI"})
            else:
                faults = [{"id": "PYSEC-1", "fix_versions": ["9.9"]}] if name in vulnerable else []
                found.append({"name": name, "version": number, "vulns": faults})
        return found

    return ask


def test_every_installed_package_is_asked_for_by_its_published_version(monkeypatch) -> None:
    names = [package.partition("==")[0] for package in audit.installed()]
    assert {"torch", "pyyaml", "pytest"} <= set(names) and "cogvideox-factory" not in names
    assert f"torch=={version('torch').partition('+')[0]}" in audit.installed()


def test_a_vulnerability_fails_the_check_and_is_named_with_its_remedy(capsys) -> None:
    assert audit.main(service("pyyaml", unknown=["torch"])) == 1
    shown = capsys.readouterr().out
    assert f"pyyaml {version('pyyaml')}: PYSEC-1, mended in 9.9" in shown and "1 with known" in shown
    assert "not known to the service: torch" in shown


def test_without_a_vulnerability_it_passes(capsys) -> None:
    assert audit.main(service()) == 0
    assert f"{len(audit.installed())} packages audited, 0 with" in capsys.readouterr().out


def test_a_service_that_cannot_be_asked_is_told_and_passes(monkeypatch, capsys) -> None:
    assert audit.main(service(unknown=[package.partition("==")[0] for package in audit.installed()])) == 0
    assert "nothing was audited" in capsys.readouterr().out
    refused = "Traceback …\nrequests.exceptions.ConnectionError: no route"
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: SimpleNamespace(stdout="", stderr=refused))
    assert audit.main() == 0
    assert "nothing was audited" in capsys.readouterr().out


def test_any_other_failure_of_pip_audit_fails_the_check(monkeypatch) -> None:
    broken = SimpleNamespace(stdout="", stderr="ModuleNotFoundError: No module named 'pip_audit'")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: broken)
    with pytest.raises(SystemExit, match="No module named"):
        audit.main()

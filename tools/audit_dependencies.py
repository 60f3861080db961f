"""Asks an advisory service about known vulnerabilities of every package that is installed here, by pip-audit.

    python tools/audit_dependencies.py

Exit code 1 where one is known. Where the service cannot be asked, as on a machine with no network or behind a mirror
that has packages only, that is said, and the exit code is 0: nobody can mend it there.

Rejected: `pip-audit -r requirements.txt`, which resolves everything anew for minutes, and leaves out nothing but what
comes along with the packages that are named.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

OURS = "cogvideox-factory"
SECONDS = "10"  # that pip-audit waits for an answer
# How the tracebacks of its HTTP library end where no answer came.
UNREACHABLE = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError", "SSLError", "ServiceError")


class NotReachable(Exception):
    """The advisory service gave no answer."""


def installed() -> list[str]:
    """NAME==VERSION of all packages here, by the version that was published: 2.13.0+cpu is a build of 2.13.0."""
    named = {(item.name.lower(), item.version.partition("+")[0]) for item in distributions() if item.name}
    return [f"{name}=={version}" for name, version in sorted(named) if name != OURS]


def ask(packages: Sequence[str]) -> list[dict[str, Any]]:
    """What pip-audit finds of these packages: name, and version with vulns or skip_reason. Raises NotReachable."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "packages.txt"
        listed.write_text("\n".join(packages))
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(listed), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off", "--timeout", SECONDS]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout.startswith("{"):
        return json.loads(done.stdout)["dependencies"]
    reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    if any(name in reason for name in UNREACHABLE):
        raise NotReachable(reason)
    raise SystemExit(f"pip-audit failed:\n{done.stderr}")


def main(ask: Callable[[Sequence[str]], list[dict[str, Any]]] = ask) -> int:
    packages = installed()
    try:
        # One first: a mirror knows none of them, and it takes a minute to hear that of each.
        if all("skip_reason" in item for item in ask(packages[:1])):
            raise NotReachable("it knows no package")
        found = ask(packages)
    except NotReachable as error:
        print(f"pip-audit: nothing was audited, the advisory service cannot be asked from here ({error})")
        return 0
    unknown = [item["name"] for item in found if "skip_reason" in item]
    vulnerable = [item for item in found if item.get("vulns")]
    for item in vulnerable:
        for fault in item["vulns"]:
            mended = ", ".join(fault.get("fix_versions", ())) or "no version yet"
            print(f"pip-audit: {item['name']} {item['version']}: {fault['id']}, mended in {mended}")
    print(f"pip-audit: {len(found) - len(unknown)} packages audited, {len(vulnerable)} with known vulnerabilities")
    if unknown:
        print(f"pip-audit: not known to the service: {', '.join(unknown)}")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())

"""The suite that kills and damages runs: that it finds what is lost, and that the page shows what it found."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import fault_injection
from fault_injection import added, damage, table, with_table
from faulty_disk import FaultyDisk
from forked_runs import Lost
from run_content import compare, content_of

ROOT = Path(__file__).parents[2]

RESULT = ROOT / "benchmarks/results/fault_injection.json"
PAGE = ROOT / "docs/reliability.md"


def write(folder: Path, **faults: Any) -> int:
    """Exit code of a process that writes some files to such a disk, and then how many pieces they had."""
    folder.mkdir()
    tensors = {"a": torch.arange(3000.0)}
    child = os.fork()
    if not child:
        code = 1
        try:
            disk = FaultyDisk(folder, **faults)
            disk.install()
            (folder / "text.txt").write_text("line\n" * 2000, encoding="utf-8")
            (folder / "bytes").write_bytes(bytes(range(256)) * 40)
            with (folder / "appended").open("ab") as file:
                file.write(b"x" * 5000)
            save_file(tensors, folder / "a.safetensors", metadata={"b": "c"})
            code = disk.num_pieces
        except OSError as error:
            code = 100 + (error.errno or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_faulty_disk_writes_what_any_disk_writes_until_its_fault(tmp_path: Path) -> None:
    num_pieces = write(tmp_path / "whole")
    assert 10 < num_pieces < 100
    assert (tmp_path / "whole/text.txt").read_text() == "line\n" * 2000
    assert (tmp_path / "whole/bytes").read_bytes() == bytes(range(256)) * 40
    assert (tmp_path / "whole/appended").read_bytes() == b"x" * 5000
    written = content_of(tmp_path / "whole/a.safetensors")
    assert written["metadata"] == {"b": "c"} and len(written["a"][2]) == 12000

    assert write(tmp_path / "full", full_from_piece=num_pieces - 1) == 100 + errno.ENOSPC
    assert write(tmp_path / "killed", killed_at_piece=num_pieces - 1) == -signal.SIGKILL
    for folder in ("full", "killed"):  # within the last file
        size = (tmp_path / folder / "a.safetensors").stat().st_size
        assert 0 < size < (tmp_path / "whole/a.safetensors").stat().st_size


def test_other_content_is_lost_and_named(tmp_path: Path) -> None:
    compare({"a": b"1", "b": {"x": 1}}, {"a": b"1", "b": {"x": 1}})
    with pytest.raises(Lost, match=r"other content of a, b \(x\)"):
        compare({"a": b"1", "b": {"x": 1}}, {"b": {"x": 2}})


def test_damage_is_of_one_bit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for position in (0.0, 0.5, 0.999):
        path.write_bytes(bytes(100))
        damage(path, "damage", position, random.Random(1))
        content = path.read_bytes()
        assert len(content) == 100 and content[int(position * 100)].bit_count() == 1 and sum(map(bool, content)) == 1
    damage(path, "truncate", 0.5, random.Random(1))
    assert path.stat().st_size == 50


def test_what_was_lost_is_counted() -> None:
    rounds = [{"command": "train", "fault": "kill", "lost": lost} for lost in (None, None, "hangs")]
    result = {"rounds": rounds, "date": "d", "machine": "m", "torch": "t", "cpu_seconds": 1.0}
    assert "| `train` | kill -9 at a random moment | 3 | 2 | 1 |" in table(result)
    assert "| **all of them** | 3 | 2 | **1** |" in table(result)


def test_rounds_of_some_faults_take_the_place_of_those_that_were_there() -> None:
    def result(*rounds: tuple[str, str | None]) -> dict[str, Any]:
        return {
            "cpu_seconds": 2.0,
            "rounds": [{"command": "train", "fault": fault, "lost": lost} for fault, lost in rounds],
        }

    found = added(result(("kill", None), ("full", "hangs"), ("full", None)), result(("full", None)))
    assert found == {**result(("kill", None), ("full", None)), "cpu_seconds": 4.0}


def test_the_page_shows_the_table_of_the_last_run_and_nothing_was_lost() -> None:
    result, page = json.loads(RESULT.read_text()), PAGE.read_text()
    assert with_table(page, result) == page
    assert not [round for round in result["rounds"] if round["lost"]]
    kills = [(round["command"], round["fault"]) for round in result["rounds"]]
    for command in ("prepare", "train"):
        assert kills.count((command, "kill")) >= 20 and kills.count((command, "kill_writing")) >= 20
        assert {fault for name, fault in kills if name == command} >= set(fault_injection.FAULTS) - {"tmpfs"}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_round_of_each_fault_is_survived(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "tools/fault_injection.py"), "--rounds", "1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = json.loads(output.read_text())["rounds"]
    assert {round["command"] for round in rounds} == {"prepare", "train"} and not any(round["lost"] for round in rounds)

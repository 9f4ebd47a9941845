"""The command ``python tests/on_gpu.py``, tried on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(__file__).parent / "on_gpu.py"


def on_cpu(directory: Path, *arguments: str) -> dict[str, Any]:
    out = directory / "found.json"
    command = [sys.executable, str(COMMAND), "--device", "cpu", "--out", str(out), *arguments]
    subprocess.run(command, cwd=directory, check=False)
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


@pytest.mark.slow
def test_each_part_has_results(tmp_path: Path) -> None:
    small = ("--seeds", "10", "--lanes", "3", "--steps", "20", "--repeats", "1", "--minutes", "60")
    found = on_cpu(tmp_path, *small)
    assert {"card", "date", "versions", "device", "parts"} == found.keys()
    assert [name for name, part in found["parts"].items() if part["ok"]] == ["tests", "verify", "bench", "workloads"]
    assert {row["outcome"] for row in found["parts"]["tests"]["results"]} <= {"skipped", "passed"}
    assert all(row["seconds"] > 0 for name in ("verify", "bench") for row in found["parts"][name]["results"])


@pytest.mark.slow
def test_a_part_without_time_keeps_what_it_has_and_lets_the_others_run(tmp_path: Path) -> None:
    found = on_cpu(tmp_path, "--seeds", "100000000", "--minutes", "0.5", "--parts", "verify", "tests")
    late, tests = found["parts"]["verify"], found["parts"]["tests"]
    assert not late["ok"]
    assert "by force" in late["ended"]
    assert tests["results"]

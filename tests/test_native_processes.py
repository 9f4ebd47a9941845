"""First calls of the native engine from threads, forks and pools of processes, each in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from popart_func.engines import native

pytestmark = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")

BEGINNING = """
import concurrent.futures, multiprocessing, os, threading, time, torch
from popart_func.engines import scan_lanes

def step(c, x):
    return c + x, ()

def total(number=0, step=step):
    return scan_lanes(step, torch.zeros(2), torch.ones(3 + number), engine="native")[0][0].item()
"""

PROGRAMS = {
    "threads, one step": """
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(total, range(8))) == [3.0 + number for number in range(8)]
""",
    "threads, a step each": """
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    steps = [lambda c, x, number=number: (c + x * number, ()) for number in range(8)]
    assert list(pool.map(total, [0] * 8, steps)) == [3.0 * number for number in range(8)]
""",
    "forks, first calls": """
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(total, range(4)) == [3.0, 4.0, 5.0, 6.0]
""",
    "forks, after a call": """
total()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(total, range(4)) == [3.0, 4.0, 5.0, 6.0]
""",
    "spawned processes": """
if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(total, range(4))) == [3.0, 4.0, 5.0, 6.0]
""",
    "a fork beside a thread that asks the compiler": """
from popart_func.engines.native.cpu.compile import ask_compiler
answer = ask_compiler()  # which has not been read
if (child := os.fork()) == 0:
    os._exit(not (ask_compiler()() and total() == 3))
assert os.waitpid(child, 0)[1] == 0
assert "__x86_64__" in answer() or "__aarch64__" in answer()
""",
    "a fork beside a thread that traces": """
tracing = threading.Event()

def slow(c, x):
    tracing.set()
    time.sleep(0.5)
    return c + x, ()

thread = threading.Thread(target=total, args=(0, slow))
thread.start()
tracing.wait()
if (child := os.fork()) == 0:
    os._exit(total() != 3)
assert os.waitpid(child, 0)[1] == 0
thread.join()
""",
}


def start(tmp_path: Path, program: str) -> subprocess.Popen[str]:
    file = tmp_path / "program.py"
    file.write_text(BEGINNING + program)
    environment = {**os.environ, "POPART_FUNC_CACHE": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, str(file)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_first_calls(name: str, tmp_path: Path) -> None:
    process = start(tmp_path, PROGRAMS[name])
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors

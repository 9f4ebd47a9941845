"""First calls of the native engine from threads, forks and pools of processes, each in a new process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import new_process
import pytest
import torch

from popart_func.engines import native

pytestmark = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")

BEGINNING = """
import concurrent.futures, multiprocessing, os, threading, time, torch
from popart_func.engines import scan_lanes

torch.set_num_threads(3)

def step(c, x):
    return c + x, ()

def total(number=0, step=step):
    return scan_lanes(step, torch.zeros(100), torch.ones(3 + number), engine="native:lanes")[0][-1].item()

def count_threads():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else None
"""

PROGRAMS = {
    "threads, one step": """
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(total, range(8))) == [3.0 + number for number in range(8)]
""",
    "threads, a step each": """
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    steps = [lambda c, x, number=number: (c + x * number, ()) for number in range(4)]
    assert list(pool.map(total, [0] * 4, steps)) == [3.0 * number for number in range(4)]
""",
    "a step that needs TorchDynamo, which it can't have within a trace": """
choose = lambda c, x: (torch.cond(c > 0, lambda c: c + x, lambda c: c - x, (c,)), ())
assert scan_lanes(choose, torch.ones(1), torch.ones(600))[0] == 601
assert torch.cond(torch.tensor(True), lambda c: c + 1, lambda c: c - 1, (torch.ones(2),)).eq(2).all()
""",
    "forks, first calls": """
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(total, range(4)) == [3.0, 4.0, 5.0, 6.0]
""",
    "forks, after a call": """
total()
before = count_threads()
total(0, lambda c, x: (c - x, ()))
assert count_threads() == before, "kernels share their threads"
if torch.set_flush_denormal(True):
    carry, x = torch.full((400_000,), 1e-30), torch.full((1,), 1e-10)
    tiny, _ = scan_lanes(lambda c, x: (c * x, ()), carry, x, engine="native")
    torch.set_flush_denormal(False)
    assert not tiny.count_nonzero(), "all threads round as that of the caller does"
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(total, range(4)) == [3.0, 4.0, 5.0, 6.0]
if (child := os.fork()) == 0:
    os._exit(total() != 3 or count_threads() not in (None, 3))
assert os.waitpid(child, 0)[1] == 0, "a fork has threads of its own"
""",
    "a fork beside a thread that asks the compiler": """
from popart_func.engines.native.cpu.compile import ask_compiler
answer = ask_compiler()  # which has not been read
if (child := os.fork()) == 0:
    os._exit(not (ask_compiler()() and total() == 3))
assert os.waitpid(child, 0)[1] == 0
assert "__x86_64__" in answer() or "__aarch64__" in answer()
""",
    "little memory": """
import resource
BIG = 2**22

def wide(c, x):
    return c.flip(0) * 0.5 + x, ()

def limit(more):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))

run = lambda lanes: scan_lanes(wide, torch.zeros(lanes, BIG), torch.ones(2), engine="native:lanes")[0][0, 0].item()
assert run(1) == 1.5
limit(2**26)
try:
    run(1)
except MemoryError as error:
    assert "scan_lanes: native: there is no memory for a block of lanes" in str(error), error
else:
    raise AssertionError("a block of 16 lanes has 2**28 bytes")
limit(2**26)
torch.set_num_threads(64)  # whose stacks do not all fit
many = scan_lanes(step, torch.zeros(10000), torch.ones(300), engine="native")[0]
assert many.eq(300).all()
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


SPAWNED = """
if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(total, range(4))) == [3.0, 4.0, 5.0, 6.0]
"""


def environment(tmp_path: Path) -> dict[str, str]:
    return {"POPART_FUNC_CACHE": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}


LONG = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes ignore
total()
torch.set_num_threads(1)
long = scan_lanes(lambda c, x: ((c * 0.5).sin(), ()), torch.zeros(1000), length=10**8, engine="native")
"""


def test_an_interrupt_ends_a_long_run_within_a_second(tmp_path: Path) -> None:
    """After the kernel has been built; the run would take minutes."""
    program = new_process.start(BEGINNING + LONG, environment=environment(tmp_path))
    process = program.process
    try:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "cache").glob("*.sha256"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)
        assert process.is_alive()
        began = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        result = program.wait(60)
        assert time.monotonic() - began < 2, "1 s, and what Python takes to end"
        assert "KeyboardInterrupt" in result.stderr
    finally:
        program.kill()


@pytest.mark.parametrize("name", PROGRAMS)
def test_first_calls(name: str, tmp_path: Path) -> None:
    result = new_process.run(BEGINNING + PROGRAMS[name], environment=environment(tmp_path))
    assert result.returncode == 0, result.stderr


def test_spawned_processes(tmp_path: Path) -> None:
    """They import the file of the program."""
    file = tmp_path / "program.py"
    file.write_text(BEGINNING + SPAWNED)
    command, variables = [sys.executable, str(file)], {**os.environ, **environment(tmp_path)}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr

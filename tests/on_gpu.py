"""All that a GPU can tell, in one command: ``python tests/on_gpu.py``, from a checkout, in under 8 minutes.

Runs the tests that need a device, all checks of `popart_func.verify`, the benchmark, and its workloads. Needs PyTorch,
optree, JAX and pytest, and installs nothing. Each part is a process of its own and ends in time; one that fails keeps
none of the others from running. The results are in one JSON file, which is written after each part.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

Row = dict[str, Any]
"""One result; one with ``"error"`` has failed."""

Emit = Callable[[Row], None]
"""Takes a result as soon as it is there."""

AGAIN = 75
"""The exit status of a part that goes on in another process, since a kernel has broken this one's device context."""

EXPERIMENTS = ("cloudpickle", "cyclopts", "filelock", "loky", "matplotlib", "rich", "xarray", "zarr")
"""What the package of the benchmark imports, and the benchmark does not use."""


def run_tests(options: argparse.Namespace, done: list[Row], emit: Emit) -> None:
    """The tests that are marked ``gpu``, without those that are done."""
    import pytest

    class Recorder:
        session: Any = None

        def pytest_sessionstart(self, session: Any) -> None:
            self.session = session

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when != "call" and report.passed:
                return
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            if report.failed:
                row["error"] = report.longreprtext[-2000:]
                self.stop_if_broken()
            emit(row)

        def stop_if_broken(self) -> None:
            try:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            except RuntimeError as error:
                self.session.shouldstop = f"the device's context is broken: {error}"

    recorder = Recorder()
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    flags = ["-q", "-m", options.tests, "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"-c{ROOT}/pyproject.toml"]
    status = pytest.main([*files, *flags, *(f"--deselect={row['test']}" for row in done)], plugins=[recorder])
    if recorder.session.shouldstop:
        raise SystemExit(AGAIN)
    if status not in (0, 1):
        emit({"error": f"pytest ended with {status!r}"})


def verify(options: argparse.Namespace, done: list[Row], emit: Emit) -> None:
    """Each check over its seeds."""
    from popart_func.verify import CHECKS, run

    def check(name: str) -> Row:
        (outcome,) = run(name, seeds=range(options.seeds), device=options.device)
        row = {"seeds": len(outcome.seeds), "passed": outcome.passed, "skipped": outcome.skipped}
        if outcome.seeds:
            row |= {"worst_seed": outcome.worst_seed, "worst_ratio": float(outcome.ratios.max())}
        if outcome.passed is False:
            row["error"] = f"the error is {row['worst_ratio']} times what is allowed, with seed {outcome.worst_seed}"
        return row

    for name in CHECKS:
        emit(attempt({"check": name}, lambda name=name: check(name)))


def bench(options: argparse.Namespace, done: list[Row], emit: Emit) -> None:
    """The paper's regression: each engine, JAX, and one module for each seed."""
    from absent_packages import stand_in

    stand_in(EXPERIMENTS)
    from popart_func.engines import available_engines
    from popart_func.experiments.bench import compare
    from popart_func.experiments.names import COMPETITORS

    def measure(lanes: int, name: str) -> Row:
        reason = available_engines(options.device).get(name)
        if reason is not None:
            return {"skipped": reason}
        (result,) = compare(
            [lanes], engines=[name], device=options.device, steps=options.steps, repeats=options.repeats
        )
        return result._asdict()

    for lanes in options.lanes:
        for name in ("native", "jax", "jax_lanes_last", "jax_traced", "eager", "reference", "inductor"):
            assert name in (*available_engines(options.device), *COMPETITORS)
            emit(attempt({"lanes": lanes, "engine": name}, lambda lanes=lanes, name=name: measure(lanes, name)))


def workloads(options: argparse.Namespace, done: list[Row], emit: Emit) -> None:
    """The first size of each workload on `native`, beside `eager` in its first steps."""
    from absent_packages import stand_in

    stand_in(EXPERIMENTS)
    import optree

    from popart_func.engines import scan_lanes
    from popart_func.experiments.workload_bench import WORKLOADS

    def measure(name: str) -> Row:
        make, (size, *_) = WORKLOADS[name]
        case = make(**size)
        few = min(20, case.steps)
        start, xs = optree.tree_map(lambda leaf: leaf.to(options.device), (case.start, case.xs))
        first = optree.tree_map(lambda leaf: leaf[:few], xs) if xs is not None else None
        device = torch.device(options.device)

        def run(engine: str, xs: Any, steps: int) -> torch.Tensor:
            with device:  # what the step makes itself lies there too
                ys = scan_lanes(case.step, start, xs, length=steps, shared=False, engine=engine)[1]
            return ys.cpu()

        began = time.perf_counter()
        ours = run("native", first, few)
        compiled, expected = time.perf_counter() - began, run("eager", first, few)
        seconds = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            run("native", xs, case.steps)
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds)
        row = {"size": case.size, "lanes": case.lanes, "steps": case.steps, "first_seconds": compiled}
        row["difference"] = float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        row["ns_per_lane_step"] = 1e9 * median / (case.lanes * case.steps)
        row["gflops"] = 1e-9 * case.flops * case.lanes * case.steps / median
        if not row["difference"] < 1e-3:
            row["error"] = f"native differs from eager by {row['difference']} of the largest number"
        return row

    for name in WORKLOADS:
        emit(attempt({"workload": name}, lambda name=name: measure(name)))


PARTS: dict[str, tuple[Callable[[argparse.Namespace, list[Row], Emit], None], float]] = {
    "tests": (run_tests, 0.4),
    "verify": (verify, 0.2),
    "bench": (bench, 0.2),
    "workloads": (workloads, 0.2),
}
"""By name: what finds a part's results, and its share of the time."""


def attempt(about: Row, measure: Callable[[], Row]) -> Row:
    """A result and how long it took; in place of one that fails, why."""
    began = time.perf_counter()
    try:
        row = about | measure()
    except Exception as error:
        row = about | {"error": f"{type(error).__name__}: {error}"[-2000:]}
    return row | {"seconds": time.perf_counter() - began}


def run_part(name: str, arguments: list[str], seconds: float, rows: Path) -> Row:
    """Runs a part in a process of its own, and ends it when its time is over."""
    began, status, found = time.perf_counter(), AGAIN, -1
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # PyTorch needs memory, too
    command = [sys.executable, __file__, *arguments, "--part", name, "--rows", str(rows)]
    while status == AGAIN and len(read(rows)) > found:  # as long as each process finds something
        found = len(read(rows))
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
        try:
            status = process.wait(timeout=max(1, seconds - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = read(rows)
    return {
        "ok": status == 0 and not any("error" in row for row in results),
        "ended": "in time" if status is not None else f"after {seconds:.0f} seconds, by force",
        "status": status,
        "seconds": time.perf_counter() - began,
        "failed": [row for row in results if "error" in row],
        "results": results,
    }


def read(rows: Path) -> list[Row]:
    text = rows.read_text("utf-8") if rows.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last line may be cut off


def about_here(device: str) -> Row:
    """Card, date and versions."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "commit": None}
    for package in ("torch", "jax", "optree", "numpy", "pytest"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        versions["commit"] = found.stdout.strip()
    card = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"card": card, "date": date, "versions": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the command itself")
    parser.add_argument("--out", type=Path, default=Path("on_gpu.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--tests", default="gpu and not slow", help="which tests, by markers")
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--steps", type=int, default=5004)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        with options.rows.open("a", encoding="utf-8") as file:
            find, _ = PARTS[options.part]
            find(options, read(options.rows), lambda row: print(json.dumps(row), file=file, flush=True))
        return 0
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: PyTorch finds no CUDA device; --device cpu tries the command itself.")
    found: Row = about_here(options.device) | {"device": options.device, "parts": {}}
    end = time.perf_counter() + 60 * options.minutes
    for number, name in enumerate(options.parts):
        shares = [PARTS[part][1] for part in options.parts[number:]]
        rows = options.out.with_suffix(f".{name}.jsonl").absolute()
        rows.unlink(missing_ok=True)
        part = run_part(name, sys.argv[1:], (end - time.perf_counter()) * shares[0] / sum(shares), rows)
        rows.unlink(missing_ok=True)
        found["parts"][name] = part
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {'ok' if part['ok'] else 'FAILED'}, {len(part['results'])} results in {part['seconds']:.0f} s")
        for row in part["failed"]:
            print(f"  {row}"[:600])
    print(f"wrote {options.out}")
    return int(not all(part["ok"] for part in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())

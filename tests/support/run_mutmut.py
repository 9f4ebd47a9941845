"""Runs the mutants that mutmut writes, each on the tests that reach its line, until one of them fails.

    python tests/support/run_mutmut.py 'popart_func.moments.*' tests/test_art.py tests/test_weights.py

All is imported once, and each mutant is tried by a fork of that process: most take less than a second. JAX is imported,
but starts its threads in the forks only. `[tool.mutmut]` in `pyproject.toml` names what is mutated. A line of
`mutants/results.jsonl` tells of a mutant: ``killed`` and by which test, ``survived`` and how many tests it passed,
``timeout``, or ``unreached``. Mutants that are in this file are not run again, but for the last kind.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

COVERAGE = "coverage.sqlite"
SECONDS = 3
"""Tests that take longer run only for mutants that no other test reaches."""


def write_mutants() -> None:
    """Writes `mutants/`, a copy of the package where a trampoline chooses among the variants of each function."""
    from mutmut import __main__ as mutmut

    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.create_mutants(1)


def lines_of(function: ast.FunctionDef, line: int) -> Iterator[int]:
    """The lines of the statement, or of the head of the block, that a line belongs to."""
    within = [n for n in ast.walk(function) if isinstance(n, ast.stmt) and n.lineno <= line <= (n.end_lineno or 0)]
    innermost = max(within, key=lambda node: (node.lineno, -(node.end_lineno or 0)))
    body = getattr(innermost, "body", None)
    yield from range(innermost.lineno, body[0].lineno if body else (innermost.end_lineno or 0) + 1)


def mutants(pattern: str) -> Iterator[tuple[str, str, list[int], list[int]]]:
    """Each mutant's name, its file, the lines that it changes in the unchanged function, and all lines of that."""
    for meta in sorted(Path("popart_func").rglob("*.meta")):
        path = meta.with_suffix("")
        names = [name for name in json.loads(meta.read_text())["exit_code_by_key"] if fnmatch.fnmatch(name, pattern)]
        source = path.read_text().splitlines() if names else []
        nodes = ast.walk(ast.parse("\n".join(source)))
        functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        for name in names:
            variant = functions[name.rpartition(".")[2]]
            original = functions[variant.name.rpartition("__mutmut_")[0] + "__mutmut_orig"]
            texts = [source[node.lineno : node.end_lineno] for node in (original, variant)]
            offset = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
            every = list(range(original.lineno, (original.end_lineno or 0) + 1))
            yield name, str(path), list(lines_of(original, original.lineno + 1 + offset)), every


class Runner:
    """Runs the tests in forks, in place of pytest's own loop."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.failed = pattern, ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid

    def run(self, items: list[pytest.Item]) -> str:
        """The first test that fails, or nothing."""
        self.failed = ""
        for place, item in enumerate(items):
            following = items[place + 1] if place + 1 < len(items) else None
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                break
        return self.failed

    def survey(self, items: list[pytest.Item]) -> dict[str, float]:
        """The seconds of each test that passes; writes which lines it reaches."""
        recorder = coverage.Coverage(data_file=COVERAGE, include=["popart_func/*"])
        recorder.start()
        seconds = {}
        for item in items:
            recorder.switch_context(item.nodeid)
            start = time.process_time()
            if self.run([item]):
                print("fails unchanged:", item.nodeid, file=sys.stderr)
            else:
                seconds[item.nodeid] = time.process_time() - start
        recorder.stop()
        recorder.save()
        return seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        status, seconds = in_a_fork(lambda: self.survey(session.items), 3600)
        assert seconds, f"the survey ended with status {status}"
        reached: dict[tuple[str, int], set[str]] = defaultdict(set)
        data = coverage.CoverageData(COVERAGE)
        data.read()
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                reached[os.path.relpath(file), line].update(contexts)
        items = {item.nodeid: item for item in session.items}
        results = Path("results.jsonl")
        before = map(json.loads, results.read_text().splitlines() if results.exists() else [])
        done = {found["mutant"] for found in before if found["state"] != "unreached"}
        killers: dict[str, Counter[str]] = defaultdict(Counter)
        for name, path, *places in mutants(self.pattern):
            if name in done:
                continue
            kills = killers[name.rpartition("__mutmut_")[0]]
            # A default is read where no test is recorded: it is tried on the tests that reach its function.
            reaching = (set().union(*(reached[path, line] for line in lines)) & set(seconds) for lines in places)
            tests = next(filter(None, reaching), set())
            tests = {test for test in tests if seconds[test] < SECONDS} or tests
            in_turn = sorted(tests, key=lambda test: (-kills[test], seconds[test]))
            os.environ["MUTANT_UNDER_TEST"], start = name, time.time()
            limit = 10 + 5 * sum(seconds[test] for test in in_turn)
            status, killer = in_a_fork(lambda: self.run([items[test] for test in in_turn]), limit)  # noqa: B023
            os.environ["MUTANT_UNDER_TEST"] = ""
            state = "killed" if killer else "unreached" if not tests else "survived" if status == 0 else "timeout"
            kills[killer or ""] += 1
            found = {
                "mutant": name,
                "state": state,
                "tests": len(tests),
                "by": killer,
                "seconds": round(time.time() - start, 2),
            }
            with results.open("a") as file:
                print(json.dumps(found), file=file)
        return True


def in_a_fork(run: Any, seconds: float) -> tuple[int, Any]:
    """A fork's exit status and what it returns; it ends after so many seconds of CPU time."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
        result = run()
        with os.fdopen(writable, "w") as file:
            json.dump(result, file)
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as file:
        text = file.read()
    return os.waitpid(pid, 0)[1], json.loads(text) if text else None


def main() -> int:
    pattern, *tests = sys.argv[1:]
    # One thread, since a fork lacks the others; and no header precompiled for `g++` in each fork.
    os.environ.update(OMP_NUM_THREADS="1", CXX="c++", MUTANT_UNDER_TEST="mutant_generation")
    os.environ.update(JAX_COMPILATION_CACHE_DIR=os.path.abspath("mutants/jax_cache"))
    os.environ.update(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1")
    write_mutants()
    os.environ["MUTANT_UNDER_TEST"] = ""
    os.chdir("mutants")
    sys.path.insert(0, os.getcwd())
    sys.path[:] = [folder for folder in sys.path if folder != str(Path.cwd().parent)]
    return pytest.main(["-q", "-p", "no:cacheprovider", "--capture=no", *tests], plugins=[Runner(pattern)])


if __name__ == "__main__":
    sys.exit(main())

"""The compiler that the native engine finds, and the kernels that it keeps on disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import new_process
import pytest
import torch

from popart_func.engines import EngineUnavailableError, native, scan_lanes
from popart_func.engines.compiler import compiler
from popart_func.engines.native.cache import cache_directory, cache_limit, clear_cache, keep_source, kept_kernels

pytestmark = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")


def test_a_kernel_on_disk_serves_the_next_process(tmp_path: Path) -> None:
    program = """
import sys, torch
from popart_func.engines import native
from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.native.cpu import compile
if sys.argv[1] == "no compiler":
    compile._compile = None
scan = make_lane_scan("scan_lanes", lambda c, x: (c + x, c), torch.zeros(3), torch.arange(4.0))
print(native.run(scan)[0].tolist())
"""
    environment = {"POPART_FUNC_CACHE": str(tmp_path / "cache")}
    for argument in ("a compiler", "no compiler"):
        result = new_process.run(program, arguments=[argument], environment=environment)
        assert result.stdout == "[6.0, 6.0, 6.0]\n", result.stderr
    (library,) = (tmp_path / "cache").glob("*.so")
    assert library.suffix == ".so"
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("POPART_FUNC_CACHE", str(tmp_path))
    with pytest.raises(PermissionError, match="only you may write to it"):
        cache_directory()


DAMAGES = """
import pathlib, shutil, sys, os, torch
from popart_func import scan

def total():
    print(scan(lambda c, x: (c + x, c), torch.tensor(0.0), torch.ones(3), engine="native")[0].item(), flush=True)

whole = pathlib.Path(os.environ["POPART_FUNC_CACHE"])
total()
(kernel,) = whole.glob("*.so")
content = kernel.read_bytes()
half = len(content) // 2
for name, damaged in (("truncated", content[:4096]), ("empty", b""), ("zeros", content[:half] + bytes(half))):
    print(name, end=" ", flush=True)
    copy = shutil.copytree(whole, whole.with_name(name))
    (copy / kernel.name).write_bytes(damaged)
    os.environ["POPART_FUNC_CACHE"] = str(copy)
    total()
    assert len((copy / kernel.name).read_bytes()) > half, name
"""


def test_a_damaged_kernel_is_built_anew(tmp_path: Path) -> None:
    """In a process of its own: loading a damaged kernel would be the end of this one. The output says at which."""
    (tmp_path / "whole").mkdir(mode=0o700)
    result = new_process.run(DAMAGES, environment={"POPART_FUNC_CACHE": str(tmp_path / "whole")})
    assert result.stdout == "3.0\ntruncated 3.0\nempty 3.0\nzeros 3.0\n", result.stderr
    assert result.returncode == 0, result.stderr


def step_of(value: float) -> Any:
    """A new step with a kernel of its own."""
    return lambda c, x: (c * value + 1, c)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POPART_FUNC_CACHE", str(tmp_path / "cache"))
    return cache_directory()


def test_the_source_is_kept_beside_the_kernel(cache: Path) -> None:
    scan_lanes(step_of(2.5), torch.zeros(2), length=1, engine="native")
    (library,) = cache.glob("*.so")
    text = library.with_suffix(".cpp").read_text()
    assert "run_block" in text
    assert float.hex(2.5) in text
    assert sorted(path.suffix for path in cache.iterdir()) == [".cpp", ".sha256", ".so"]  # nothing half written
    library.with_suffix(".cpp").unlink()
    scan_lanes(step_of(2.5), torch.zeros(2), length=1, engine="native")
    assert library.with_suffix(".cpp").read_text() == text, "a kernel that was kept without its source gets it"


@pytest.mark.parametrize("function", ["mkstemp", "fdopen", "replace"])
def test_a_source_that_can_not_be_kept_is_let_go(function: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a read-only cache no file can be made; in a full one it can't be written."""
    scan_lanes(step_of(3.5), torch.zeros(2), length=1, engine="native")
    (source,) = cache.glob("*.cpp")
    source.unlink()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile if function == "mkstemp" else os, function, refuse)
        assert scan_lanes(step_of(3.5), torch.ones(2), length=1, engine="native")[0].tolist() == [4.5, 4.5]
    assert sorted(path.suffix for path in cache.iterdir()) == [".sha256", ".so"]


def test_a_kept_source_is_not_written_again(tmp_path: Path) -> None:
    keep_source(tmp_path / "kernel.cpp", "first")
    keep_source(tmp_path / "kernel.cpp", "second")
    assert (tmp_path / "kernel.cpp").read_text() == "first"
    keep_source(tmp_path / "no such directory" / "kernel.cpp", "third")


def kernel_in(cache: Path, number: int, *, used: float, size: int = 1000) -> Path:
    """Puts a kernel into a cache: half of its bytes compiled, half source."""
    library = cache / f"{number:032x}.so"
    for path in (library, library.with_suffix(".cpp")):
        path.write_bytes(bytes(size // 2))
        os.utime(path, (used, used))
    library.with_suffix(".sha256").touch()
    os.utime(library.with_suffix(".sha256"), (used, used))
    return library


def test_kernels_used_longest_ago_are_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing but kernels: a user may name a folder of their own."""
    (cache / "notes.txt").write_bytes(bytes(10**6))
    kernels = [kernel_in(cache, number, used=1000 + number, size=300_000) for number in range(5)]
    keep_source(kernels[0].with_suffix(".cpp"), "used just now")
    (cache / f"{kernels[1].stem}a1b2.part").touch()  # left by a process that was killed
    os.utime(cache / f"{kernels[1].stem}a1b2.part", (1, 1))
    left = cache / f"{9:032x}abcd"  # by a compilation that was killed
    left.mkdir()
    (left / "kernel.cpp").write_bytes(bytes(250_000))
    os.utime(left, (2, 2))
    monkeypatch.setenv("POPART_FUNC_CACHE_MB", "1")
    assert [kernel.files[-1] for kernel in kept_kernels(cache)] == [left, *kernels[1:], kernels[0]]
    assert kept_kernels(cache)[0].size > 250_000
    scan_lanes(step_of(5.5), torch.zeros(2), length=1, engine="native")
    assert [kernel.exists() for kernel in kernels] == [True, False, False, True, True]
    assert sum(kernel.size for kernel in kept_kernels(cache)) <= 10**6
    assert len(kept_kernels(cache)) == 4, "the new one, too"
    assert not list(cache.glob("*.part"))
    assert not left.exists()
    assert (cache / "notes.txt").exists()


def test_a_kernel_that_is_found_is_noted_as_used(cache: Path) -> None:
    scan_lanes(step_of(6.5), torch.zeros(2), length=1, engine="native")
    for path in cache.iterdir():
        os.utime(path, (1, 1))
    (before,) = kept_kernels(cache)
    native.cpu.compile.build((cache / before.files[0].with_suffix(".cpp")).read_text())
    (after,) = kept_kernels(cache)
    assert (before.used, after.used > 10**9) == (1, True)


def test_no_kernel_is_removed_while_another_process_loads_one(cache: Path) -> None:
    kernel = kernel_in(cache, 1, used=1)
    program = """
import sys
from popart_func.engines.native.cache import shares_cache
shares_cache(lambda: (print("loading", flush=True), sys.stdin.read()))()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "loading\n"
        assert clear_cache(cache) == []
        assert kernel.exists()
        other.communicate("")
    assert [removed.files[-1] for removed in clear_cache(cache)] == [kernel]
    assert list(cache.iterdir()) == []


def test_processes_that_crowd_each_other_out(tmp_path: Path) -> None:
    """Each new kernel removes all others; whoever needs one compiles it anew, and none fails."""
    program = """
import sys, torch
from popart_func import scan
for number in range(4):
    factor = 1 + number % 2
    step = eval(f"lambda c, x: (c * {factor}.25, c)")
    found = scan(step, torch.tensor(1.0), length=2, engine="native")[0].item()
    assert found == (factor + 0.25) ** 2, found
"""
    environment = {"POPART_FUNC_CACHE": str(tmp_path / "cache"), "POPART_FUNC_CACHE_MB": "0"}
    started = [new_process.start(program, environment=environment) for _ in range(3)]
    ended = [process.wait(120) for process in started]
    assert [process.returncode for process in ended] == [0, 0, 0], ended


def test_a_limit_that_is_no_number_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("much", "-1", "1e3"):
        monkeypatch.setenv("POPART_FUNC_CACHE_MB", given)
        with pytest.raises(native.BuildError, match=f"must be a whole number of megabytes, got '{given}'"):
            cache_limit()


def test_the_command_shows_and_clears(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from popart_func.cli import main

    kernel = kernel_in(cache, 1, used=1, size=3_000_000)
    (cache / "notes.txt").touch()
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"folder   {cache}\nkept     1 kernel, 3.0 MB, 1,000.0 MB at most\n"
    assert kernel.exists()
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == (
        f"folder   {cache}\nremoved  1 kernel, 3.0 MB\nkept     0 kernels, 0.0 MB, 1,000.0 MB at most\n"
    )
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]


def test_says_that_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "set CXX" in (native.why_not(torch.device("cpu")) or "")
    assert "not on meta" in (native.why_not(torch.device("meta")) or "")


def test_the_compiler_that_is_asked_for_is_taken_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    found = compiler()
    assert found is not None
    monkeypatch.setenv("CXX", f"{found[0]} -DEXTRA")
    assert compiler() == (found[0], "-DEXTRA")
    assert scan_lanes(lambda c, x: (c + 1, c), torch.zeros(1), length=1, engine="native")[0] == 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX is 'no-such-compiler', which was not found" in (native.why_not(torch.device("cpu")) or "")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("{here}", "is a directory"),
        ("{here}/file", "may not be executed"),
        ("{here}/none", "was not found"),
        ("g++ 'half", r"can't be read as a command \(No closing quotation\)"),
        ('"', r"can't be read as a command"),
        (" ", "is blank"),
        ("''", "was not found"),
    ],
)
def test_an_odd_compiler_is_named_with_what_is_odd(
    command: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch(mode=0o644)
    monkeypatch.setenv("CXX", command.format(here=tmp_path))
    message = rf"CXX is .*, which {why}.*: set it to a C\+\+ compiler, or unset it\."
    for engine in ("native", "inductor"):
        with pytest.raises(EngineUnavailableError, match=message):
            scan_lanes(step_of(4.5), torch.zeros(2), length=1, engine=engine)
    with pytest.warns(UserWarning, match=message):
        assert scan_lanes(step_of(4.5), torch.zeros(1), length=600)[0].isinf().all(), "auto goes on with eager"


@pytest.mark.parametrize(
    ("content", "why"), [("hello", r"can't be run \(Exec format"), ("#!/bin/sh", "wrote no kernel")]
)
def test_an_executable_file_that_is_no_compiler_is_named(
    content: str, why: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "odd").write_text(content)
    (cache / "odd").chmod(0o700)
    monkeypatch.setenv("CXX", str(cache / "odd"))
    message = (
        rf"native: .*/odd is taken for the C\+\+ compiler, but {why}.*: set CXX to a C\+\+ compiler, or unset it\."
    )
    with pytest.raises(native.BuildError, match=message):
        scan_lanes(step_of(4.75), torch.zeros(2), length=1, engine="native")


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        monkeypatch.setenv("POPART_FUNC_CACHE", str(tmp_path / name))
        with pytest.raises(native.BuildError, match="POPART_FUNC_CACHE must name a directory that can be made"):
            cache_directory()


def test_a_cache_that_can_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path, prefix: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setenv("POPART_FUNC_CACHE", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(native.UnsupportedError, match=r"no kernel can be kept in .*Read-only.*Set POPART_FUNC_CACHE"):
        scan_lanes(lambda c, x: (c + 23, c), torch.zeros(2), length=1, engine="native")

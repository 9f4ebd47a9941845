"""Every annotation is enforced; every test starts from a seed of its own, printed when it fails.

Where the packages that check them are missing, annotations are not checked, and a test module that needs what is
missing is skipped: so the tests run on a borrowed machine that has PyTorch and pytest alone.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

# No collection while the test modules are imported; see `pytest_collection_finish`.
gc.disable()

MISSING = [name for name in ("beartype", "hypothesis", "jaxtyping") if importlib.util.find_spec(name) is None]

if not MISSING:
    import annotation_checks
    import hypothesis
    import jaxtyping

    # The same examples in every run; a failure prints its own.
    hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("steady")

    # Packages' own __init__ modules are left out, since a name stands for all below it; so is what Dynamo must read.
    SOURCES = Path(importlib.util.find_spec("popart_func").origin).parent
    MODULES = [
        ".".join(("popart_func", *path.relative_to(SOURCES).with_suffix("").parts))
        for path in sorted(SOURCES.rglob("*.py"))
        if path.stem not in ("__init__", "__main__", "inductor")
    ]
    jaxtyping.jaxtyped = annotation_checks.jaxtyped
    jaxtyping.install_import_hook(MODULES, "annotation_checks.check")


def pytest_report_header() -> str:
    return f"annotations are not checked, without {', '.join(MISSING)}" if MISSING else "annotations are checked"


class ModuleWithWhatIsThere(pytest.Module):
    """A test module that is skipped where a package is missing that it imports."""

    def collect(self) -> Any:
        try:
            return list(super().collect())
        except self.CollectError as error:
            if isinstance(error.__cause__, ModuleNotFoundError):
                pytest.skip(str(error.__cause__), allow_module_level=True)
            raise
        except SystemExit as error:  # the command line says which package it needs
            pytest.skip(str(error), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return ModuleWithWhatIsThere.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture(autouse=True, scope="session")
def checked_stages() -> None:
    """The native engine checks its representation between stages."""
    from popart_func.engines.native import validation  # not before the hook is installed

    validation.ENABLED = True


@pytest.fixture(autouse=True, scope="session")
def precompiled_headers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The C++ headers of the kernels are compiled once, not for each kernel: they take half of its time.

    GCC reads what it made of them in place of the headers, where the flags are the same; the kernels stay the same.
    """
    from popart_func.engines.compiler import compiler
    from popart_func.engines.native import c_code
    from popart_func.engines.native.cpu import compile

    if not any(Path(word).name.startswith("g++") for word in compiler() or ()):
        return
    folder = tmp_path_factory.getbasetemp()
    header = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "headers.hpp"
    with FileLock(f"{header}.lock"):
        if not header.exists():
            header.write_text("".join(re.findall(r"#include <.*>\n", c_code.header("cpu/kernel.hpp"))))
            subprocess.run([*compile._command(), *compile.FLAGS, "-x", "c++-header", str(header)], check=False)
    compile.FLAGS = (*compile.FLAGS, "-include", str(header))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    number = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(number)
    request.node.user_properties.append(("seed", number))
    return number


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    for name, value in item.user_properties:
        if report.failed and name == "seed":
            report.sections.append(("Random state", f"torch.manual_seed({value})"))
    return report


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without jaxtyping: for the library's own messages where a type is wrong, and for long loops."""
    if MISSING:
        yield
        return
    jaxtyped = jaxtyping.jaxtyped

    def plain(*, typechecker: Any) -> Callable[[Any], Any]:
        """Leaves functions made within functions alone: a learner built in each of 200 steps has many of them."""
        decorate = jaxtyped(typechecker=typechecker)
        return lambda part: part if "<locals>" in part.__qualname__ else decorate(part)

    monkeypatch.setattr(jaxtyping, "jaxtyped", plain)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def unoptimized_xla() -> Iterator[None]:
    """XLA without most of its optimizations, which take half of its time: for functions whose values alone count."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


LONGEST = ("test_notebooks", "test_verify_mutations", "test_workers")
"""Modules whose tests take long: they come first, so that at the end no process waits for another's long test."""


def pytest_collection_finish() -> None:
    """Keeps what the imports have made out of the collections during tests, which would look through it each time.

    There are fewer of them, too: JAX hangs its own collector on each.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

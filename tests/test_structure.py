"""The package's modules: no import circle, and imports that run in the order of `docs/architecture.md`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import popart_func

SOURCES = Path(popart_func.__file__).parent
ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"


def name_of(path: Path) -> str:
    parts = ("popart_func", *path.relative_to(SOURCES).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCES.rglob("*.py"))}


def imports(name: str) -> Iterator[str]:
    """The modules that a module imports, wherever in it that stands: inside functions and for annotations, too."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                within = f"{node.module}.{alias.name}"
                if within in MODULES:
                    yield within
                elif node.module in MODULES:
                    yield node.module


GRAPH = {name: set(imports(name)) for name in MODULES}


def unit(name: str) -> str:
    """What the page's order of layers is made of: a module or a folder of the package."""
    return name.split(".")[1] if "." in name else ""


def layers() -> list[set[str]]:
    """The page's order, the lowest layer first."""
    page = ARCHITECTURE.read_text(encoding="utf-8")
    (order,) = re.findall(r"^```\n(_typing.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    return [set(layer.replace(",", " ").split()) for layer in order.split("<-")]


def test_there_is_no_circle():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"an import circle: {' -> '.join(reversed(error.args[1]))}")


def test_every_module_has_a_layer():
    named = [name for layer in layers() for name in layer]
    assert sorted(named) == sorted({unit(name) for name in MODULES} - {"", "__main__"})


def test_no_import_runs_upward():
    height = {name: position for position, layer in enumerate(layers()) for name in layer}
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if unit(name) in height and unit(other) in height and height[unit(other)] > height[unit(name)]
    ]
    assert not upward

"""The documentation's examples run: those of docstrings, and the README's Python blocks."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import popart_func

MODULES = sorted(module.name for module in pkgutil.walk_packages(popart_func.__path__, "popart_func."))
OPTIONAL = {"popart_func.interop.torchrl": "torchrl"}
"""Modules for packages that the tests do not install."""
README = Path(__file__).parent.parent / "README.md"
PAGES = [page for page in sorted((README.parent / "docs").glob("*.md")) if "```python" in page.read_text("utf-8")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstrings(name):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0
    assert module.__doc__, "a module starts with its contract"
    assert all(hasattr(module, public) for public in getattr(module, "__all__", ()))


def test_doctests_are_found():
    """Doctest finds examples in modules that were imported through the import hook."""
    finder = doctest.DocTestFinder()
    examples = sum(len(test.examples) for test in finder.find(importlib.import_module("popart_func.pop_art")))
    assert examples >= 10


def test_readme(capsys, tmp_path, monkeypatch):
    """The README's blocks run one after the other in one namespace, and print what the comments after `print` say."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out.strip().splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(blocks), flags=re.MULTILINE)
    assert printed == promised


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(page):
    """Each block of a page runs by itself."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), {})

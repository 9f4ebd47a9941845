"""The documentation's examples run: those of docstrings, and the Python blocks of the README and of the pages."""

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
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text("utf-8"))]
REFERENCE = re.findall(r"automodule:: (\S+)", "".join(page.read_text("utf-8") for page in DOCS.glob("reference/*.md")))


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(page, capsys, tmp_path, monkeypatch):
    """A page's blocks run one after the other in one namespace, and print what the comments after `print` say."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)
    printed = capsys.readouterr().out.strip().splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(blocks), flags=re.MULTILINE)
    assert printed == promised


def test_every_page_is_in_a_table_of_contents():
    """Sphinx warns of a page that no table names; this says so without building anything."""
    named = re.findall(r"^(\w+(?:/\w+)*)$", (DOCS / "index.md").read_text("utf-8"), flags=re.MULTILINE)
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")} - {"index"}
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert sorted(named) == sorted(pages | notebooks)


def test_every_public_name_is_in_the_reference():
    documented = {name for module in REFERENCE for name in importlib.import_module(module).__all__}
    documented |= {module.rpartition(".")[2] for module in REFERENCE}
    assert set(popart_func.__all__) <= documented


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))], ids=str)
def test_links_to_files(page):
    """What a page links to within the repository is there."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []

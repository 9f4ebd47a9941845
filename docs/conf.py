"""Sphinx's configuration: ``sphinx-build -W docs site`` writes the documentation, without the network."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jaxtyping  # noqa: F401  # before popart_func, whose annotations then have shapes
import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import popart_func  # noqa: E402

project = "popart_func"
author = "The popart_func authors"
copyright = f"2026, {author}"
version = release = popart_func.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["jupyter_execute"]
html_theme = "furo"
html_title = f"popart_func {release}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
pygments_dark_style = "monokai"

# Tutorials are the notebooks beside this folder, with the outputs that are stored in them.
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# A name in single backticks is a cross-reference where it is one of this package's, else code.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False


def visit_math(translator: Any, node: nodes.Node) -> None:
    """Writes an equation as MathML, which browsers draw themselves."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    formula = latex2mathml.converter.convert(node.astext(), display=display)
    translator.body.append(f'<div class="equation">{formula}</div>' if display == "block" else formula)
    raise nodes.SkipNode


html_math_renderer = "mathml"

RULER = re.compile(r"^ *\|[ :|-]+\| *$")
"""The line below the head of a Markdown table."""

CONTRACT = re.compile(r"^(State|init|update): +")
"""The beginning of a line of a module's contract."""


def as_restructured_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turns a docstring's contract into a list of fields, and its Markdown table into a table."""
    lines[:] = [CONTRACT.sub(r":\1: ", line) for line in lines]
    ruler = next((place for place, line in enumerate(lines) if RULER.match(line)), None)
    if ruler is None:
        return
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in lines[ruler - 1 :]
        if line.strip().startswith("|") and not RULER.match(line)
    ]
    table = [".. list-table::", "   :header-rows: 1", ""]
    table += [f"   {'  -' if place else '* -'} {cell}" for row in rows for place, cell in enumerate(row)]
    lines[ruler - 1 : ruler + len(rows)] = [*table, ""]


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of a NamedTuple, which its docstring describes."""
    return True if str(obj.__doc__).startswith("Alias for field number") else None


def within_package(app: Sphinx, env: Any, node: Any, text: nodes.Node) -> nodes.Node | None:
    """Resolves a name that is relative to the package, such as `scales` or `optim.register_state`."""
    if node.get("refdomain") != "py":
        return None
    target = f"popart_func.{node['reftarget'].removeprefix('popart_func.')}"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, text)


def setup(app: Sphinx) -> None:
    """Registers what is above."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", within_package)

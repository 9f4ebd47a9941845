"""Mutation of functions: finds a part of a function in its syntax tree, and replaces or observes it.

A part is a statement or an expression, given as text. Local variables of the function may have other names than in the
text, so that a mutant survives the renaming of a local. ``_`` stands for any expression.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, NamedTuple

import pytest


class Mutant(NamedTuple):
    """A function with one part replaced, and the checks that must notice.

    Attributes:
        function: the function.
        line: the part.
        instead: the text that replaces the part; it uses the names of ``line``.
        red: the names of the checks that must fail, and no others may.
    """

    function: Callable[..., object]
    line: str
    instead: str
    red: set[str]


def mutate(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """Replaces the function by its mutant everywhere in the package."""
    code = code_of(source_of(mutant.function), mutant.line, mutant.instead, fixed_names(mutant.function))
    replace(monkeypatch, mutant.function, built(mutant.function, code))


def observe(monkeypatch: pytest.MonkeyPatch, mutants: dict[str, Mutant], reached: set[str]) -> None:
    """Makes the package add a mutant's name to ``reached`` whenever the mutant's part is about to run."""
    for function in {mutant.function for mutant in mutants.values()}:
        tree = ast.parse(source_of(function))
        own = {name: mutant.line for name, mutant in mutants.items() if mutant.function is function}
        found = [(find(tree, line, fixed_names(function))[0], name) for name, line in own.items()]
        monkeypatch.setattr(sys.modules[function.__module__], "_reached", reached.add, raising=False)
        code = _compiled(_Announce(found).visit(tree), f"observed: {function.__name__}")
        replace(monkeypatch, function, built(function, code))


def source_of(function: Callable[..., object]) -> str:
    return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))


def fixed_names(function: Callable[..., object]) -> set[str]:
    """The names in a function that are not local: globals and built-ins."""
    return {*vars(sys.modules[function.__module__]), *vars(builtins)}


def built(function: Callable[..., object], code: CodeType) -> object:
    """The function that a changed source defines, with the globals of the original."""
    scope: dict[str, object] = {}
    exec(code, vars(sys.modules[function.__module__]), scope)
    return scope[function.__name__]


def replace(monkeypatch: pytest.MonkeyPatch, original: object, other: object) -> None:
    """Puts another object in the place of the original in every module and class of the package."""
    for name, module in list(sys.modules.items()):
        if name.startswith("popart_func"):
            classes = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == name]
            for owner in (module, *classes):
                for attribute in [key for key, value in vars(owner).items() if value is original]:
                    monkeypatch.setattr(owner, attribute, other)


def code_of(source: str, line: str, instead: str, fixed: set[str]) -> CodeType:
    """The compiled source of a function, with a part replaced.

    Args:
        source: the source.
        line: the part.
        instead: its replacement, in the names of ``line``.
        fixed: the names that are not local.
    """
    tree, other = ast.parse(source), _part(instead)
    node, names = find(tree, line, fixed)
    if isinstance(node, ast.stmt) and isinstance(other, ast.expr):
        other = ast.Expr(other)
    return _compiled(_Swap(node, _Rename(names).visit(other)).visit(tree), f"mutant: {line}")


def find(tree: ast.AST, line: str, fixed: set[str]) -> tuple[ast.AST, dict[str, str]]:
    """The one place in a syntax tree that looks like a part, and its local names by those of the part.

    A place that has the part's own names takes precedence over places with other names.
    """
    pattern = _part(line)
    found = []
    for node in ast.walk(tree):
        names: dict[str, str] = {}
        if _looks_like(pattern, node, names, fixed):
            found.append((node, names))
    same = [one for one in found if all(name == there for name, there in one[1].items())]
    assert len(found) == 1 or same, f"{len(found)} places look like: {line}"
    assert len(same or found) == 1, f"{len(same)} places read: {line}"
    return (same or found)[0]


def _compiled(tree: ast.AST, name: str) -> CodeType:
    return compile(ast.fix_missing_locations(tree), name, "exec", flags=__future__.annotations.compiler_flag)


def _part(text: str) -> ast.AST:
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _looks_like(pattern: Any, node: Any, names: dict[str, str], fixed: set[str]) -> bool:
    """Whether a node has the form of a pattern; enters the local names into ``names``, by those of the pattern."""
    if isinstance(pattern, ast.Name) and pattern.id == "_":
        return isinstance(node, ast.expr)
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, ast.Name) and not {pattern.id, node.id} & fixed:
        return names.setdefault(pattern.id, node.id) == node.id and list(names.values()).count(node.id) == 1
    if isinstance(pattern, ast.AST):
        return all(
            _looks_like(getattr(pattern, field), getattr(node, field), names, fixed)
            for field in pattern._fields
            if field not in ("ctx", "type_comment")
        )
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(
            _looks_like(one, other, names, fixed) for one, other in zip(pattern, node, strict=True)
        )
    return pattern == node


class _Rename(ast.NodeTransformer):
    """Renames variables."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)


class _Swap(ast.NodeTransformer):
    """Replaces one node by another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


class _Announce(ast.NodeTransformer):
    """Makes nodes call ``_reached`` with their names before they run."""

    def __init__(self, found: Iterable[tuple[ast.AST, str]]) -> None:
        self.found = list(found)

    def visit(self, node: ast.AST) -> Any:
        names = [name for part, name in self.found if part is node]
        self.generic_visit(node)
        calls = [ast.Call(ast.Name("_reached", ast.Load()), [ast.Constant(name)], []) for name in names]
        if not calls:
            return node
        if isinstance(node, ast.stmt):
            return [*(ast.Expr(call) for call in calls), node]
        return ast.Subscript(ast.Tuple([*calls, node], ast.Load()), ast.Constant(-1), ast.Load())

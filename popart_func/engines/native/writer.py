"""A writer of C++: lines, blocks, loops over axes and lanes, and the values of expressions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from popart_func.engines.native.c_code import C_TYPES, literal
from popart_func.engines.native.expressions import Buffer, Const, Expr, Iota, Load, Operation
from popart_func.engines.native.layouts import StridedLayout, address
from popart_func.engines.native.plan import Storage
from popart_func.engines.native.statements import Pointwise

__all__ = ["CodeWriter", "operations"]


class CodeWriter:
    """The lines of a function. Within a loop over lanes, each value that has been computed has a name.

    Args:
        storage: where buffers lie.
        memory: what stands before a buffer's name: ``"b."`` where buffers are members of a struct.
        unrolled: loops of at most so many operations in all are unrolled by a pragma.
        team: whether a team of threads shares a lane: each thread takes every TEAM-th element.
    """

    def __init__(
        self,
        storage: Storage,
        memory: str,
        unrolled: int = 0,
        team: bool = False,
    ) -> None:
        self.lines: list[str] = []
        self.memory = memory
        self.storage = storage
        self._unrolled = unrolled
        self._team = team
        self._indent = ""
        self._names: dict[object, str] = {}
        self._count = 0
        self.bad = f"{memory}bad[l]"
        self.between = ""

    def line(self, text: str) -> None:
        """Adds a line, unless it is empty."""
        if text:
            self.lines.append(self._indent + text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """A block in braces after a head."""
        self.line(head + " {")
        self._indent += "  "
        yield
        self._indent = self._indent[:-2]
        self.line("}")

    @contextmanager
    def loops(self, names: Sequence[str], shape: Sequence[int], work: int = 1) -> Iterator[None]:
        """A loop for each axis that is longer than 1; ``work``: the operations inside."""
        long = [(name, size) for name, size in zip(names, shape, strict=True) if size != 1]
        for axis, (name, size) in enumerate(long):
            self._unroll(work * math.prod(inner for _, inner in long[axis:]))
            self.line(f"for (int {name} = 0; {name} < {size}; ++{name}) {{")
            self._indent += "  "
        yield
        for _ in long:
            self._indent = self._indent[:-2]
            self.line("}")

    @contextmanager
    def strided_loop(self, name: str, values: range, step: int, work: int) -> Iterator[None]:
        """A loop over every ``step``-th value; ``work``: the operations inside."""
        self._unroll(work * (len(values) // step))
        with self.block(f"for (int {name} = {values.start}; {name} < {values.stop}; {name} += {step})"):
            yield

    @contextmanager
    def each(self, names: Sequence[str], shape: Sequence[int], work: int = 1) -> Iterator[None]:
        """Loops whose rounds do not depend on each other; a team shares the rounds out."""
        if not self._team:
            with self.loops(names, shape, work):
                yield
            return
        # One loop over all elements instead of a loop for each axis, since only so are the threads' shares even. The
        # indices come back by division, of unsigned numbers, which is cheaper than of signed ones.
        with self.block(f"for (int e = MEMBER; e < {math.prod(shape)}; e += TEAM)"):
            inner = math.prod(shape)
            for name, size in zip(names, shape, strict=True):
                outer, inner = inner, inner // max(size, 1)
                if size != 1:
                    within = "unsigned(e)" if outer == math.prod(shape) else f"unsigned(e) % {outer}"
                    self.line(f"const int {name} = {within}{f' / {inner}' * (inner != 1)};")
            yield

    def _unroll(self, operations: int) -> None:
        """Has the coming loop unrolled if it is short: a GPU's registers can't be indexed, so indices must be known."""
        if operations <= self._unrolled:
            self.line("#pragma unroll")

    @contextmanager
    def lanes(self) -> Iterator[None]:
        """The loop over lanes, which is the innermost one, and is vectorized. Names of values end with it."""
        with self.block("LANES"):
            self._names = {}
            yield

    def value(self, expr: Expr, indices: Sequence[str]) -> str:
        """The name of an expression's value at an index in this lane; adds the lines that compute it."""
        if isinstance(expr, Const):
            return literal(expr)
        if isinstance(expr, Iota):
            return f"int64_t({address(expr.layout, indices)})"
        # A value is computed once: an operation is known by its identity, a load by its address as text, since views
        # make many loads of the same element.
        key: object = expr
        if isinstance(expr, Load):
            if expr.is_whole and expr.buffer in self._names:
                return self._names[expr.buffer]
            code = self.element(expr, indices)
            key = code
        else:
            if expr in self._names:
                return self._names[expr]
            operands = [self.value(operand, indices) for operand in expr.operands]
            code = expr.template.format(*operands).replace("BAD", self.bad)
        if key not in self._names:
            self._count += 1
            self._names[key] = name = f"v{self._count}"
            ctype = C_TYPES[expr.dtype]
            conversion = f"({ctype})({code})" if isinstance(expr, Operation) else code
            self.line(f"const {ctype} {name} = {conversion};")
        return self._names[key]

    def assign(self, statements: Sequence[Pointwise], indices: Sequence[str]) -> None:
        """Adds the lines of pointwise statements at an index; local buffers are not stored.

        All stores come after all loads: `in_place` relies on it where the new carry lies over the old.
        """
        stores = []
        for statement in statements:
            value = self.value(statement.value, indices)
            if statement.target.is_whole:
                self._names[statement.target.buffer] = value  # from here on, a read of the whole buffer is this value
            if statement.target.buffer not in self.storage.local:
                stores.append(f"{self.element(statement.target, indices)} = {value};")
        for store in stores:
            self.line(store)

    def element(self, load: Load, indices: Sequence[str]) -> str:
        """An element of a buffer as C++ that can be read and assigned to; adds the lines that check its indices."""
        moved = ""
        for index in load.dynamic:
            value = self.value(index.value, indices)
            self._count += 1
            wraps = "true" if index.wraps else "false"
            checked = f"checked_index({value}, {index.size}, {wraps}, {self.bad})"
            self.line(f"const int64_t d{self._count} = {checked};")
            moved += f" + d{self._count} * {index.stride}"
        return self.place(self.storage.place_of(load.buffer), load.layout, indices, moved)

    def place(self, buffer: Buffer, layout: StridedLayout, indices: Sequence[str], moved: str) -> str:
        """An element of a buffer that has memory as C++; ``moved`` is added to its place."""
        lane = "" if buffer.uniform else "[l]"
        return f"{self.memory_of(buffer)}[{address(layout, indices)}{moved}]{lane}"

    def memory_of(self, buffer: Buffer) -> str:
        """The name of the memory that a buffer has, which may be that of another one."""
        buffer = self.storage.place_of(buffer)
        if buffer.uniform:
            return buffer.name.replace("in", "u")
        return buffer.name if buffer in self.storage.windows else f"{self.memory}{buffer.name}"


def operations(values: Iterable[Expr]) -> int:
    """How many operations compute all the values; one that several values need counts once."""
    todo, seen = list(values), set()
    while todo:
        expr = todo.pop()
        if isinstance(expr, Operation) and expr not in seen:
            seen.add(expr)
            todo.extend(expr.operands)
    return len(seen)

"""Groups of statements as C++ loops, lanes innermost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from popart_func.engines.native.expressions import Buffer, Const, Expr, Iota, Layout, Load, Op
from popart_func.engines.native.ops import C_TYPES
from popart_func.engines.native.schedule import Group
from popart_func.engines.native.statements import ArgReduce, MatMul, Pointwise, Reduce, Scan, Scatter

__all__ = ["Body"]

TILE = 12
"""How many sums of a matrix product are kept in registers at once."""


class Body:
    """The lines of a function; values of the loop that is being written have names.

    Args:
        merged: buffers that are another one: the new carry, where it is written over the old.
        local: buffers that no one reads but the loop that computes them.
        memory: what stands before a buffer's name: ``"b."`` where buffers are a block's members.
        unrolled: loops that come to at most so many operations are unrolled, whatever the compiler thinks of it.
        team: whether TEAM threads share a lane: each takes every TEAM-th element.
        between: a line that stands between groups.
    """

    def __init__(
        self,
        merged: dict[Buffer, Buffer],
        local: set[Buffer],
        memory: str,
        unrolled: int = 0,
        team: bool = False,
        between: str = "",
    ) -> None:
        self.lines: list[str] = []
        self._unrolled = unrolled
        self._team = team
        self.between = between
        self.memory = memory
        self._merged = merged
        self._local = local
        self._indent = ""
        self._names: dict[object, str] = {}
        self._count = 0

    def line(self, text: str) -> None:
        """Adds a line, unless it is empty."""
        if text:
            self.lines.append(self._indent + text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Braces behind a head."""
        self.line(head + " {")
        self._indent += "  "
        yield
        self._indent = self._indent[:-2]
        self.line("}")

    @contextmanager
    def loops(self, names: Sequence[str], shape: Sequence[int], work: int = 1) -> Iterator[None]:
        """A loop for each axis that is longer than 1; ``work``: how many operations there are inside."""
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
    def each(self, names: Sequence[str], shape: Sequence[int], work: int = 1) -> Iterator[None]:
        """Loops whose rounds do not depend on each other: a team shares them out."""
        if not self._team:
            with self.loops(names, shape, work):
                yield
            return
        with self.block(f"for (int e = MEMBER; e < {math.prod(shape)}; e += TEAM)"):
            inner = math.prod(shape)
            for name, size in zip(names, shape, strict=True):
                outer, inner = inner, inner // max(size, 1)
                if size != 1:
                    within = "unsigned(e)" if outer == math.prod(shape) else f"unsigned(e) % {outer}"
                    self.line(f"const int {name} = {within}{f' / {inner}' * (inner != 1)};")
            yield

    def _unroll(self, operations: int) -> None:
        if operations <= self._unrolled:
            self.line("#pragma unroll")

    @contextmanager
    def lanes(self) -> Iterator[None]:
        """The loop over lanes; values that have a name have it in here only."""
        with self.block("LANES"):
            self._names = {}
            yield

    def group(self, group: Group) -> None:
        """The loops of a group."""
        self._group(group)
        self.line(self.between)

    def _group(self, group: Group) -> None:
        (first, *others) = group.statements
        if isinstance(first, Pointwise):
            self._pointwise(
                group.shape or (), [statement for statement in (first, *others) if isinstance(statement, Pointwise)]
            )
        elif isinstance(first, MatMul):
            (self._team_matmul if self._team else self._matmul)(first)
        elif isinstance(first, Scatter):
            self._scatter(first)
        elif isinstance(first, Reduce | ArgReduce):
            self._reduce(first)
        else:
            self._scan(first)

    def _pointwise(self, shape: Sequence[int], statements: Sequence[Pointwise]) -> None:
        indices = [f"i{axis}" for axis in range(len(shape))]
        statements = [statement for statement in statements if not self._is_idle(statement)]
        work = _operations(statement.value for statement in statements)
        with self.each(indices, shape, work), self.lanes():
            stores = []
            for statement in statements:
                value = self._value(statement.value, indices)
                if statement.target.is_whole:
                    self._names[statement.target.buffer] = value
                if statement.target.buffer not in self._local:
                    stores.append(f"{self._element(statement.target, indices)} = {value};")
            for store in stores:
                self.line(store)

    def _is_idle(self, statement: Pointwise) -> bool:
        """Whether it copies a buffer onto itself."""
        value = statement.value
        same = isinstance(value, Load) and self._merged.get(statement.target.buffer) is value.buffer
        return same and statement.target.is_whole and value.is_whole  # type: ignore[union-attr]

    def _value(self, expr: Expr, indices: Sequence[str]) -> str:
        """The name of an expression's value at an index, in this lane."""
        if isinstance(expr, Const):
            return _literal(expr)
        if isinstance(expr, Iota):
            return f"int64_t({_address(expr.layout, indices)})"
        key: object = expr
        if isinstance(expr, Load):
            if expr.is_whole and expr.buffer in self._names:
                return self._names[expr.buffer]
            code = self._element(expr, indices)
            key = code
        else:
            if expr in self._names:
                return self._names[expr]
            operands = [self._value(operand, indices) for operand in expr.operands]
            code = expr.template.format(*operands).replace("BAD", f"{self.memory}bad[l]")
            key = expr
        if key not in self._names:
            self._count += 1
            self._names[key] = name = f"v{self._count}"
            ctype = C_TYPES[expr.dtype]
            conversion = f"({ctype})({code})" if isinstance(expr, Op) else code
            self.line(f"const {ctype} {name} = {conversion};")
        return self._names[key]

    def _element(self, load: Load, indices: Sequence[str]) -> str:
        address = _address(load.layout, indices)
        for index in load.dynamic:
            value = self._value(index.value, indices)
            self._count += 1
            wraps = "true" if index.wraps else "false"
            checked = f"checked_index({value}, {index.size}, {wraps}, {self.memory}bad[l])"
            self.line(f"const int64_t d{self._count} = {checked};")
            address += f" + d{self._count} * {index.stride}"
        buffer = self._merged.get(load.buffer, load.buffer)
        if buffer.uniform:
            return f"{self._uniform(buffer)}[{address}]"
        return f"{self.memory}{buffer.name}[{address}][l]"

    def _uniform(self, buffer: Buffer) -> str:
        return buffer.name.replace("in", "u")

    def _accumulators(self, ctype: str, names: Sequence[str], start: str) -> None:
        for name in names:
            self.line(f"ALIGNED {ctype} {name}[L];")
        with self.lanes():
            self.line(" ".join(f"{name}[l] = {start};" for name in names))

    def _reduce(self, statement: Reduce | ArgReduce) -> None:
        shape = statement.value.shape
        indices = [f"i{axis}" for axis in range(len(shape))]
        ctype, work = C_TYPES[statement.value.dtype], 1 + _operations([statement.value])
        with self.each(indices[:-1], shape[:-1], work * shape[-1]), self.block(""):
            if isinstance(statement, Reduce):
                start = statement.start.replace("LOWEST", f"lowest_of<{ctype}>()")
                start = start.replace("GREATEST", f"greatest_of<{ctype}>()")
                self._accumulators(ctype, ["best"], start)
            else:
                self._accumulators("int64_t", ["position"], "0")
                self.line(f"ALIGNED {ctype} best[L];")
                with self.lanes():
                    first = statement.value
                    self.line(f"best[l] = {self._value(first, [*indices[:-1], '0'])};")
            with self.loops(indices[-1:], shape[-1:], work), self.lanes():
                value = self._value(statement.value, indices)
                if isinstance(statement, Reduce):
                    self.line(f"best[l] = ({ctype})({statement.combine.format('best[l]', value)});")
                else:
                    index = indices[-1] if shape[-1] != 1 else "0"
                    self.line(f"const bool better = {statement.better.format(value, 'best[l]')};")
                    self.line(f"best[l] = better ? {value} : best[l];")
                    self.line(f"position[l] = better ? int64_t({index}) : position[l];")
            with self.lanes():
                result = "best" if isinstance(statement, Reduce) else "position"
                self.line(f"{self._element(statement.target, indices[:-1])} = {result}[l];")

    def _scan(self, statement: Scan) -> None:
        shape = statement.value.shape
        indices = [f"i{axis}" for axis in range(len(shape))]
        ctype, work = C_TYPES[statement.value.dtype], 1 + _operations([statement.value])
        with self.each(indices[:-1], shape[:-1], work * shape[-1]), self.block(""):
            self._accumulators(ctype, ["total"], "1" if "*" in statement.combine else "0")
            with self.loops(indices[-1:], shape[-1:], work), self.lanes():
                value = self._value(statement.value, indices)
                self.line(f"total[l] = ({ctype})({statement.combine.format('total[l]', value)});")
                self.line(f"{self._element(statement.target, indices)} = total[l];")

    def _scatter(self, statement: Scatter) -> None:
        shape = statement.value.shape
        indices = [f"i{axis}" for axis in range(len(shape))]
        alone = self.block("if (MEMBER == 0)") if self._team else nullcontext()
        with alone, self.loops(indices, shape, 1 + _operations([statement.value])), self.lanes():
            value = self._value(statement.value, indices)
            place = self._element(statement.target, indices)
            self.line(f"{place} = {statement.combine.format(place, value)};")

    def _matmul(self, statement: MatMul) -> None:
        _, rows, columns = statement.target.shape
        wide = TILE if rows == 1 else 1 if columns == 1 else 4
        tall = TILE // wide
        for row, tile_rows in _tiles(rows, tall):
            for column, tile_columns in _tiles(columns, wide):
                self._matmul_tiles(statement, row, column, tile_rows, tile_columns)

    def _matmul_tiles(self, statement: MatMul, rows: range, columns: range, tall: int, wide: int) -> None:
        batch, inner = statement.left.shape[0], statement.left.shape[2]
        ctype = C_TYPES[statement.target.dtype]
        work = tall * wide
        across = work * inner * (len(columns) // wide)
        batch_loop = self.loops(["i"], [batch], across * (len(rows) // tall))
        row_loop = self._strided_loop("m", rows, tall, across)
        column_loop = self._strided_loop("n", columns, wide, work * inner)
        sums = {(r, c): f"s{r}_{c}" for r in range(tall) for c in range(wide)}
        with batch_loop, row_loop, column_loop, self.block(""):
            self._accumulators(ctype, list(sums.values()), "0")
            with self.loops(["k"], [inner], work), self.lanes():
                left = [self._value(statement.left, ["i", f"(m + {r})", "k"]) for r in range(tall)]
                right = [self._value(statement.right, ["i", "k", f"(n + {c})"]) for c in range(wide)]
                for (r, c), name in sums.items():
                    self.line(f"{name}[l] = multiply_add({left[r]}, {right[c]}, {name}[l]);")
            with self.lanes():
                for (r, c), name in sums.items():
                    self.line(f"{self._element(statement.target, ['i', f'(m + {r})', f'(n + {c})'])} = {name}[l];")

    def _team_matmul(self, statement: MatMul) -> None:
        ctype, inner = C_TYPES[statement.target.dtype], statement.left.shape[2]
        with self.each(["i", "m", "n"], statement.target.shape), self.block(""):
            self._accumulators(ctype, ["sum"], "0")
            with self.loops(["k"], [inner]), self.lanes():
                left = self._value(statement.left, ["i", "m", "k"])
                right = self._value(statement.right, ["i", "k", "n"])
                self.line(f"sum[l] = multiply_add({left}, {right}, sum[l]);")
            with self.lanes():
                self.line(f"{self._element(statement.target, ['i', 'm', 'n'])} = sum[l];")

    @contextmanager
    def _strided_loop(self, name: str, values: range, step: int, work: int) -> Iterator[None]:
        """A loop over every ``step``-th value; ``work``: how many operations there are inside."""
        self._unroll(work * (len(values) // step))
        with self.block(f"for (int {name} = {values.start}; {name} < {values.stop}; {name} += {step})"):
            yield


def _operations(values: Iterable[Expr]) -> int:
    """How many operations compute all the values; one that several need counts once."""
    todo, seen = list(values), set()
    while todo:
        expr = todo.pop()
        if isinstance(expr, Op) and expr not in seen:
            seen.add(expr)
            todo.extend(expr.operands)
    return len(seen)


def _tiles(length: int, most: int) -> list[tuple[range, int]]:
    """An axis cut into tiles of the same size, at most ``most``, and a shorter one if there is a rest."""
    size = max(divisor for divisor in range(1, most + 1) if length % divisor == 0)
    if size <= most // 2:
        size = -(-length // -(-length // most))
    whole = length // size * size
    parts = [(range(whole), size), (range(whole, length), length - whole)]
    return [(part, step) for part, step in parts if len(part)]


def _literal(const: Const) -> str:
    ctype = C_TYPES[const.dtype]
    value = const.value
    if const.dtype == torch.bool:
        return "true" if value else "false"
    if const.dtype.is_floating_point:
        value = float(value)
        text = "NOT_A_NUMBER" if math.isnan(value) else f"{'-' * (value < 0)}INF" if math.isinf(value) else value.hex()
        return f"{ctype}({text})"
    return f"{ctype}({int(value) + 1}LL - 1)" if int(value) < 0 else f"{ctype}({int(value)}LL)"


def _address(layout: Layout, indices: Sequence[str]) -> str:
    terms = [
        index if stride == 1 else f"{index} * {stride}"
        for index, size, stride in zip(indices, layout.shape, layout.strides, strict=True)
        if size != 1 and stride != 0
    ]
    return " + ".join([*terms, *([str(layout.offset)] if layout.offset or not terms else [])])

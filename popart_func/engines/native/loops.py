"""Loop nests as C++, lanes innermost: what the CPU and CUDA share of the emitted code."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from popart_func.engines.native.c_code import C_TYPES, memory_type
from popart_func.engines.native.expressions import Buffer, index_names
from popart_func.engines.native.nested_writer import write_nested
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.schedule import LoopNest, is_idle
from popart_func.engines.native.statements import (
    ArgReduce,
    Cumulate,
    MatMul,
    Nested,
    NestedResult,
    Pointwise,
    Reduce,
    Scatter,
    Window,
)
from popart_func.engines.native.writer import CodeWriter, operations

__all__ = ["TILE", "LoopWriter", "tiles"]

TILE = 12
"""How many sums of a matrix product are kept in registers at once, where there are at least 16.

A sum waits for its last addition, so several must be under way; and each loaded factor serves a whole row or column of
the tile.
"""


class LoopWriter(CodeWriter):
    """Writes the loop nests of a plan.

    Args:
        plan: whose nests are written.
        memory: what stands before a buffer's name: ``"b."`` where buffers are members of a struct.
        unrolled: loops of at most so many operations in all are unrolled by a pragma.
        team: whether a team of threads shares a lane: each thread takes every TEAM-th element.
        between: a line that follows each nest.
        tile: how many sums of a matrix product are kept in registers at once.
    """

    def __init__(
        self,
        plan: KernelPlan,
        memory: str,
        unrolled: int = 0,
        team: bool = False,
        between: str = "",
        tile: int = TILE,
    ) -> None:
        super().__init__(plan.storage(), memory, unrolled, team)
        self.between = between
        self.mask: str | None = None
        self._tile = tile
        self._loops = plan.loops()

    def nest(self, nest: LoopNest) -> None:
        """The loops of a nest."""
        (first, *others) = nest.statements
        if isinstance(first, Pointwise):
            pointwise = [statement for statement in (first, *others) if isinstance(statement, Pointwise)]
            self._pointwise(nest.shape or (), pointwise)
        elif isinstance(first, MatMul):
            (self._team_matmul if self._team else self._matmul)(first)
        elif isinstance(first, Scatter):
            self._scatter(first)
        elif isinstance(first, Reduce | ArgReduce):
            self._reduce(first)
        elif isinstance(first, Nested):
            self.nested(first, self._loops[first])
        elif not isinstance(first, NestedResult):
            self._cumulate(first)
        self.line(self.between)

    def nested(self, statement: Nested, plans: Sequence[KernelPlan]) -> None:
        """Writes a loop inside the step: its statement, and the plans of its parts."""
        write_nested(self, statement, plans)

    def copy(self, to: Buffer, source: Buffer) -> None:
        """Adds a line that copies a buffer to another one."""
        self.line(f"copy_block<{to.numel}>({self.memory_of(to)}, {self.memory_of(source)});")

    def window(self, window: Window, time: str) -> None:
        """Adds a line that declares a part of a stack."""
        part, whole, is_written = window
        kind = f"{'' if is_written else 'const '}{memory_type(part)}"
        name = f"* const {part.name}" if part.uniform else f" (* const {part.name})[L]"
        self.line(f"{kind}{name} = {self.memory_of(whole)} + {time} * {part.numel};")

    def _pointwise(self, shape: Sequence[int], statements: Sequence[Pointwise]) -> None:
        indices = index_names(shape)
        statements = [statement for statement in statements if not is_idle(statement, self.storage.merged)]
        work = operations(statement.value for statement in statements)
        with self.each(indices, shape, work), self.lanes():
            self.assign(statements, indices)

    def _accumulators(self, ctype: str, names: Sequence[str], start: str) -> None:
        """Declares an array of a number per lane for each name: the compiler keeps it in vector registers."""
        for name in names:
            self.line(f"ALIGNED {ctype} {name}[L];")
        with self.lanes():
            self.line(" ".join(f"{name}[l] = {start};" for name in names))

    def _reduce(self, statement: Reduce | ArgReduce) -> None:
        shape = statement.value.shape
        indices = index_names(shape)
        ctype, work = C_TYPES[statement.value.dtype], 1 + operations([statement.value])
        with self.each(indices[:-1], shape[:-1], work * shape[-1]), self.block(""):
            if isinstance(statement, Reduce):
                start = statement.start.replace("LOWEST", f"lowest_of<{ctype}>()")
                start = start.replace("GREATEST", f"greatest_of<{ctype}>()")
                self._accumulators(ctype, ["best"], start)
            else:
                # It starts from the first element, not from the lowest number: of all NaN or all -inf, the first wins.
                self._accumulators("int64_t", ["position"], "0")
                self.line(f"ALIGNED {ctype} best[L];")
                with self.lanes():
                    first = statement.value
                    self.line(f"best[l] = {self.value(first, [*indices[:-1], '0'])};")
            with self.loops(indices[-1:], shape[-1:], work), self.lanes():
                value = self.value(statement.value, indices)
                if isinstance(statement, Reduce):
                    self.line(f"best[l] = ({ctype})({statement.combine.format('best[l]', value)});")
                else:
                    index = indices[-1] if shape[-1] != 1 else "0"
                    self.line(f"const bool better = {statement.better.format(value, 'best[l]')};")
                    self.line(f"best[l] = better ? {value} : best[l];")
                    self.line(f"position[l] = better ? int64_t({index}) : position[l];")
            with self.lanes():
                result = "best" if isinstance(statement, Reduce) else "position"
                self.line(f"{self.element(statement.target, indices[:-1])} = {result}[l];")

    def _cumulate(self, statement: Cumulate) -> None:
        shape = statement.value.shape
        indices = index_names(shape)
        ctype, work = C_TYPES[statement.value.dtype], 1 + operations([statement.value])
        with self.each(indices[:-1], shape[:-1], work * shape[-1]), self.block(""):
            self._accumulators(ctype, ["total"], "1" if "*" in statement.combine else "0")
            with self.loops(indices[-1:], shape[-1:], work), self.lanes():
                value = self.value(statement.value, indices)
                self.line(f"total[l] = ({ctype})({statement.combine.format('total[l]', value)});")
                self.line(f"{self.element(statement.target, indices)} = total[l];")

    def _scatter(self, statement: Scatter) -> None:
        shape = statement.value.shape
        indices = index_names(shape)
        # One thread writes all: several elements may go to the same place, and then their order counts.
        alone = self.block("if (MEMBER == 0)") if self._team else nullcontext()
        with alone, self.loops(indices, shape, 1 + operations([statement.value])), self.lanes():
            value = self.value(statement.value, indices)
            place = self.element(statement.target, indices)
            self.line(f"{place} = {statement.combine.format(place, value)};")

    def _matmul(self, statement: MatMul) -> None:
        """A matrix product in tiles, for a lane that one thread runs."""
        _, rows, columns = statement.target.shape
        # A tile of 3 x 4 needs 7 loads for 12 multiplications, one of 1 x 12 needs 13; but of a vector, a square tile
        # would be mostly empty.
        wide = self._tile if rows == 1 else 1 if columns == 1 else 4
        tall = self._tile // wide
        for row, tile_rows in tiles(rows, tall):
            for column, tile_columns in tiles(columns, wide):
                self._matmul_tiles(statement, row, column, tile_rows, tile_columns)

    def _matmul_tiles(self, statement: MatMul, rows: range, columns: range, tall: int, wide: int) -> None:
        """The tiles of one size: ``tall`` rows and ``wide`` columns of the result each."""
        batch, inner = statement.left.shape[0], statement.left.shape[2]
        ctype = C_TYPES[statement.target.dtype]
        work = tall * wide
        across = work * inner * (len(columns) // wide)
        batch_loop = self.loops(["i"], [batch], across * (len(rows) // tall))
        row_loop = self.strided_loop("m", rows, tall, across)
        column_loop = self.strided_loop("n", columns, wide, work * inner)
        sums = {(r, c): f"s{r}_{c}" for r in range(tall) for c in range(wide)}
        with batch_loop, row_loop, column_loop, self.block(""):
            self._accumulators(ctype, list(sums.values()), "0")
            with self.loops(["k"], [inner], work), self.lanes():
                left = [self.value(statement.left, ["i", f"(m + {r})", "k"]) for r in range(tall)]
                right = [self.value(statement.right, ["i", "k", f"(n + {c})"]) for c in range(wide)]
                for (r, c), name in sums.items():
                    self.line(f"{name}[l] = multiply_add({left[r]}, {right[c]}, {name}[l]);")
            with self.lanes():
                for (r, c), name in sums.items():
                    self.line(f"{self.element(statement.target, ['i', f'(m + {r})', f'(n + {c})'])} = {name}[l];")

    def _team_matmul(self, statement: MatMul) -> None:
        """A matrix product with one sum per round: a team's threads are many enough to hide the waiting."""
        ctype, inner = C_TYPES[statement.target.dtype], statement.left.shape[2]
        with self.each(["i", "m", "n"], statement.target.shape), self.block(""):
            self._accumulators(ctype, ["sum"], "0")
            with self.loops(["k"], [inner]), self.lanes():
                left = self.value(statement.left, ["i", "m", "k"])
                right = self.value(statement.right, ["i", "k", "n"])
                self.line(f"sum[l] = multiply_add({left}, {right}, sum[l]);")
            with self.lanes():
                self.line(f"{self.element(statement.target, ['i', 'm', 'n'])} = sum[l];")


def tiles(length: int, most: int) -> list[tuple[range, int]]:
    """An axis cut into parts, each walked in tiles of one size, at most ``most``.

    A size that divides the axis needs one part only, and so half the code. It is taken if it is more than half of
    ``most``: with small tiles each loaded factor serves too few sums. Else the tiles are as even as they can be, and a
    shorter one follows.

    >>> tiles(10, 4), tiles(6, 4)
    ([(range(0, 8), 4), (range(8, 10), 2)], [(range(0, 6), 3)])
    """
    size = max(divisor for divisor in range(1, most + 1) if length % divisor == 0)
    if size <= most // 2:
        size = -(-length // -(-length // most))
    whole = length // size * size
    parts = [(range(whole), size), (range(whole, length), length - whole)]
    return [(part, step) for part, step in parts if len(part)]

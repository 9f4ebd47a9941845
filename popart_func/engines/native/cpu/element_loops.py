"""Loop nests of one lane as C++ functions, with elements in vector registers.

Pointwise loops and reductions are vectorized along the axis along which most operands are contiguous. Matrix products
call `multiply` of `elements.hpp`. Everything else is a plain loop, in the order of the statement. A nest becomes a
function of the pointers that it reads and writes, so that equal nests over other buffers are compiled once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from popart_func.engines.native.c_code import C_TYPES, memory_type
from popart_func.engines.native.cpu.element_axes import (
    Axis,
    axes_of,
    indices_of,
    innermost_last,
    layouts_of,
    strides_of,
    without_last,
)
from popart_func.engines.native.cpu.element_memory import SPARE, Memory
from popart_func.engines.native.expressions import Buffer, Expr, Load, Operation, leaves
from popart_func.engines.native.layouts import StridedLayout, address
from popart_func.engines.native.schedule import LoopNest, is_idle
from popart_func.engines.native.statements import ArgReduce, Cumulate, MatMul, Pointwise, Reduce, Scatter
from popart_func.engines.native.writer import CodeWriter

__all__ = ["NestFunction", "nest_function"]

ANY_ORDER = frozenset(
    (
        *("{0} + {1}", "{0} * {1}", "maximum({0}, {1})", "minimum({0}, {1})"),
        *("skipping_maximum({0}, {1})", "skipping_minimum({0}, {1})", "({0} != 0) | ({1} != 0)"),
    )
)
"""What combines elements in any order with the same result, sums and products up to rounding."""

SIDE_BY_SIDE = 64
"""The most partial results that a reduction computes at once."""

SHORT = 4
"""Axes that are shorter than this are not vectorized but unrolled."""


class NestFunction(NamedTuple):
    """A loop nest as a function.

    Attributes:
        parameters: the C++ of its parameters; ``bad`` and ``room`` come last.
        body: the lines between its braces.
        arguments: for each other parameter the buffer and the place of the element that it points to.
        room: how many bytes its matrix products need to pack their factors.
    """

    parameters: tuple[str, ...]
    body: tuple[str, ...]
    arguments: tuple[tuple[Buffer, int], ...]
    room: int


def nest_function(memory: Memory, nest: LoopNest) -> NestFunction:
    """Writes a loop nest as a function; its body is empty where the nest only copies buffers onto themselves."""
    writer = _NestWriter(memory)
    writer.nest(nest)
    parameters = tuple(
        f"{'const ' * (buffer in memory.constant)}{memory_type(buffer)}* {name}"
        for (buffer, _), name in writer.pointers.items()
    )
    hidden = [
        f"forget_alignment({name});"
        for (buffer, offset), name in writer.pointers.items()
        if writer.lines and offset * buffer.dtype.itemsize % 64
    ]
    parameters = (*parameters, "int32_t& bad", "char* room")
    return NestFunction(parameters, (*hidden, *writer.lines), tuple(writer.pointers), writer.room)


class _NestWriter(CodeWriter):
    """The lines of one nest's function."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory.storage, memory="")
        self.bad = "bad"
        self.room = 0
        self.pointers: dict[tuple[Buffer, int], str] = {}
        self._constant = memory.constant

    def place(self, buffer: Buffer, layout: StridedLayout, indices: Sequence[str], moved: str) -> str:
        """An element of a buffer, behind a pointer to the first element of its layout."""
        return f"{self._pointer(buffer, layout.offset)}[{address(layout._replace(offset=0), indices)}{moved}]"

    @contextmanager
    def lanes(self) -> Iterator[None]:
        """One round of the loops; names of values end with it."""
        with self.block(""):
            self._names = {}
            yield

    def nest(self, nest: LoopNest) -> None:
        """The loops of a nest."""
        (first, *_) = nest.statements
        if isinstance(first, Pointwise):
            self._pointwise(nest.shape or (), [part for part in nest.statements if isinstance(part, Pointwise)])
        elif isinstance(first, MatMul):
            self._matmul(first)
        elif isinstance(first, Scatter):
            self._scatter(first)
        elif isinstance(first, Reduce):
            self._reduce(first)
        elif isinstance(first, ArgReduce):
            self._arg_reduce(first)
        else:
            assert isinstance(first, Cumulate), f"a loop inside a step is no loop nest: {first}"
            self._cumulate(first)

    def _pointer(self, buffer: Buffer, offset: int) -> str:
        return self.pointers.setdefault((buffer, offset), f"a{len(self.pointers)}")

    # Loops.

    @contextmanager
    def _loop(self, axis: Axis, *, simd: bool = False, checked: bool = False) -> Iterator[None]:
        if axis.size < SHORT:
            self.line(f"#pragma GCC unroll {SHORT}")  # the windows of a convolution: 1.1 times as fast
        elif simd:
            self.line(f"#pragma omp simd{' reduction(|: bad)' * checked}")
        with self.block(f"for (int {axis.name} = 0; {axis.name} < {axis.size}; ++{axis.name})"):
            yield

    @contextmanager
    def _all(self, axes: Sequence[Axis], *, simd: bool = False, checked: bool = False) -> Iterator[None]:
        """Loops over axes, outermost first; ``simd``: the rounds of the innermost one do not depend on each other."""
        if not axes:
            yield
            return
        outermost = self._loop(axes[0], simd=simd and len(axes) == 1, checked=checked)
        with outermost, self._all(axes[1:], simd=simd, checked=checked):
            yield

    def _pointwise(self, shape: Sequence[int], statements: Sequence[Pointwise]) -> None:
        statements = [statement for statement in statements if not is_idle(statement, self.storage.merged)]
        if not statements:
            return
        axes = axes_of(shape, [layout for part in statements for layout in layouts_of(part.value, part.target)])
        axes = innermost_last(axes)
        checked = any(_is_checked(part.value) for part in statements)
        if axes and not checked and self._may_run_over(axes, statements):
            axes[-1] = axes[-1]._replace(size=-(-axes[-1].size // SPARE) * SPARE)
        indices = indices_of(shape, axes)
        with self._all(axes, simd=True, checked=checked), self.lanes():
            self.assign(statements, indices)

    def _may_run_over(self, axes: Sequence[Axis], statements: Sequence[Pointwise]) -> bool:
        """Whether the innermost loop may go on to a multiple of `SPARE`, so that no elements are left for scalar code.

        The surplus elements lie behind their row: in a later row, which is computed afterwards, or behind the buffer,
        where there is room. Nothing may read them before they are overwritten. Inputs have no room behind them.
        """
        inner = axes[-1].axis
        if axes[-1].size < SHORT or [axis.axis for axis in axes] != sorted(axis.axis for axis in axes):
            return False
        written = {self.storage.place_of(part.target.buffer) for part in statements}
        own = {part.target.buffer for part in statements}
        for load in (leaf for part in statements for leaf in leaves(part.value) if isinstance(leaf, Load)):
            stride, buffer = load.layout.strides[inner], self.storage.place_of(load.buffer)
            if stride not in (0, 1) or (stride == 1 and buffer in self._constant):
                return False
            if len(axes) > 1 and buffer in written and load.buffer not in own:
                return False
        stored = [part.target for part in statements if part.target.buffer not in self.storage.local]
        return all(
            target.is_whole and target.layout.strides[inner] == 1 and target.buffer not in self.storage.windows
            for target in stored
        )

    def _scatter(self, statement: Scatter) -> None:
        shape, target = statement.value.shape, statement.target
        axes = axes_of(shape, layouts_of(statement.value, target))
        indices = indices_of(shape, axes)
        # Elements that go to one place must be written in order. Along an axis that no computed index depends on, each
        # goes to a place of its own.
        moving = [layout for index in target.dynamic for layout in layouts_of(index.value)]
        apart = axes and target.layout.strides[axes[-1].axis] and not any(m.strides[axes[-1].axis] for m in moving)
        checked = _is_checked(statement.value) or bool(target.dynamic)
        with self._all(axes, simd=bool(apart), checked=checked), self.lanes():
            value, place = self.value(statement.value, indices), self.element(target, indices)
            self.line(f"{place} = {statement.combine.format(place, value)};")

    # Reductions.

    def _reduce(self, statement: Reduce) -> None:
        shape, ctype = statement.value.shape, C_TYPES[statement.value.dtype]
        layouts = layouts_of(statement.value)
        # The target's layout has no axis for what is reduced; a stride of 0 there keeps that axis apart.
        target = statement.target.layout
        widened = StridedLayout(shape, (*target.strides, 0), target.offset)
        kept = innermost_last(axes_of(shape[:-1], [without_last(layout) for layout in [*layouts, widened]]))
        along = Axis(len(shape) - 1, shape[-1], sum(layout.strides[-1] == 1 for layout in layouts))
        start = statement.start.replace("LOWEST", f"lowest_of<{ctype}>()")
        start = start.replace("GREATEST", f"greatest_of<{ctype}>()")
        any_order = statement.combine in ANY_ORDER and along.size >= 2 * SHORT
        across = bool(kept) and kept[-1].size >= 2 * SHORT
        if across and (kept[-1].contiguous > along.contiguous + 1 or not any_order):
            with self._all(kept[:-1]):
                whole = kept[-1].size // SIDE_BY_SIDE * SIDE_BY_SIDE
                for begin, end, size in ((0, whole, SIDE_BY_SIDE), (whole, kept[-1].size, kept[-1].size - whole)):
                    if begin < end:
                        self._reduce_across(statement, kept, along, ctype, start, range(begin, end, size))
            return
        with self._all(kept):
            if any_order:
                self._reduce_along(statement, kept, along, ctype, start)
            else:
                self._reduce_in_order(statement, kept, along, ctype, start)

    def _reduce_across(
        self, statement: Reduce, kept: Sequence[Axis], along: Axis, ctype: str, start: str, blocks: range
    ) -> None:
        """Reduces neighbours at once, block by block: each has a place in an array, and is combined in order.

        An array is as long as a register, so that the compiler keeps it in one, and not in memory.
        """
        shape, name, size = statement.value.shape, kept[-1].name, blocks.step
        indices = indices_of(shape, [*kept, along])
        checked, width = _is_checked(statement.value), 64 // statement.value.dtype.itemsize
        loads = [leaf for leaf in leaves(statement.value) if isinstance(leaf, Load)]
        strides = [load.layout.strides[kept[-1].axis] for load in loads]
        inside = not checked and all(self.storage.place_of(load.buffer) not in self._constant for load in loads)
        surplus = inside and all(stride in (0, 1) for stride in strides)
        parts = []  # the name of an array, its first element, the loop over what is kept, and over what is computed
        for begin in range(0, size, width):
            length = min(width, size - begin)
            wide = min(width, -(-length // SPARE) * SPARE) if surplus else length
            parts.append((f"best{begin}", begin, Axis(len(shape), length, 0), Axis(len(shape), wide, 0)))
        with self.block(f"for (int {name} = {blocks.start}; {name} < {blocks.stop}; {name} += {size})"):
            for best, _, _, each in parts:
                self.line(f"alignas(64) {ctype} {best}[{each.size}];")
                with self._loop(each, simd=True):
                    self.line(f"{best}[{each.name}] = {start};")
            with self._loop(along):
                for best, begin, _, each in parts:
                    indices[kept[-1].axis] = f"({name} + {begin} + {each.name})"
                    with self._loop(each, simd=True, checked=checked), self.lanes():
                        value = self.value(statement.value, indices)
                        combined = statement.combine.format(f"{best}[{each.name}]", value)
                        self.line(f"{best}[{each.name}] = ({ctype})({combined});")
            for best, begin, each, _ in parts:
                indices[kept[-1].axis] = f"({name} + {begin} + {each.name})"
                with self._loop(each, simd=True), self.lanes():
                    self.line(f"{self.element(statement.target, indices[:-1])} = {best}[{each.name}];")

    def _reduce_along(self, statement: Reduce, kept: Sequence[Axis], along: Axis, ctype: str, start: str) -> None:
        """Reduces every n-th element at once, and then the n results."""
        shape = statement.value.shape
        parts = next(size for size in (SIDE_BY_SIDE, 16, 8, SHORT) if 2 * size <= along.size)
        whole, rest = along.size // parts * parts, along.size % parts
        indices = indices_of(shape, [*kept, along])
        each, checked = Axis(len(shape), parts, 0), _is_checked(statement.value)
        with self.block(""):
            self.line(f"alignas(64) {ctype} best[{parts}];")
            with self._loop(each, simd=True):
                self.line(f"best[{each.name}] = {start};")

            def take(block: str) -> None:
                value = self.value(statement.value, [*indices[:-1], f"({block} + {each.name})"])
                combined = statement.combine.format(f"best[{each.name}]", value)
                self.line(f"best[{each.name}] = ({ctype})({combined});")

            blocks = self.block(f"for (int {along.name} = 0; {along.name} < {whole}; {along.name} += {parts})")
            with blocks, self._loop(each, simd=True, checked=checked), self.lanes():
                take(along.name)
            if rest:
                with self._loop(each._replace(size=rest), simd=True, checked=checked), self.lanes():
                    take(str(whole))
            half = parts // 2
            while half:
                with self._loop(each._replace(size=half), simd=True):
                    combined = statement.combine.format(f"best[{each.name}]", f"best[{each.name} + {half}]")
                    self.line(f"best[{each.name}] = ({ctype})({combined});")
                half //= 2
            with self.lanes():
                self.line(f"{self.element(statement.target, indices[:-1])} = best[0];")

    def _reduce_in_order(self, statement: Reduce, kept: Sequence[Axis], along: Axis, ctype: str, start: str) -> None:
        indices = indices_of(statement.value.shape, [*kept, along])
        with self.block(""):
            self.line(f"{ctype} best = {start};")
            with self._loop(along), self.lanes():
                value = self.value(statement.value, indices)
                self.line(f"best = ({ctype})({statement.combine.format('best', value)});")
            with self.lanes():
                self.line(f"{self.element(statement.target, indices[:-1])} = best;")

    def _arg_reduce(self, statement: ArgReduce) -> None:
        shape, ctype = statement.value.shape, C_TYPES[statement.value.dtype]
        axes = [Axis(axis, size, 0) for axis, size in enumerate(shape) if size != 1]
        kept, along = [axis for axis in axes if axis.axis != len(shape) - 1], Axis(len(shape) - 1, shape[-1], 0)
        indices = indices_of(shape, [*kept, along])
        with self._all(kept), self.block(""):
            # It starts from the first element, not from the lowest number: of all NaN or all -inf, the first wins.
            self.line(f"int64_t position = 0; {ctype} best;")
            with self.lanes():
                self.line(f"best = {self.value(statement.value, [*indices[:-1], '0'])};")
            with self._loop(along), self.lanes():
                value = self.value(statement.value, indices)
                self.line(f"const bool better = {statement.better.format(value, 'best')};")
                self.line(f"best = better ? {value} : best;")
                self.line(f"position = better ? int64_t({along.name}) : position;")
            with self.lanes():
                self.line(f"{self.element(statement.target, indices[:-1])} = position;")

    def _cumulate(self, statement: Cumulate) -> None:
        shape, ctype = statement.value.shape, C_TYPES[statement.value.dtype]
        kept = [Axis(axis, size, 0) for axis, size in enumerate(shape[:-1]) if size != 1]
        along = Axis(len(shape) - 1, shape[-1], 0)
        indices = indices_of(shape, [*kept, along])
        with self._all(kept), self.block(""):
            self.line(f"{ctype} total = {'1' if '*' in statement.combine else '0'};")
            with self._loop(along), self.lanes():
                value = self.value(statement.value, indices)
                self.line(f"total = ({ctype})({statement.combine.format('total', value)});")
                self.line(f"{self.element(statement.target, indices)} = total;")

    # Products.

    def _matmul(self, statement: MatMul) -> None:
        batch, rows, columns = statement.target.shape
        inner, dtype = statement.left.shape[2], statement.target.dtype
        (across, *left), (along, *right) = (strides_of(load.layout) for load in (statement.left, statement.right))
        (step, *_) = strides_of(statement.target.layout)
        starts = [
            self._pointer(self.storage.place_of(load.buffer), load.layout.offset)
            for load in (statement.target, statement.left, statement.right)
        ]
        out, first, second = (
            f"{start} + i0 * {stride}" if stride else start
            for start, stride in zip(starts, (step, across, along), strict=True)
        )
        self.room = inner * (max(rows, columns) + 64 // dtype.itemsize) * dtype.itemsize
        sizes = ", ".join(map(str, (rows, columns, inner, *left, *right)))
        with self._all([Axis(0, batch, 0)] if batch != 1 else []):
            self.line(f"multiply<{sizes}>({first}, {second}, {out}, ({C_TYPES[dtype]}*)room);")


def _is_checked(value: Expr) -> bool:
    """Whether computing a value may find an error: an index out of range, or a divisor of 0."""
    if isinstance(value, Operation):
        return "BAD" in value.template or any(map(_is_checked, value.operands))
    return isinstance(value, Load) and bool(value.dynamic)

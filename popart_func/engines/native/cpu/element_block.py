"""The function that runs one lane from the first step to the last: it calls the functions of the loop nests.

Loops inside the step are loops in it, whose bodies call more of them. Since it runs one lane, a `while_loop` ends when
that lane is done, and a `cond` runs one of its branches.
"""

from __future__ import annotations

from popart_func.engines.native.c_code import memory_type
from popart_func.engines.native.cpu.element_loops import nest_function
from popart_func.engines.native.cpu.element_memory import Memory
from popart_func.engines.native.cpu.functions import Functions
from popart_func.engines.native.expressions import Buffer, Load
from popart_func.engines.native.layouts import address
from popart_func.engines.native.nested_writer import write_nested_of_one, write_nests
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.schedule import LoopNest
from popart_func.engines.native.statements import Nested, NestedResult, Window
from popart_func.engines.native.writer import CodeWriter

__all__ = ["ElementBlockWriter"]


class ElementBlockWriter(CodeWriter):
    """Writes ``run_block``; a `OneLaneWriter`.

    Attributes:
        functions: that it calls.
        room: how many bytes products need to pack their factors.
    """

    def __init__(self, plan: KernelPlan) -> None:
        self._memory = Memory.of(plan)
        super().__init__(self._memory.storage, memory="b.")
        self.functions = Functions()
        self.room = 1
        self._plan, self._loops = plan, plan.loops()

    def nest(self, nest: LoopNest) -> None:
        """Calls the function of a loop nest, or writes a loop inside the step."""
        (first, *_) = nest.statements
        if isinstance(first, Nested):
            write_nested_of_one(self, first, self._loops[first])
        elif not isinstance(first, NestedResult):
            function = nest_function(self._memory, nest)
            if function.body:
                name = self.functions.name(function.parameters, function.body)
                self.room = max(self.room, function.room)
                starts = [
                    f"{self.memory_of(buffer)}{f' + {offset}' * (offset != 0)}" for buffer, offset in function.arguments
                ]
                self.line(f"{name}({', '.join([*starts, 'bad', 'b.room'])});")

    def copy(self, to: Buffer, source: Buffer) -> None:
        """Adds a line that copies a buffer to another one."""
        if to.numel:
            self.line(f"copy<{to.numel}>({self.memory_of(to)}, {self.memory_of(source)});")

    def window(self, window: Window, time: str) -> None:
        """Adds a line that declares a part of a stack."""
        part, whole, _ = window
        kind = f"{'const ' * (part in self._memory.constant)}{memory_type(part)}"
        self.line(f"{kind}* const {part.name} = {self.memory_of(whole)} + {time} * {part.numel};")

    def flag(self, load: Load) -> str:
        """A single bool in memory."""
        return f"{self.memory_of(load.buffer)}[{address(load.layout, [])}]"

    def memory_of(self, buffer: Buffer) -> str:
        """The pointer to the memory that a buffer has."""
        buffer = self.storage.place_of(buffer)
        outside = buffer in self._memory.constant or buffer in self.storage.windows
        return f"{'' if outside else 'b.'}{buffer.name}"

    def run_block(self) -> None:
        """Writes the function, and those that it calls at its beginning and end.

        Inputs that do not change are read where they lie. The carry is copied into the block, and back at the end: by
        functions of their own, else the compiler keeps the address of each leaf from one to the other.
        """
        program = self._plan.program
        inputs, carries = program.inputs, len(program.carry)
        xs = range(carries, carries + program.xs)
        carry = [(index, buffer) for index, buffer in enumerate(inputs[:carries]) if buffer.numel]
        parameters = "const KernelArguments& run, Block& b, const int64_t first"
        with self.block(f"static NOINLINE void load_carry({parameters})"):
            for index, buffer in carry:
                self.line(f"copy<{buffer.numel}>(b.{buffer.name}, {self._lane_of(index)});")
        with self.block(f"static NOINLINE void store_carry({parameters})"):
            for index, buffer in carry:
                self._store(index, buffer, "first", f"b.{buffer.name}")
        with self.block(f"static void run_block({parameters}, const int)"):
            self.line("int32_t bad = 0;")
            for index in range(carries, len(inputs)):
                name = f"begin{index}" if index in xs else inputs[index].name
                self.line(f"const {memory_type(inputs[index])}* const {name} = {self._lane_of(index)};")
            self.line("load_carry(run, b, first);")
            write_nests(self, self._plan.once)
            with self.block("for (int64_t time = 0; time < run.steps; ++time)"):
                for index in xs:
                    at = f"begin{index} + time * run.time_strides[{index}]"
                    self.line(f"const {memory_type(inputs[index])}* const {inputs[index].name} = {at};")
                write_nests(self, self._plan.always)
                for old, new in zip(inputs, program.carry, strict=False):
                    if new is not None and new not in self._plan.merged:
                        self.copy(old, new)
                for index, y in enumerate(program.ys, start=carries):
                    if y.numel:
                        self._store(index, y, "(time * run.lanes + first)", self.memory_of(y))
            self.line("store_carry(run, b, first);")
            self.line("b.bad[0] |= bad;")

    def _lane_of(self, index: int) -> str:
        """The pointer to a lane's part of an input."""
        ctype = memory_type(self._plan.program.inputs[index])
        return f"(const {ctype}*)run.inputs[{index}] + first * run.lane_strides[{index}]"

    def _store(self, index: int, buffer: Buffer, place: str, source: str) -> None:
        start = f"({memory_type(buffer)}*)run.outputs[{index}] + {place} * {buffer.numel}"
        self.line(f"copy<{buffer.numel}>({start}, {source});")

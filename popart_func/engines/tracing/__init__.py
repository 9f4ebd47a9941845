"""Tracing: a step function becomes a graph of ATen ops, which every compiled engine and JAX read.

`tracer` has `trace_step`, `step_graph` what it returns, and `walk` what reads that node by node. `recorder` records the
ops that a step calls, `decompositions` replaces them by simpler ones, `shapes` finds what they return, `mutations`
removes in-place ops, `known_values` computes what does not depend on inputs, and `draws` refuses random numbers.
`ambient` reads the settings that a graph depends on,
`plain_paths` tells libraries that they are traced, `batchable` and `zero_d_indices` keep PyTorch from reading values,
`source_lines` names the user's line in errors, and `start_up` keeps tracing fast in a new process.
"""

__all__: list[str] = []

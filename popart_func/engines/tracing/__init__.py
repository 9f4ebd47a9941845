"""Tracing: a step function becomes a graph of ATen ops, which every compiled engine and JAX read.

`tracer` has `trace_step`, `step_graph` what it returns, `loop_nodes` the nodes of it that run bodies, and `walk` what
reads a graph node by node. `recorder` records the ops that a step calls on `traced` tensors, `decompositions` replaces
them by simpler ones, `shapes` finds what they return, `mutations` removes in-place ops, `tidy` what is there twice or
unused, `known_values` computes what does not depend on inputs, and `draws` refuses random numbers. `plain_paths` tells
libraries that they are traced, `batchable` and `zero_d_indices` keep PyTorch from reading values, `source_lines` names
the user's line in errors, `ambient` reads the settings that a graph depends on, and `start_up` keeps tracing fast in
a new process.
"""

__all__: list[str] = []

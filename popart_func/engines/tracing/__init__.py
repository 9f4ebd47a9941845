"""Tracing: a step function becomes a graph of ATen ops, which every compiled engine and JAX read.

`step_graph` has `trace` and `StepGraph`. `recorder` records the ops, `decompositions` replaces them by simpler ones,
`shapes` finds what they return, `mutations` removes in-place ops, `source_lines` names the user's line in errors.
"""

__all__: list[str] = []

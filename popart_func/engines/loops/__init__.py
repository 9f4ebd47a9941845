"""Loops inside a step: `scan`, `fori_loop`, `while_loop`, `cond`.

`api` has what users call. While a step is traced, a loop becomes a node of its graph: `bodies` traces its body, and
`primitive`, with `scan_loop`, `while_loop` and `cond_loop`, has the rules of such a node under the transforms of
`torch.func`; `reverse` says what a loop stores for its gradient. Elsewhere `in_python` runs a loop.
"""

__all__: list[str] = []

"""Workloads of the benchmark: steps that people run, each written for the engines and, as its users would, in JAX.

`case` has what a workload is made of. Each other module has one, its ``case(**size)`` and the sizes that
`workload_bench` measures.
"""

from __future__ import annotations

__all__: list[str] = []

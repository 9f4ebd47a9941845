"""Lowerings: each ATen op in `jax.numpy`, a module for each kind of op; `table` says how an op is called."""

from popart_func.interop.lowerings.table import LOWERINGS, register_lowering

__all__ = ["LOWERINGS", "register_lowering"]

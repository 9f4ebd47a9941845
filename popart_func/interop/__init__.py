"""Interoperability with JAX and its libraries (extra ``jax``), and with TorchRL (extra ``torchrl``).

`jax` has what users call: trees and functions, both ways. `layouts` converts parameters to the layouts of other
libraries. `functions` makes a JAX function of a step graph, which `evaluate` computes by the `lowerings`. Without JAX,
`jax`, `layouts` and `optax` raise a `ModuleNotFoundError` that names the extra.
"""

__all__: list[str] = []

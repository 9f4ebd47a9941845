"""Interoperability with JAX and its libraries; it needs the extra ``jax``.

`jax` has what users call: trees and functions, both ways. `layouts` converts parameters to the layouts of other
libraries. `functions` makes a JAX function of a step graph, which `evaluate` computes by the `lowerings`.
"""

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("popart_func.interop needs jax: pip install 'popart-func[jax]'", name="jax") from error

__all__: list[str] = []

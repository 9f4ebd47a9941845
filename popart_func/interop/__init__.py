"""Bridges to other libraries, JAX above all. Nothing in the library imports this; it needs the extra ``jax``.

`jax` has the trees and the functions, both ways; `layouts` the parameters' layouts.
"""

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("popart_func.interop needs jax: pip install 'popart-func[jax]'", name="jax") from error

__all__: list[str] = []

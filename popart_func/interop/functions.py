"""`to_jax_function`: a PyTorch function as a JAX function, by its step graph, which `evaluate` computes in JAX."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import optree
import torch
from torch.overrides import TorchFunctionMode

from popart_func import _xla
from popart_func.engines.stop_gradients import StopGradientMarks
from popart_func.engines.tracing.ambient import module_modes
from popart_func.engines.tracing.step_graph import CacheKey, TensorSpec
from popart_func.interop.evaluate import evaluate
from popart_func.interop.static_arguments import Static, is_static, static_arguments
from popart_func.interop.traces import Traces
from popart_func.interop.trees import argument_to_array, torch_dtype, with_plain_tuples

__all__ = ["to_jax_function"]


def to_jax_function(torch_fn: Callable[..., Any], *, static_argnames: str | Iterable[str] = ()) -> Callable[..., Any]:
    """A pure PyTorch function as an ordinary JAX function, which every transform of JAX takes.

    The function is traced once for each structure, shapes and dtypes of its arguments, and JAX alone computes its
    graph. The function may use `torch.func`; `jax.jit`, `grad`, `vmap`, `jvp`, `hessian`, `lax.scan` and `checkpoint`
    may transform the result. ``.detach()`` and `torch.no_grad` stop JAX's gradients too. The result is not jitted: wrap
    it in `jax.jit`. `register_lowering` adds an op.

    Good to know:

    - Tensors that the function closes over are constants. No gradient flows into them. Each call reads their values, so
      that it sees an in-place change. After the first call it does not see another tensor in the place of one: a name
      bound to something else, ``.data =``, `Module.to`, ``load_state_dict(assign=True)``. `jax.jit`, and whatever else
      JAX traces once, such as the body of `lax.scan`, keeps the values that it has read. Pass what should change
      between calls as an argument.
    - JAX differentiates `torch.func.grad` within `torch.no_grad`, and the ``.grad`` of `Tensor.backward`, as if
      gradients were on.
    - `torch.func.grad` inside the function uses the backward of a custom `torch.autograd.Function`; JAX differentiates
      its forward.
    - With JAX's 64-bit types off, integers are computed in 32 bits, and float64 is refused. Integers reach ``torch_fn``
      as int32, but as int64 where PyTorch refuses int32, as some ops do for indices.
    - An index out of range is clamped, as in JAX, and so is a float that an integer dtype can't hold.
    - Numbers and the mode of a module that the function closes over are read once, while it is traced; a module that
      is ``torch_fn`` itself may switch its mode.
    - Dropout and other random calls are refused where their values are used: call ``module.eval()``, enter
      `popart_func.random.keyed`, or draw with `popart_func.random`.
    - `torch.compiler.is_compiling` is true while it is traced, and `torch.distributions` does not check its arguments.
    - Tensors that the function closes over, and what is computed of them alone, may decide shapes and branches: when
      their values change, the function is traced anew.

    Args:
        torch_fn: pure, from pytrees of tensors to a pytree of tensors; no branches on values, no random calls (but
            `popart_func.random` works, and gives the same numbers).
        static_argnames: names of arguments that reach ``torch_fn`` as they are, by which it may branch: sizes, names,
            functions; they must be hashable, and the function is traced once for each value. Python bools and strings
            are static anyway. Within `jax.jit`, give the names to it, too.

    Returns:
        A function of pytrees of arrays (or numbers). Typed keys reach ``torch_fn`` as keys of `popart_func.random`.

    Raises:
        TypeError: an argument is neither an array nor a number nor static, a static one can't be hashed or is traced by
            JAX, or ``torch_fn`` can't be traced.
        ValueError: ``torch_fn`` has no argument of a name in ``static_argnames``.
        UnsupportedError: an op that has no lowering, or whose arguments JAX refuses; the message names it, its shapes
            and its line. Also something of PyTorch that can't be traced; the message names the line.

    >>> f = to_jax_function(lambda x: torch.sin(x).sum())
    >>> jax.grad(f)(jax.numpy.zeros(2))
    Array([1., 1.], dtype=float32)
    """
    if not callable(torch_fn):
        raise TypeError(f"to_jax_function: `torch_fn` must be a function, got {type(torch_fn).__name__}.")
    names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
    mark_static = static_arguments(torch_fn, names)
    flat_functions: dict[Any, tuple[Callable[..., Any], list[Any]]] = {}
    traces = Traces()
    lock = threading.RLock()  # `out_structures` is of the last trace, which has to be this thread's

    @functools.wraps(torch_fn)
    def jax_fn(*args: Any, **kwargs: Any) -> Any:
        paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(mark_static(args, kwargs))
        leaves = [argument_to_array("to_jax_function", *pair) for pair in paths_and_leaves if not is_static(pair[1])]
        statics = tuple(Static(leaf) if is_static(leaf) else None for _, leaf in paths_and_leaves)
        key = structure, statics, module_modes(torch_fn)
        if key not in flat_functions:
            flat_functions[key] = _flat(torch_fn, structure, statics)
        flat, out_structures = flat_functions[key]
        cpu = torch.device("cpu")
        if not all(isinstance(size, int) for leaf in leaves for size in leaf.shape):
            raise TypeError("to_jax_function: shapes must be numbers, got a symbolic one: export it shape by shape.")
        specs = [TensorSpec(tuple(leaf.shape), torch_dtype(leaf.dtype), cpu) for leaf in leaves]
        flat_structure = optree.tree_structure(tuple(leaves))  # type: ignore[arg-type]
        with lock:
            graph = traces.trace(flat, flat_structure, specs)
            out_structure = graph.cached(_OutStructureKey(), lambda: out_structures[0])
        return jax.tree_util.tree_unflatten(out_structure, evaluate(graph, leaves))

    return jax_fn


@dataclass(frozen=True)
class _OutStructureKey(CacheKey[Any]):
    pass


def _flat(
    torch_fn: Callable[..., Any], structure: Any, statics: tuple[Static | None, ...]
) -> tuple[Callable[..., Any], list[Any]]:
    """The function on flat tensors, and a list with the structure of what its last call has returned.

    ``statics`` has the static leaves of the arguments, and None in the place of each tensor.
    """
    out_structures: list[Any] = []

    def flat(*leaves: Any) -> list[Any]:
        given = iter(leaves)
        filled = [next(given) if static is None else static.value for static in statics]
        args, kwargs = jax.tree_util.tree_unflatten(structure, filled)
        with StopGradientMarks("to_jax_function", kept=True), _ByXla():
            result = with_plain_tuples(torch_fn(*args, **kwargs))
        paths_and_leaves, out_structure = jax.tree_util.tree_flatten_with_path(result)
        for path, leaf in paths_and_leaves:
            if not isinstance(leaf, torch.Tensor):
                raise TypeError(
                    f"to_jax_function: every leaf of the result must be a tensor, got {type(leaf).__name__} at "
                    f"{jax.tree_util.keystr(path) or 'its top'}."
                )
        out_structures[:] = [out_structure]
        return [leaf for _, leaf in paths_and_leaves]

    return flat, out_structures


class _ByXla(TorchFunctionMode):
    """Replaces the functions that imitate XLA's arithmetic by the ops that XLA has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _BY_XLA.get(func, func)(*args, **(kwargs or {}))


_SAME_NAMES = ("erf", "erfinv", "exp", "lgamma", "log", "log1p", "sqrt", "tan")
_BY_XLA: dict[Any, Callable[..., Any]] = {
    _xla.multiply_add: lambda a, b, c: a * b + c,
    _xla.reciprocal_sqrt: torch.rsqrt,
    _xla.power: torch.pow,
    **{getattr(_xla, name): getattr(torch, name) for name in _SAME_NAMES},
}

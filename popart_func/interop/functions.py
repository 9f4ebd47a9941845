"""A PyTorch function as a JAX function: its step graph, evaluated with `jax.numpy`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optree
import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from popart_func import _xla
from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.tracing.step_graph import StepGraph, TensorSpec, TraceError, describe, op_name, trace
from popart_func.interop.lowerings import LOWERINGS
from popart_func.interop.stop_gradients import STOP_GRADIENT, StopGradientMarks
from popart_func.interop.trees import (
    argument_to_array,
    has_64_bits,
    jax_dtype,
    tensor_to_array,
    torch_dtype,
    with_plain_tuples,
)

__all__ = ["to_jax_function"]


def to_jax_function(torch_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A pure PyTorch function as an ordinary JAX function, which every transform of JAX takes.

    The function is traced once for each structure, shapes and dtypes of its arguments, and its graph is computed by
    JAX alone. `torch.func` may be used inside; `jax.jit`, `grad`, `vmap`, `jvp`, `hessian`, `lax.scan` and
    `checkpoint` outside. ``.detach()`` and `torch.no_grad` inside stop JAX's gradients too. It is not jitted: wrap it
    in `jax.jit`.

    Good to know:

    - Tensors that the function closes over are constants: no gradient flows into them, and they are read at each call,
      so that a change in them is seen. Another tensor in the place of one is not, after the first call: a name bound
      anew, ``.data =``, `Module.to`, ``load_state_dict(assign=True)``. `jax.jit`, and what else JAX traces once, as the
      body of `lax.scan`, keeps what it has read. What should change between calls belongs into the arguments.
    - Of `torch.func.grad` called within `torch.no_grad`, and of what `Tensor.backward` leaves in ``.grad``, JAX sees
      the gradient; the derivative of a norm or a standard deviation at 0 is NaN, as JAX's own.
    - A custom `torch.autograd.Function` shows `torch.func.grad` inside its own backward; JAX outside differentiates
      its forward.
    - With JAX's 64-bit types off, integers are computed in 32 bits, and float64 is refused.
    - An index out of range is clamped, as in JAX, and so is a float that an integer dtype can't hold.
    - What else it reads is read while it is traced: numbers, and the mode of a module (but for one that is itself the
      argument, which may be switched).
    - Dropout and other random calls are refused: call ``module.eval()``, or draw with `popart_func.random`.

    Args:
        torch_fn: pure, from pytrees of tensors to a pytree of tensors; no branches on values, no random calls (but
            `popart_func.random` works, and gives the same numbers).

    Returns:
        A function of pytrees of arrays (or numbers). Typed keys reach ``torch_fn`` as keys of `popart_func.random`.

    Raises:
        TypeError: an argument is neither an array nor a number, or ``torch_fn`` can't be traced.
        UnsupportedError: an operation that has no lowering; the message names it, its shapes and its line.

    >>> f = to_jax_function(lambda x: torch.sin(x).sum())
    >>> jax.grad(f)(jax.numpy.zeros(2))
    Array([1., 1.], dtype=float32)
    """
    if not callable(torch_fn):
        raise TypeError(f"to_jax_function: `torch_fn` must be a function, got {type(torch_fn).__name__}.")
    flat_functions: dict[Any, tuple[Callable[..., Any], list[Any]]] = {}
    lock = threading.RLock()  # what was traced last belongs to who asked

    @functools.wraps(torch_fn)
    def jax_fn(*args: Any, **kwargs: Any) -> Any:
        paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
        leaves = [argument_to_array("to_jax_function", path, leaf) for path, leaf in paths_and_leaves]
        key = structure, getattr(torch_fn, "training", None)  # a module's mode
        if key not in flat_functions:
            flat_functions[key] = _flat(torch_fn, structure)
        flat, out_structures = flat_functions[key]
        cpu = torch.device("cpu")
        if not all(isinstance(size, int) for leaf in leaves for size in leaf.shape):
            raise TypeError("to_jax_function: shapes must be numbers, got a symbolic one: export it shape by shape.")
        specs = [TensorSpec(tuple(leaf.shape), torch_dtype(leaf.dtype), cpu) for leaf in leaves]
        flat_structure = optree.tree_structure(tuple(leaves))  # type: ignore[arg-type]
        with lock:
            try:
                graph = trace(flat, flat_structure, specs)
            except TraceError as error:
                raise TraceError(f"to_jax_function{str(error).removeprefix('step')}") from error
            out_structure = graph.compiled.setdefault("jax", out_structures[0])
        constants = map(_constant, graph.constants)
        return jax.tree_util.tree_unflatten(out_structure, _evaluate(graph, [*leaves, *constants]))

    return jax_fn


def _flat(torch_fn: Callable[..., Any], structure: Any) -> tuple[Callable[..., Any], list[Any]]:
    """The function on flat tensors; and a list that tells the structure of what the last call returned."""
    out_structures: list[Any] = []

    def flat(*leaves: Any) -> list[Any]:
        args, kwargs = jax.tree_util.tree_unflatten(structure, leaves)
        # A graph is kept, so that it must not depend on where the first call was.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            StopGradientMarks(),
            _ByXla(),
            sdpa_kernel(SDPBackend.MATH),
            _without_fused_layers(),
        ):
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
    """XLA's own arithmetic in the place of what imitates it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _BY_XLA.get(func, func)(*args, **(kwargs or {}))


_BY_XLA: dict[Any, Callable[..., Any]] = {
    _xla.multiply_add: lambda a, b, c: a * b + c,
    _xla.log: torch.log,
    _xla.erfinv: torch.erfinv,
}


@contextlib.contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Recurrent layers in ATen's own ops; `torch.backends.mkldnn.flags` would warn of GPUs."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _evaluate(graph: StepGraph, arrays: Sequence[Any]) -> list[Any]:
    """The outputs, from the inputs and constants."""
    inputs = iter(arrays)
    values: dict[fx.Node, Any] = {}
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "call_function":
            values[node] = _lower(node, values)
    (output,) = (node for node in graph.module.graph.nodes if node.op == "output")
    return [values[node] for node in output.args[0]]


def _constant(tensor: torch.Tensor) -> Any:
    dtype = jax_dtype(tensor.dtype)
    narrowed = tensor.to(torch_dtype(dtype))
    if narrowed.dtype != tensor.dtype and (
        tensor.is_floating_point() or not (narrowed.to(tensor.dtype) == tensor).all()
    ):
        raise TypeError(
            f"to_jax_function: the function closes over a tensor of {tensor.dtype} that JAX would narrow to {dtype}: "
            f"cast it, or enable jax_enable_x64."
        )
    return tensor_to_array(narrowed.cpu(), copy=True)


def _lower(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of one op."""
    name = op_name(node)
    get = functools.partial(fx.node.map_arg, fn=values.__getitem__)
    if name == "getitem":
        source, index = node.args
        return values[source][index]  # type: ignore[index]
    if name == "copy_":
        raise TypeError("to_jax_function: the function changes an argument in place; it must be pure: clone it first.")
    if name == STOP_GRADIENT:
        return jax.lax.stop_gradient(*get(node.args))
    value = node.meta.get("val", ())  # of a check nothing
    many = isinstance(value, list | tuple)
    outs = [None if part is None else TensorSpec.of(part) for part in (value if many else [value])]
    if name not in LOWERINGS:
        raise _unsupported(node, "there is no lowering of")
    for out in outs:
        if out is not None and out.dtype == torch.float64 and not has_64_bits():
            raise TypeError(
                f"to_jax_function: float64 in {describe(node)}: JAX has it only with jax_enable_x64; use float32."
            )
    try:
        result = LOWERINGS[name](outs if many else outs[0], *_arguments(node, get))
    except NotImplementedError as error:
        raise _unsupported(node, f"with {error} there is no lowering of") from None
    except Exception as error:
        error.add_note(f"to_jax_function: in the lowering of {name!r}, in {describe(node)}.")
        raise
    results = result if many else [result]
    finished = [None if out is None else _finished(part, out) for part, out in zip(results, outs, strict=False)]
    return finished if many else finished[0]


def _finished(value: Any, out: TensorSpec) -> Any:
    assert tuple(value.shape) == out.shape, (value.shape, out)
    return value.astype(jax_dtype(out.dtype))


def _arguments(node: fx.Node, get: Callable[[Any], Any]) -> list[Any]:
    """In the order of the op's schema, without those that say where and how a result is stored."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    arguments = []
    for position, argument in enumerate(schema.arguments):
        if argument.name in ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"):
            continue
        given = node.args[position] if position < len(node.args) else argument.default_value
        arguments.append(get(node.kwargs.get(argument.name, given)))
    return arguments


def _unsupported(node: fx.Node, what: str) -> UnsupportedError:
    specs = ", ".join(
        str(TensorSpec.of(source.meta["val"])) if isinstance(source.meta["val"], torch.Tensor) else "several"
        for source in node.all_input_nodes
    )
    return UnsupportedError(f"to_jax_function: {what} {op_name(node)!r} on {specs}, in {describe(node)}.")

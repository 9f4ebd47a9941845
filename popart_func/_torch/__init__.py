"""PyTorch's semi-private names: the one package that imports them, each with the reason why nothing public will do.

PyTorch may move or change any of these between versions. `tests/test_torch_private.py` has a test for each name, which
fails with that name when it does. Nothing else in the library imports from an underscore module of PyTorch.

What changes PyTorch during a trace is in `traces`, everything else here. Importing this package must not import sympy,
TorchDynamo or TorchInductor, which take a second: what could is imported inside the function that needs it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._higher_order_ops as higher_order_ops
from torch import Tensor
from torch._C import DisableTorchFunction as DisableTorchFunction
from torch._C import _DisableTorchDispatch as DisableTorchDispatch
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._functorch import eager_transforms
from torch._functorch import vmap as vmap_module
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as torch_pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from popart_func._torch.traces import (
    DynamoNeeded,
    import_dynamo,
    postpone_dynamo,
    tells_libraries_of_a_trace,
    without_dynamo,
)

__all__ = [
    "DisableTorchDispatch",
    "DisableTorchFunction",
    "DynamoNeeded",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "all_gather",
    "apart_from_transforms",
    "core_decompositions",
    "disabled_torch_function",
    "dispatch_modes",
    "flatten_tensors",
    "function_modes",
    "get_unwrapped",
    "higher_order_ops",
    "import_dynamo",
    "is_batched",
    "is_composite",
    "is_forward_derivative_on",
    "is_functorch_wrapped_tensor",
    "is_jit_tracing",
    "is_make_fx_tracing",
    "is_plain",
    "is_transforming",
    "make_wrapper_tensor",
    "mutation_count",
    "outside_functionalize",
    "overloads",
    "postpone_dynamo",
    "sample_dirichlet",
    "scan_operator",
    "schema",
    "set_grad_enabled",
    "standard_gamma",
    "standard_gamma_grad",
    "storage_id",
    "tells_libraries_of_a_trace",
    "through_hooks",
    "torch_pytree",
    "transform_depth",
    "unflatten_tensors",
    "without_dynamo",
    "without_mkldnn",
    "zero_tensor_keys",
    "zeros_for_tangents",
]

# Names that are handed on as they are:
#
# is_functorch_wrapped_tensor, get_unwrapped: whether `torch.vmap`, `torch.func.grad` or `jvp` wraps a tensor, whose
#     values can't be read then, and what is inside the wrapper. `torch.func` has no question like it.
# FakeTensor, FakeTensorMode: tensors without values, in which torch.compile and torch.export trace.
# TorchDispatchMode: sees every ATen op below autograd and `torch.func`: the recorder of steps is one.
# DisableTorchDispatch: calls an op on a wrapper tensor without asking any mode.
# DisableTorchFunction: looks at a tensor without asking any function mode.
# OpOverload: the type of an ATen op.
# higher_order_ops: where users find PyTorch's scan, for which there is no public name.
# zeros_for_tangents: the op by which forward-mode derivatives under `torch.vmap` make zero tangents.
# torch_pytree: the trees that `torch.func` takes, in which a user's dataclass has to be registered.

zeros_for_tangents = torch.ops.aten._new_zeros_with_same_feature_meta

set_grad_enabled = torch._C._set_grad_enabled
"""What `torch.no_grad` and `torch.set_grad_enabled` call, as a `TorchFunctionMode` sees it."""

disabled_torch_function = torch._C._disabled_torch_function_impl
"""The `__torch_function__` of a tensor subclass that leaves everything to `__torch_dispatch__`."""

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def schema(op: Any) -> Any:
    """The schema of an ATen op: its name, its arguments, whether it is mutable; None for any other callable."""
    return getattr(op, "_schema", None)


def overloads(op: Any) -> list[OpOverload]:
    """The overloads of an op; an empty list if there is no such op.

    The op is one overload, all of them (``torch.ops.namespace.name``), what `torch.library.custom_op` returns, or a
    name, ``"namespace::name"``, of an ATen op without the namespace.
    """
    if isinstance(op, str):
        namespace, _, name = op.rpartition("::")
        op = getattr(getattr(torch.ops, namespace or "aten"), name, None)
    if isinstance(op, CustomOpDef):
        op = op._opoverload
    if isinstance(op, OpOverloadPacket):
        return [getattr(op, overload) for overload in op.overloads()]
    return [op] if isinstance(op, OpOverload) else []


standard_gamma, sample_dirichlet = torch._standard_gamma, torch._sample_dirichlet
"""What `torch.distributions` draws gamma and Dirichlet numbers with, for a mode to replace."""

standard_gamma_grad = torch._standard_gamma_grad
"""The derivative of gamma numbers in their parameter, as `torch.distributions` takes it."""


def is_composite(op: OpOverload) -> bool:
    """Whether PyTorch defines an op by other ops, for which autograd takes it apart."""
    return _COMPOSITE in op.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), _COMPOSITE)


def core_decompositions() -> tuple[dict[Any, Callable[..., Any]], dict[Any, Callable[..., Any]]]:
    """PyTorch's decompositions into core ATen ops, and all that it has for any op.

    The public `torch.export.default_decompositions` imports sympy and TorchDynamo.
    """
    from torch._decomp import _core_aten_decompositions_post_autograd, decomposition_table

    return _core_aten_decompositions_post_autograd(), decomposition_table


def scan_operator() -> Callable[..., Any]:
    """The operator ``scan(body, carry, xs)`` that `torch.compile` makes a loop of; there is no public one."""
    from torch._higher_order_ops.scan import scan

    return scan


def all_gather(tensor: Tensor, group: Any) -> Tensor:
    """The tensors of all processes, one after the other along axis 0; `torch.distributed.all_gather` is in place."""
    import torch.distributed._functional_collectives as functional_collectives

    new = getattr(functional_collectives, "all_gather_single", None)  # since torch 2.13
    gather = functional_collectives.all_gather_tensor if new is None else new
    return functional_collectives.wait_tensor(gather(tensor.contiguous(), 0, group))


def dispatch_modes() -> list[Any]:
    """The dispatch modes that are entered in this thread; a tensor inside one may have no values."""
    return _get_current_dispatch_mode_stack()


def function_modes() -> list[Any]:
    """The function modes that are entered in this thread, without the one of a default device."""
    modes = _get_current_function_mode_stack()
    if modes:
        from torch.utils._device import DeviceContext

        modes = [mode for mode in modes if not isinstance(mode, DeviceContext)]
    return modes


def is_batched(value: Any) -> bool:
    """Whether a value is a tensor that `torch.vmap` wraps, under whatever other transforms."""
    while isinstance(value, Tensor) and is_functorch_wrapped_tensor(value):
        if is_batchedtensor(value):
            return True
        value = get_unwrapped(value)
    return False


def transform_depth() -> int:
    """How many transforms of `torch.func` are around."""
    innermost = peek_interpreter_stack()
    return 0 if innermost is None else innermost.level()


def is_transforming() -> bool:
    """Whether a transform of `torch.func` runs in this thread, whatever tensors it wraps."""
    return peek_interpreter_stack() is not None


def is_plain() -> bool:
    """Whether a call runs as it stands: in no transform of `torch.func`, no trace, and no mode."""
    return not (
        torch.compiler.is_compiling()
        or is_transforming()
        or is_forward_derivative_on()
        or dispatch_modes()
        or function_modes()
    )


def flatten_tensors(tensors: list[Tensor]) -> Tensor:
    """Tensors of one dtype as one vector; `torch.nn.utils.parameters_to_vector` takes three times as long."""
    return torch._C._nn.flatten_dense_tensors(tensors)


def unflatten_tensors(vector: Tensor, like: list[Tensor]) -> Sequence[Tensor]:
    """The inverse of `flatten_tensors`: views of the vector, in the shapes of ``like``."""
    parts: Sequence[Tensor] = torch._C._nn.unflatten_dense_tensors(vector, like)
    return parts


@contextlib.contextmanager
def apart_from_transforms() -> Iterator[None]:
    """Within it, this thread is in no transform of `torch.func` and in no dispatch mode, as if none had been entered.

    A loop traces its body so, whatever transforms the loop itself is in.
    """
    modes = [_pop_mode() for _ in _get_current_dispatch_mode_stack()]
    try:
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


@contextlib.contextmanager
def through_hooks(replaced: Callable[[Tensor], Tensor], called: Callable[..., Any]) -> Iterator[None]:
    """Within it, two calls that no mode sees go through hooks.

    Args:
        replaced: gives the tensor that `torch.func` wraps in the place of the one that a transform is called with.
        called: is called instead of `torch.autograd.Function.apply`, with the class, that method, and its arguments.
    """
    modules: tuple[Any, Any] = vmap_module, eager_transforms
    add_batch_dim, wrap_for_grad = modules[0]._add_batch_dim, modules[1]._wrap_for_grad
    apply = vars(torch.autograd.Function)["apply"]

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return called(cls, functools.partial(apply.__func__, cls), *args, **kwargs)

    modules[0]._add_batch_dim = lambda tensor, axis, level: add_batch_dim(replaced(tensor), axis, level)
    modules[1]._wrap_for_grad = lambda tensor, level: wrap_for_grad(replaced(tensor), level)
    torch.autograd.Function.apply = classmethod(applied)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        modules[0]._add_batch_dim, modules[1]._wrap_for_grad = add_batch_dim, wrap_for_grad
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


def outside_functionalize(function: Callable[..., list[Tensor]], args: Any) -> list[Tensor]:
    """Calls a function of tensors below `torch.func.functionalize`, which has no rule for it."""
    interpreter = torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter()

    def unwrap(value: Any) -> Any:
        return eager_transforms._maybe_unwrap_functional_tensor(value, reapply_views=True)

    inner = torch_pytree.tree_map(unwrap, args)
    with interpreter.lower():
        results = function(*inner)
    wrap: Any = vars(eager_transforms)["_wrap_functional_tensor"]
    return [wrap(result, interpreter.level()) for result in results]


def is_forward_derivative_on() -> bool:
    """Whether a level of forward-mode derivatives is entered, so that any tensor may have a tangent."""
    return forward_ad._current_level >= 0


def is_make_fx_tracing() -> bool:
    """Whether `make_fx` traces in this thread, as `torch.func.linearize` does; `get_proxy_mode` would import sympy."""
    before_autograd = torch._ops._get_dispatch_mode_pre_dispatch(_PROXY)
    return before_autograd is not None or torch._C._get_dispatch_mode(_PROXY) is not None


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` traces; `torch.jit.is_tracing` warns that it is deprecated."""
    return torch._C._is_tracing()


def make_wrapper_tensor(cls: type[Tensor], like: Tensor, device: torch.device, keys: Any = None) -> Any:
    """A tensor of a subclass with the shape, strides and dtype of another one, and no memory.

    ``keys`` are what else PyTorch's dispatcher has to know about it, such as `zero_tensor_keys`.
    """
    return Tensor._make_wrapper_subclass(
        cls,
        like.shape,
        strides=like.stride(),
        storage_offset=like.storage_offset(),
        dtype=like.dtype,
        device=device,
        **({} if keys is None else {"_extra_dispatch_keys": keys}),
    )


def zero_tensor_keys() -> Any:
    """What makes a wrapper tensor a symbolic zero, the tangent with which forward-mode derivatives begin."""
    return torch._C.DispatchKeySet(torch._C.DispatchKey.ZeroTensor)


def mutation_count(tensor: Tensor) -> int:
    """How many times a tensor has been changed in place, views of it included."""
    return tensor._version


def storage_id(tensor: Tensor) -> Any:
    """The same for tensors that share memory, also where that memory has no address."""
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def without_mkldnn() -> Iterator[None]:
    """Within it, recurrent layers call ATen's own ops; `torch.backends.mkldnn.flags` would warn about GPUs."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)

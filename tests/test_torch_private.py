"""PyTorch's semi-private names: each is where `popart_func._torch` looks for it, and does what the library needs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import new_process
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import popart_func
from popart_func import _torch

ATEN = torch.ops.aten
X = torch.tensor([1.0, 2.0])


class Seen(_torch.TorchDispatchMode):
    """Notes the ops that arrive below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class Wrapper(Tensor):
    """A tensor without values, which notes the ops that are called with it."""

    called: ClassVar[list[str]] = []

    __torch_function__ = _torch.disabled_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        cls.called.append(func.name())
        return X


def wrapped(function: Callable[[Tensor], object]) -> None:
    vmap(lambda x: function(x) or x)(X)


def sees_wrapped_tensors() -> None:
    seen: list[tuple[bool, int]] = []
    wrapped(lambda x: seen.append((_torch.is_functorch_wrapped_tensor(x), _torch.get_unwrapped(x).ndim)))
    assert seen == [(True, 1)]
    assert not _torch.is_functorch_wrapped_tensor(X)


def makes_fake_tensors() -> None:
    with _torch.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(torch.empty(3) + X[0], _torch.FakeTensor)


def sees_ops_below_transforms() -> None:
    with Seen() as seen:
        grad(lambda x: x.sin().sum())(X)
    assert ATEN.sin.default in seen.ops
    assert ATEN.cos.default in seen.ops


def counts_dispatch_modes() -> None:
    assert _torch.dispatch_modes() == []
    with Seen() as seen:
        assert _torch.dispatch_modes() == [seen]


def calls_an_op_below_all_modes() -> None:
    turned = _torch.make_wrapper_tensor(Wrapper, torch.zeros(2, 3), torch.device("cpu"))
    with Seen() as seen, _torch.DisableTorchDispatch():
        ATEN.t_.default(turned)
    assert tuple(turned.shape) == (3, 2)
    assert seen.ops == []


def makes_tensors_without_memory() -> None:
    like = torch.zeros(3, 4, dtype=torch.float64).t()[1:]
    tensor = _torch.make_wrapper_tensor(Wrapper, like, torch.device("meta"))
    assert (tensor.shape, tensor.stride(), tensor.storage_offset()) == (like.shape, like.stride(), 1)
    assert (tensor.dtype, tensor.device.type) == (torch.float64, "meta")
    torch.sin(tensor)
    assert Wrapper.called[-1] == "aten::sin"


def makes_symbolic_zeros() -> None:
    zero = _torch.make_wrapper_tensor(Wrapper, X, torch.device("cpu"), _torch.zero_tensor_keys())
    assert zero._is_zerotensor()
    with Seen() as seen:
        jvp(lambda x: x.detach() * x, (X,), (X,))
    assert all(op in seen.ops for op in (ATEN.mul.Tensor,))


def makes_zero_tangents() -> None:
    zeros = _torch.zeros_for_tangents(torch.ones(3, 2), X, self_num_batch_dims=1)
    assert zeros.shape == (3, *X.shape)
    assert not zeros.any()


def knows_schemas() -> None:
    found = _torch.schema(ATEN.add_.Tensor)
    assert (found.name, found.overload_name, found.is_mutable) == ("aten::add_", "Tensor", True)
    assert [argument.name for argument in found.arguments] == ["self", "other", "alpha"]
    assert [argument.kwarg_only for argument in found.arguments] == [False, False, True]
    assert found.arguments[0].is_write
    assert found.arguments[2].default_value == 1
    assert _torch.schema(len) is None


def finds_overloads() -> None:
    assert ATEN.add.Tensor in _torch.overloads("add")
    assert _torch.overloads("aten::sin") == _torch.overloads(ATEN.sin)
    assert _torch.overloads(ATEN.sin.default) == [ATEN.sin.default]
    assert _torch.overloads("no_such::op") == _torch.overloads("no_such_op") == _torch.overloads(len) == []
    custom = torch.library.custom_op("popart_func_tests::private", lambda x: x + 1, mutates_args=(), schema="(Tensor x) -> Tensor")  # fmt: skip  # noqa: E501
    assert [op.name() for op in _torch.overloads(custom)] == ["popart_func_tests::private"]
    assert _torch.overloads("popart_func_tests::private") == _torch.overloads(custom)
    assert all(isinstance(op, _torch.OpOverload) for op in _torch.overloads("sin"))


def differentiates_gamma_numbers() -> None:
    """Of the exponential distribution, a = 1, at its median: by the derivative of the incomplete gamma function."""
    median, step = torch.tensor(2.0, dtype=torch.float64).log(), 1e-6
    below, above = (
        torch.special.gammainc(torch.tensor(1 + sign * step, dtype=torch.float64), median) for sign in (-1, 1)
    )
    slope = -(above - below) / (2 * step) / torch.exp(-median)
    found = _torch.standard_gamma_grad(torch.ones((), dtype=torch.float64), median)
    torch.testing.assert_close(found, slope, rtol=1e-3, atol=0)


def knows_composite_ops() -> None:
    assert _torch.is_composite(ATEN.linear.default) or _torch.is_composite(ATEN.matmul.default)
    assert not _torch.is_composite(ATEN.sin.default)


def has_decompositions() -> None:
    core, every = _torch.core_decompositions()
    assert ATEN.mse_loss.default in core
    assert ATEN.native_layer_norm.default in every
    assert ATEN.mm.default not in core


def has_a_scan_operator() -> None:
    carry, ys = _torch.scan_operator()(lambda c, x: ((c[0] + x[0],), (c[0] * 1,)), (torch.zeros(()),), (X,))
    assert carry[0] == 3
    assert ys[0].tolist() == [0, 1]


def sees_make_fx() -> None:
    seen: list[bool] = []
    make_fx(lambda x: seen.append(_torch.is_make_fx_tracing()) or x + 1)(X)
    make_fx(lambda x: seen.append(_torch.is_make_fx_tracing()) or x + 1, pre_dispatch=True)(X)
    assert seen == [True, True]
    assert not _torch.is_make_fx_tracing()


def sees_jit_traces() -> None:
    seen: list[bool] = []
    torch.jit.trace(lambda x: seen.append(_torch.is_jit_tracing()) or x + 1, X, check_trace=False)
    assert seen == [True]
    assert not _torch.is_jit_tracing()


def sees_how_gradients_are_switched() -> None:
    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((func, args))
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Functions(), torch.no_grad():
        pass
    assert seen == [(_torch.set_grad_enabled, (False,)), (_torch.set_grad_enabled, (True,))]


def leaves_functions_to_dispatch() -> None:
    tensor = _torch.make_wrapper_tensor(Wrapper, X, torch.device("cpu"))
    assert type(tensor + 1) is Tensor  # Tensor's own would make a Wrapper of the result
    assert Wrapper.called[-1] == "aten::add.Tensor"


def counts_mutations() -> None:
    x = torch.zeros(3)
    before = _torch.mutation_count(x)
    x[1:].add_(1)
    assert _torch.mutation_count(x) == before + 1


def gathers() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(_torch.all_gather(X[None], torch.distributed.group.WORLD), X[None])
    finally:
        torch.distributed.destroy_process_group()


def tells_memory_apart() -> None:
    x = torch.zeros(3, device="meta")
    assert _torch.storage_id(x) == _torch.storage_id(x[1:])
    assert _torch.storage_id(x) != _torch.storage_id(torch.zeros(3, device="meta"))


def has_trees() -> None:
    leaves = _torch.torch_pytree.tree_leaves({"b": 1, "a": (2, None)})
    assert leaves == [1, 2, None]
    assert _torch.torch_pytree.tree_map(lambda leaf: leaf + 1, {"a": 1}) == {"a": 2}
    assert callable(_torch.torch_pytree.register_pytree_node)


def finds_function_modes() -> None:
    class Functions(TorchFunctionMode):
        pass

    with torch.device("meta"), Functions() as mode:
        assert _torch.function_modes() == [mode]
    assert _torch.function_modes() == []


def sees_transforms() -> None:
    seen: list[bool] = []
    wrapped(lambda x: seen.append(_torch.is_transforming()))
    assert seen == [True]
    assert not _torch.is_transforming()


def counts_transforms() -> None:
    seen: list[int] = []
    wrapped(lambda x: seen.append(_torch.transform_depth()))
    grad(lambda x: vmap(lambda y: (seen.append(_torch.transform_depth()), x * y)[1])(X).sum())(torch.ones(()))
    assert (_torch.transform_depth(), *seen) == (0, 1, 2)


def tells_plain_calls() -> None:
    assert _torch.is_plain()
    seen = []
    vmap(lambda x: (seen.append(_torch.is_plain()), x)[1])(X)
    with torch.autograd.forward_ad.dual_level():
        seen.append(_torch.is_plain())
    with torch._subclasses.FakeTensorMode():
        seen.append(_torch.is_plain())
    assert seen == [False] * 3


def joins_tensors() -> None:
    parts = [X, X.new_ones(2, 3), X.new_ones(())]
    vector = _torch.flatten_tensors(parts)
    assert vector.shape == (sum(part.numel() for part in parts),)
    assert all(map(torch.equal, _torch.unflatten_tensors(vector, parts), parts))


def sees_forward_derivatives() -> None:
    assert not _torch.is_forward_derivative_on()
    with torch.autograd.forward_ad.dual_level():
        assert _torch.is_forward_derivative_on()


def switches_mkldnn() -> None:
    module, x = torch.nn.LSTM(2, 3), torch.zeros(1, 1, 2)
    with _torch.without_mkldnn(), Seen() as seen:
        module(x)
    assert not any("mkldnn" in op.name() for op in seen.ops)
    with Seen() as again:
        module(x)
    assert not torch.backends.mkldnn.is_available() or any("mkldnn" in op.name() for op in again.ops)


def tells_libraries() -> None:
    encoder = torch.nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval().requires_grad_(False)

    def answers() -> list[bool]:
        with Seen() as seen:
            encoder(torch.zeros(1, 2, 4))
        fast = any("transformer_encoder_layer_fwd" in op.name() for op in seen.ops)
        return [bool(torch.compiler.is_compiling()), torch.distributions.Normal(X, X)._validate_args is not False, fast]

    before = answers()
    assert before[0] is False
    assert before[2] is True
    with _torch.tells_libraries_of_a_trace(), ThreadPoolExecutor() as pool:
        assert bool(torch.compiler.is_compiling()) is True
        assert not torch.distributions.Normal(X, X)._validate_args
        assert answers()[2] is False
        assert not pool.submit(lambda: bool(torch.compiler.is_compiling())).result()
        left = vars(torch.compiler)["_is_compiling_flag"]
    assert not left, "a flag that another thread has kept must be off"
    assert answers()[0] is False
    assert answers()[2] is True


IN_A_NEW_PROCESS = """
import sys
import torch
from torch.func import grad
from popart_func import _torch
assert "torch._dynamo" not in sys.modules, "importing it must not import TorchDynamo"
with _torch.without_dynamo():
    try:
        torch.cond(torch.tensor(True), torch.sin, torch.cos, (torch.ones(2),))
    except _torch.DynamoNeeded:
        pass
    else:
        raise AssertionError("without_dynamo: what needs TorchDynamo must say so")
    assert "torch._dynamo" not in sys.modules, "DynamoNeeded: nothing may have been imported"
    grad(lambda x: x * x)(torch.tensor(1.0))
    assert "torch._dynamo" not in sys.modules, "without_dynamo: gradients must not import TorchDynamo"
grad(lambda x: x * x)(torch.tensor(1.0))
assert "torch._dynamo" in sys.modules, "without_dynamo: gradients import no TorchDynamo any more, so drop it"
compiled = torch.compile(lambda x: seen.append(torch.compiler.is_compiling()) or x + 1, backend="eager")
seen = []
with _torch.without_dynamo():
    compiled(torch.ones(2))
assert seen == [False], "without_dynamo: what is compiled must run as it was written"
"""


def keeps_dynamo_out() -> None:
    result = new_process.run(IN_A_NEW_PROCESS)
    assert result.returncode == 0, result.stderr


def imports_dynamo() -> None:
    _torch.import_dynamo()
    assert "torch._dynamo" in sys.modules


def knows_lanes() -> None:
    answers: list[bool] = []
    vmap(lambda x: grad(lambda y: (answers.append(_torch.is_batched(y)) or y * X).sum())(x))(X)
    grad(lambda x: (answers.append(_torch.is_batched(x)) or x).sum())(X)
    assert answers == [True, False]
    assert not _torch.is_batched(X)


def draws_numbers() -> None:
    drawn: list[Any] = []

    class Sees(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            drawn.append(func)
            return func(*args, **(kwargs or {}))

    with Sees():
        torch.distributions.Gamma(X, X).sample()
        torch.distributions.Dirichlet(X).sample()
    assert _torch.standard_gamma in drawn
    assert _torch.sample_dirichlet in drawn


def leaves_transforms_and_modes() -> None:
    seen = Seen()

    def function(x: Tensor) -> Tensor:
        with _torch.apart_from_transforms():
            assert not _torch.is_transforming()
            assert _torch.dispatch_modes() == []
            X.sin()
        assert _torch.is_transforming()
        return x.cos()

    with seen:
        vmap(function)(X)
    assert seen.ops == [ATEN.cos.default], "apart_from_transforms: a mode saw what was called within it"


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


def calls_hooks() -> None:
    called: list[Any] = []
    other = X + 1

    def applied(cls: Any, apply: Callable[..., Any], *args: Any) -> Any:
        called.append(cls)
        return apply(*args)

    apply = torch.autograd.Function.apply
    with _torch.through_hooks(lambda _: other, applied):
        assert torch.equal(vmap(lambda x: 2 * x)(X), 2 * other)
        assert torch.equal(grad(lambda x: (x * x).sum())(X), 2 * other)
        assert torch.equal(Identity.apply(X), X)
    assert called == [Identity]
    assert torch.equal(vmap(lambda x: 2 * x)(X), 2 * X)
    assert torch.autograd.Function.apply == apply


def calls_below_functionalize() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y[0] = 5
        (z,) = _torch.outside_functionalize(lambda inner: [inner * (2 - torch._is_functional_tensor(inner))], (y,))
        return z + 1

    assert torch.equal(torch.func.functionalize(function)(X), torch.tensor([11.0, 5.0]))


def looks_below_function_modes() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError("a function mode saw a call within DisableTorchFunction")

    with Mode(), _torch.DisableTorchFunction():
        X.sin()


def has_a_users_scan() -> None:
    assert callable(_torch.higher_order_ops.scan)


# Each name of the module, and what must hold of it.
LAWS: dict[str, Callable[[], None]] = {
    "all_gather": gathers,
    "apart_from_transforms": leaves_transforms_and_modes,
    "higher_order_ops": has_a_users_scan,
    "outside_functionalize": calls_below_functionalize,
    "through_hooks": calls_hooks,
    "DisableTorchDispatch": calls_an_op_below_all_modes,
    "DisableTorchFunction": looks_below_function_modes,
    "FakeTensor": makes_fake_tensors,
    "FakeTensorMode": makes_fake_tensors,
    "OpOverload": finds_overloads,
    "TorchDispatchMode": sees_ops_below_transforms,
    "core_decompositions": has_decompositions,
    "disabled_torch_function": leaves_functions_to_dispatch,
    "dispatch_modes": counts_dispatch_modes,
    "function_modes": finds_function_modes,
    "get_unwrapped": sees_wrapped_tensors,
    "is_composite": knows_composite_ops,
    "standard_gamma_grad": differentiates_gamma_numbers,
    "is_forward_derivative_on": sees_forward_derivatives,
    "is_functorch_wrapped_tensor": sees_wrapped_tensors,
    "is_jit_tracing": sees_jit_traces,
    "is_make_fx_tracing": sees_make_fx,
    "flatten_tensors": joins_tensors,
    "is_plain": tells_plain_calls,
    "is_transforming": sees_transforms,
    "transform_depth": counts_transforms,
    "make_wrapper_tensor": makes_tensors_without_memory,
    "mutation_count": counts_mutations,
    "overloads": finds_overloads,
    "scan_operator": has_a_scan_operator,
    "schema": knows_schemas,
    "set_grad_enabled": sees_how_gradients_are_switched,
    "storage_id": tells_memory_apart,
    "tells_libraries_of_a_trace": tells_libraries,
    "torch_pytree": has_trees,
    "unflatten_tensors": joins_tensors,
    "DynamoNeeded": keeps_dynamo_out,
    "import_dynamo": imports_dynamo,
    "is_batched": knows_lanes,
    "postpone_dynamo": keeps_dynamo_out,
    "sample_dirichlet": draws_numbers,
    "standard_gamma": draws_numbers,
    "without_dynamo": keeps_dynamo_out,
    "without_mkldnn": switches_mkldnn,
    "zero_tensor_keys": makes_symbolic_zeros,
    "zeros_for_tangents": makes_zero_tangents,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", _torch.__all__)
def test_pytorch_still_has(name: str) -> None:
    try:
        LAWS[name]()
    except Exception as error:
        raise AssertionError(
            f"popart_func._torch.{name}: PyTorch {torch.__version__} has changed it: {error}"
        ) from error


def private_names(source: str) -> list[str]:
    """The underscore modules of PyTorch that a module imports or reaches into."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found.append(node.value)  # import_module and sys.modules
    is_private = lambda name: any(part.startswith("_") and not part.startswith("__") for part in name.split(".")[1:])  # noqa: E731
    return [name for name in found if name.split(".")[0] == "torch" and is_private(name)]


def test_private_names_are_found() -> None:
    assert private_names("from torch._C import x") == ["torch._C.x"]
    assert private_names("import torch._ops") == ["torch._ops"]
    assert private_names("from torch.utils import _pytree as pytree") == ["torch.utils._pytree"]
    assert "torch._C._functorch" in private_names("torch._C._functorch.f(x)")
    assert private_names("sys.modules['torch._dynamo']") == ["torch._dynamo"]
    assert private_names("import torch.utils\ntorch.__version__\nfrom torch import Tensor\nmy._torch") == []


def test_one_package_imports_what_is_semi_private() -> None:
    root = Path(popart_func.__file__).parent
    files = [path for path in root.rglob("*.py") if path.parent != root / "_torch"]
    found = {str(path.relative_to(root)): private_names(path.read_text(encoding="utf-8")) for path in files}
    assert {name: names for name, names in found.items() if names} == {}

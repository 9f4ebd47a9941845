"""`keyed`: PyTorch's random layers and draws, such as dropout, from a key instead of the global generator."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode

from popart_func._torch import TorchDispatchMode, dispatch_modes, function_modes, is_functorch_wrapped_tensor, schema
from popart_func._typing import Integer
from popart_func.random._arguments import check_key
from popart_func.random.keys import fold_in
from popart_func.random.torch_draws import CREATIONS, DRAWS

__all__ = ["count_draws", "keyed"]


@contextlib.contextmanager
def keyed(key: Integer[Tensor, "2"]) -> Iterator[None]:
    """Within it, PyTorch's random functions draw from a key: dropout, `torch.rand`, `torch.distributions`, ...

    The first draw takes ``fold_in(key, 0)``, the second ``fold_in(key, 1)``, and so on, in the order in which the
    program calls them. So a layer draws the same numbers in each lane of `scan_lanes` as that lane's key gives alone,
    on every engine, under `torch.func.grad` and `torch.vmap`, and in `interop.jax.to_jax_function`. The global
    generator is neither read nor changed.

    Numbers are float32, cast to the dtype that PyTorch returns. A `torch.vmap` *inside* draws the same numbers for each
    of its examples, since they share the key: `split` the key and enter `keyed` inside the vmapped function where they
    should differ; a layer that is called with a whole batch draws for each example anyway. So do the rounds of a loop
    (`scan`, `while_loop`, ...) and the branches of a `cond`: in a traced step they may not draw from a key around them.

    Args:
        key: a key, used once: give every step its own, by `split` or `fold_in`.

    Raises:
        TypeError: within it, a function draws that has no form with a key, or is given a generator.

    >>> import torch
    >>> from popart_func.random import key
    >>> dropout = torch.nn.Dropout(0.5)
    >>> with keyed(key(0)):
    ...     dropout(torch.ones(4)), torch.rand(2)
    (tensor([0., 2., 2., 2.]), tensor([0.0073, 0.0209]))
    """
    check_key("keyed", key)
    no_checkpoints = torch.autograd.graph.disable_saved_tensors_hooks(
        "keyed: torch.utils.checkpoint and other hooks of saved tensors can't be used under a key: what is computed "
        "again would draw other numbers. Enter `keyed` inside the function that is checkpointed."
    )
    refuse_draws = contextlib.nullcontext() if dispatch_modes() else _RefuseDraws()  # a trace refuses them itself
    with refuse_draws, no_checkpoints, _DrawFromKey(key):
        yield


def count_draws() -> int:
    """How many draws there have been from the keys of all `keyed` that this thread is within."""
    return sum(mode.draws for mode in function_modes() if isinstance(mode, _DrawFromKey))


class _DrawFromKey(TorchFunctionMode):
    """Replaces PyTorch's random functions."""

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key = key
        self.draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draw = DRAWS.get(func)
        if draw is not None:
            key = fold_in(self.key, self.draws)
            self.draws += 1
            return draw(key, *args, **kwargs)
        if _is_checked(func):
            with self:
                return _unchecked(func)(*args, **kwargs)
        result = func(*args, **kwargs)
        return self._in_lanes(result) if func in CREATIONS else result

    def _in_lanes(self, made: Tensor) -> Tensor:
        """Under `torch.vmap`, a tensor with a copy for each lane: else lanes could not fill it differently in place."""
        if not is_functorch_wrapped_tensor(self.key) or is_functorch_wrapped_tensor(made):
            return made
        return torch.where(self.key[0] == self.key[0], made, made)


def _is_checked(func: Any) -> bool:
    """Whether a function of `torch.nn.functional` is written in Python and asks for modes before it does anything."""
    return (
        isinstance(func, types.FunctionType)
        and func.__module__ in (functional.__name__, init.__name__)
        and any("has_torch_function" in name for name in func.__code__.co_names)
    )


@functools.cache
def _unchecked(func: types.FunctionType) -> Callable[..., Any]:
    """The same function without that question, so that a mode sees what it calls: PyTorch runs it outside of modes."""
    no = dict.fromkeys((name for name in func.__code__.co_names if "has_torch_function" in name), lambda *_: False)
    # functional imports the question by name, init asks torch.overrides.
    unasked = types.SimpleNamespace(**{**vars(torch), "overrides": types.SimpleNamespace(**no)})
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, "torch": unasked, **no}, func.__name__, func.__defaults__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


class _RefuseDraws(TorchDispatchMode):
    """Raises where something still draws from a generator."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else TorchDynamo is imported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_off(func, args, kwargs):
            raise TypeError(
                f"keyed: {func.overloadpacket.__name__!r} can't draw from a key: draw with popart_func.random instead."
            )
        return func(*args, **kwargs)


def _is_off(op: Any, args: Any, kwargs: Any) -> bool:
    """Whether an argument says that an op draws nothing, as a probability of dropout of 0 does."""
    for position, argument in enumerate(schema(op).arguments):
        if argument.name in ("dropout_p", "p", "train", "training"):
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            if given in (0, False):
                return True
    return False
